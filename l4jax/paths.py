"""Dotted names of leaves: patterns on those of parameters, and what differs in two configurations.

A parameter of the model is called as in its tree: `embed`, `layers.0.attention.q` (stacked over the
periods of the pattern), `tail.1.ffn.router`, `norm.scale`, `head`. In a pattern, `*` stands for
anything, dots included, and a pattern must fit the whole name: `*.attention.*`, `*.ffn.router`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

Chosen = Callable[[str], bool]


def name(path: Sequence[Any]) -> str:
    """The dotted name of a leaf at a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator=".")


def names(tree: Any, *, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """The dotted names of all leaves, in the tree's order."""
    return [name(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]


def fits(name: str, pattern: str) -> bool:
    """Whether a pattern stands for a name."""
    return fnmatch.fnmatchcase(name, pattern)


def chosen(patterns: Iterable[str], known: Iterable[str] | None = None) -> Chosen:
    """A predicate on names: whether any of the patterns fits.

    Args:
        patterns: see the module.
        known: all names there are; a pattern that fits none of them is refused.

    Raises:
        ValueError: a pattern fits none of the known names.
    """
    patterns = tuple(patterns)
    if known is not None:
        known = list(known)
        for pattern in patterns:
            if not any(fits(x, pattern) for x in known):
                some = ", ".join(known[:6]) + (", …" if len(known) > 6 else "")
                raise ValueError(f"pattern {pattern!r} fits no parameter; there are {some}")
    return lambda name: any(fits(name, pattern) for pattern in patterns)


def differences(
    then: Any, now: Any, *, free: frozenset[str] = frozenset(), name: str = ""
) -> Iterator[str]:
    """Leaves of two configurations that are not the same, as "name: value then, value now".

    Args:
        then: nested mappings of what JSON can hold.
        now: the same.
        free: last parts of the names of leaves that may differ.
        name: dotted, of the mappings themselves.
    """
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in sorted(then.keys() | now.keys()):
            if key not in free:
                inner = f"{name}.{key}" if name else key
                yield from differences(then.get(key), now.get(key), free=free, name=inner)
    elif then != now:
        yield f"{name}: {then!r} then, {now!r} now"
