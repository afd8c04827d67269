"""How one side's tensors are named and laid out on the other side: rules, used in both directions.

Our canonical names count layers from 0 ("layers.7.attention.q"), whether or not the model stacks
them for scanning; `places` says in which array of a model, and at which index of its first
dimension, a canonical name lies. A table is a list of rules; expanding it for a configuration must
name every parameter of the model exactly once, which is checked.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from l4jax.checkpoints.rows import Join, plain
from l4jax.config import Layer, TextConfig

Parts = tuple[Any, ...]
R = TypeVar("R", "Rule", "MetaRule")


class Layout(NamedTuple):
    """Their tensor to our arrays, and back; works on NumPy and on JAX arrays alike.

    cut: the dimension of our arrays that the first dimension of theirs runs along, so that slices
        of one side are slices of the other; None where only whole tensors correspond.
    """

    load: Callable[[Any], Parts]
    save: Callable[[Parts], Any]
    cut: int | None = None


class Rule(NamedTuple):
    """One of their tensors and the canonical names of the arrays that it holds.

    Both may contain `{l}`, a layer's number; `layers` says which layers the rule is for.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: Layout
    layers: Callable[[Layer], bool] = lambda layer: True


class MetaRule(NamedTuple):
    """A rule for a tensor that Meta's files spread over their shards as `join` says."""

    theirs: str
    ours: tuple[str, ...]
    layout: Layout
    join: Join
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


SAME = Layout(lambda x: (x,), lambda parts: parts[0], cut=0)
"""Equal on both sides."""
TRANSPOSED = Layout(lambda x: (x.swapaxes(-1, -2),), lambda parts: parts[0].swapaxes(-1, -2), cut=1)
"""torch's (out, in) ↔ our (in, out)."""
TRANSPOSED_EXPERTS = TRANSPOSED._replace(cut=0)
"""The same inside each expert: (e, out, in) ↔ (e, in, out)."""
HALVES = Layout(
    lambda x: (x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]),
    lambda parts: _concatenate(parts, axis=-1),
    cut=0,
)
"""One array (e, …, 2f) ↔ its two halves."""


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

    return Layout(load, save, cut=1)


def head_bias(size: int, *, interleaved: bool = False) -> Layout:
    """Theirs (heads · size) ↔ ours (heads, size); interleaved as in `heads`."""
    whole = heads(size, interleaved=interleaved)
    return Layout(
        lambda x: (whole.load(x[:, None])[0][0],),
        lambda parts: whole.save((parts[0][None],))[:, 0],
    )


def heads_out(size: int) -> Layout:
    """Theirs (d, heads · size) ↔ ours (heads, size, d)."""
    return Layout(
        lambda x: (x.swapaxes(0, 1).reshape(-1, size, x.shape[0]),),
        lambda parts: parts[0].reshape(-1, parts[0].shape[2]).swapaxes(0, 1),
        cut=2,
    )


def stacked_rows(layouts: Sequence[Layout], rows: Sequence[int]) -> Layout:
    """Theirs: several tensors of one part each, one below the other, with that many rows."""
    ends = list(itertools.accumulate(rows, initial=0))

    def load(x: Any) -> Parts:
        return tuple(
            layout.load(x[start:stop])[0]
            for layout, start, stop in zip(layouts, ends, ends[1:], strict=False)
        )

    def save(parts: Parts) -> Any:
        pieces = [layout.save((part,)) for layout, part in zip(layouts, parts, strict=True)]
        return _concatenate(pieces, axis=0)

    return Layout(load, save)


def constant(value: np.ndarray) -> Layout:
    """Theirs holds what we know anyway, and none of our arrays."""
    return Layout(lambda x: (), lambda parts: value)


def _concatenate(parts: Sequence[Any], axis: int) -> Any:
    """NumPy arrays or JAX arrays of one type, one after the other."""
    if not isinstance(parts[0], np.ndarray):
        return jnp.concatenate(parts, axis=axis)
    return np.concatenate([plain(x) for x in parts], axis=axis).view(parts[0].dtype)


def expand(rules: Iterable[R], config: TextConfig) -> Iterator[tuple[Match, R]]:
    """Every tensor of a checkpoint of this configuration and its rule, layer by layer."""
    rules = list(rules)
    for rule in rules:
        if "{l}" not in rule.theirs:
            yield Match(rule.theirs, rule.ours, rule.layout), rule
    for number, layer in enumerate(config.layers):
        for rule in rules:
            if "{l}" in rule.theirs and rule.layers(layer):
                ours = tuple(name.format(l=number) for name in rule.ours)
                yield Match(rule.theirs.format(l=number), ours, rule.layout), rule


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


def check_complete(matches: Iterable[Match], known: Iterable[str]) -> None:
    """Raises ValueError unless the matches name every known parameter exactly once."""
    counts = collections.Counter(name for match in matches for name in match.ours)
    wrong = sorted((set(counts) ^ set(known)) | {name for name, n in counts.items() if n > 1})
    if wrong:
        raise ValueError(f"the name table does not fit the model's parameters: {wrong[:5]}")


def their_shape(layout: Layout, ours: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of their tensor, given the shapes of our arrays."""
    parts = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ours)
    return jax.eval_shape(layout.save, parts).shape
