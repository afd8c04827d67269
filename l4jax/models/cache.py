"""Key-value caches: a chunked layer keeps one chunk, every other layer the whole context.

A layer's cache of `size` slots is a ring: position p lies in slot p mod size. For a chunked layer
size is the chunk, so that a chunk's first token overwrites the chunk before, which nobody sees any
more. A row's length alone tells what each slot holds.

Letters: see `models.layers`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from l4jax import sharding


class KeyValues(NamedTuple):
    """One layer's cache; with a leading dimension for layers that are scanned."""

    k: Float[Array, "*l b s k h"]
    v: Float[Array, "*l b s k h"]


class Cache(NamedTuple):
    """A batch of contexts. `lengths` are the tokens each row holds; rows may differ.

    layers: one entry per layer of the pattern, stacked over the scanned periods. tail: one entry
    per layer that is not scanned.
    """

    layers: tuple[KeyValues, ...]
    tail: tuple[KeyValues, ...]
    lengths: Int[Array, " b"]


class Slots(NamedTuple):
    """How a cache's slots lie over the shards of the context axis: cut, or whole in each."""

    cut: bool = False

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes over which slots are cut."""
        return ("context",) if self.cut else ()

    def of(self, cache: KeyValues) -> int:
        """Slots of the whole cache that this is a part of."""
        return cache.k.shape[-3] * sharding.size(*self.axes)

    def first(self, cache: KeyValues) -> Array | int:
        """The number of this part's first slot."""
        return sharding.index(*self.axes) * cache.k.shape[-3]

    def here(self, counts: Int[Array, " b"], cache: KeyValues) -> Int[Array, " b"]:
        """How many of each row's first `counts` slots lie in this part."""
        return jnp.clip(counts - self.first(cache), 0, cache.k.shape[-3])

    def whole(self, x: Array) -> Array:
        """All parts of a cache's array [b s k h]."""
        return sharding.gather(x, 1, *self.axes)


def held(
    lengths: Int[Array, " b"], size: int, slots: Int[Array, " s"] | None = None
) -> Int[Array, "b s"]:
    """The position that each slot, or each of these, holds; negative where it holds none yet."""
    slots = jnp.arange(size, dtype=jnp.int32) if slots is None else slots
    last = lengths[:, None] - 1
    return last - (last - slots) % size


def write(
    cache: KeyValues,
    new: KeyValues,
    lengths: Int[Array, " b"],
    counts: Int[Array, " b"],
    slots: Slots = Slots(),
    layer: Int[Array, ""] | None = None,
) -> KeyValues:
    """`cache` with the first `counts` tokens of `new` placed behind each row's `lengths`.

    With `layer`, it is the cache of several layers, and that one's is written: in place.
    """
    b, t = new.k.shape[:2]
    at_layer = () if layer is None else (layer,)
    size, here, first = slots.of(cache), cache.k.shape[-3], slots.first(cache)
    if t == 1:
        # One slot per row changes in place; a row that adds nothing here aims outside, is dropped.
        at = lengths % size - first
        at = jnp.where((counts > 0) & (at >= 0), at, here)
        rows = jnp.arange(b)
        return jax.tree.map(
            lambda old, x: old.at[*at_layer, rows, at].set(x[:, 0].astype(old.dtype), mode="drop"),
            cache,
            new,
        )
    numbers = first + jnp.arange(here, dtype=jnp.int32)
    index = held(lengths + counts, size, numbers) - lengths[:, None]

    def merge(old: Array, x: Array) -> Array:
        taken = jnp.take_along_axis(x, index.clip(0, t - 1)[:, :, None, None], axis=1)
        kept = old if layer is None else old[layer]
        merged = jnp.where((index >= 0)[:, :, None, None], taken.astype(old.dtype), kept)
        return merged if layer is None else old.at[layer].set(merged)

    return jax.tree.map(merge, cache, new)
