"""How one side's tensors are named and laid out on the other side: rules, used in both directions.

Our canonical names count layers from 0 ("layers.7.attention.q"), whether or not the model stacks
them for scanning; `places` says in which array of a model, and at which index of its first
dimension, a canonical name lies. A table is a list of rules; expanding it for a configuration must
name every parameter of the model exactly once, which is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l4jax.config import Layer, TextConfig

Parts = tuple[Any, ...]


class Layout(NamedTuple):
    """Their tensor to our arrays, and back; works on NumPy and on JAX arrays alike."""

    load: Callable[[Any], Parts]
    save: Callable[[Parts], Any]


class Rule(NamedTuple):
    """One of their tensors and the canonical names of the arrays that it holds.

    Both may contain `{l}`, a layer's number; `layers` says which layers the rule is for.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: Layout
    layers: Callable[[Layer], bool] = lambda layer: True


class Match(NamedTuple):
    """A rule with its layer number filled in."""

    theirs: str
    ours: tuple[str, ...]
    layout: Layout


class Place(NamedTuple):
    """Where a canonical name lies in a model's state: a path, and a period if stacked."""

    path: tuple[str | int, ...]
    period: int | None


SAME = Layout(lambda x: (x,), lambda parts: parts[0])
"""Equal on both sides."""
TRANSPOSED = Layout(lambda x: (x.swapaxes(-1, -2),), lambda parts: parts[0].swapaxes(-1, -2))
"""torch's (out, in) ↔ our (in, out)."""
HALVES = Layout(
    lambda x: (x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]),
    lambda parts: (np if isinstance(parts[0], np.ndarray) else jnp).concatenate(parts, axis=-1),
)
"""One array (…, 2f) ↔ its two halves."""


def heads(size: int, *, interleaved: bool = False) -> Layout:
    """Theirs (heads · size, d) ↔ ours (d, heads, size).

    Interleaved: theirs puts the two members of a rotated pair next to each other, ours half a head
    apart.
    """

    def load(x: Any) -> Parts:
        n, d = x.shape[0] // size, x.shape[1]
        if interleaved:
            x = x.reshape(n, size // 2, 2, d).swapaxes(1, 2)
        return (x.reshape(n, size, d).transpose(2, 0, 1),)

    def save(parts: Parts) -> Any:
        x = parts[0].transpose(1, 2, 0)
        n, _, d = x.shape
        if interleaved:
            x = x.reshape(n, 2, size // 2, d).swapaxes(1, 2)
        return x.reshape(n * size, d)

    return Layout(load, save)


def heads_out(size: int) -> Layout:
    """Theirs (d, heads · size) ↔ ours (heads, size, d)."""
    return Layout(
        lambda x: (x.swapaxes(0, 1).reshape(-1, size, x.shape[0]),),
        lambda parts: parts[0].reshape(-1, parts[0].shape[2]).swapaxes(0, 1),
    )


def expand(rules: Iterable[Rule], config: TextConfig) -> Iterator[Match]:
    """Every tensor of a checkpoint of this configuration, layer by layer."""
    rules = list(rules)
    for rule in rules:
        if "{l}" not in rule.theirs:
            yield Match(rule.theirs, rule.ours, rule.layout)
    for number, layer in enumerate(config.layers):
        for rule in rules:
            if "{l}" in rule.theirs and rule.layers(layer):
                ours = tuple(name.format(l=number) for name in rule.ours)
                yield Match(rule.theirs.format(l=number), ours, rule.layout)


def places(config: TextConfig, periods: int, paths: Iterable[tuple]) -> dict[str, Place]:
    """Canonical name → place, for a model with this many scanned periods and these state paths."""
    period = len(config.pattern)
    found: dict[str, Place] = {}
    for path in paths:
        rest = ".".join(str(key) for key in path[2:])
        if path[0] == "layers":
            for number in range(periods):
                found[f"layers.{number * period + path[1]}.{rest}"] = Place(path, number)
        elif path[0] == "tail":
            found[f"layers.{periods * period + path[1]}.{rest}"] = Place(path, None)
        else:
            found[".".join(str(key) for key in path)] = Place(path, None)
    return found


def check_complete(matches: Iterable[Match], known: Mapping[str, Place]) -> None:
    """Raises ValueError unless the matches name every known parameter exactly once."""
    named = [name for match in matches for name in match.ours]
    wrong = sorted((set(named) ^ set(known)) | {n for n in named if named.count(n) > 1})
    if wrong:
        raise ValueError(f"the name table does not fit the model's parameters: {wrong[:5]}")


def their_shape(layout: Layout, ours: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of their tensor, given the shapes of our arrays."""
    parts = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ours)
    return jax.eval_shape(layout.save, parts).shape
