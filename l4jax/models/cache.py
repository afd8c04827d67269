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


def held(lengths: Int[Array, " b"], size: int) -> Int[Array, "b s"]:
    """The position each slot holds; negative where it holds none yet."""
    slots = jnp.arange(size, dtype=jnp.int32)
    last = lengths[:, None] - 1
    return last - (last - slots) % size


def write(
    cache: KeyValues, new: KeyValues, lengths: Int[Array, " b"], counts: Int[Array, " b"]
) -> KeyValues:
    """`cache` with the first `counts` tokens of `new` placed behind each row's `lengths`."""
    b, t = new.k.shape[:2]
    size = cache.k.shape[1]
    if t == 1:
        # One slot per row changes in place; a row that adds nothing aims outside and is dropped.
        slots = jnp.where(counts > 0, lengths % size, size)
        rows = jnp.arange(b)
        return jax.tree.map(
            lambda old, x: old.at[rows, slots].set(x[:, 0].astype(old.dtype), mode="drop"),
            cache,
            new,
        )
    index = held(lengths + counts, size) - lengths[:, None]

    def merge(old: Array, x: Array) -> Array:
        taken = jnp.take_along_axis(x, index.clip(0, t - 1)[:, :, None, None], axis=1)
        return jnp.where((index >= 0)[:, :, None, None], taken.astype(old.dtype), old)

    return jax.tree.map(merge, cache, new)
