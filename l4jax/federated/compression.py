"""Smaller updates: the largest entries only, in few bits, what was lost carried to the next round.

Simulated: the server gets what a receiver would make of the message, and `Compression.bytes` says
how long that message would be.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

INDEX_BYTES, SCALE_BYTES = 4, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compression:
    """How a client's update is sent."""

    keep: float = 1.0
    """Share of each array's entries that are sent, the largest ones (Aji & Heafield 2017)."""
    bits: int = 32
    """Of an entry; below 32, whole multiples of an array's largest entry / (2^(bits−1) − 1),
    rounded at random so that the mean is right (Alistarh et al. 2017)."""
    feedback: bool = True
    """Whether a client adds what was lost to its next update (Seide et al. 2014)."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep {self.keep} must be above 0 and at most 1")
        if not (2 <= self.bits <= 16 or self.bits == 32):
            raise ValueError(f"bits {self.bits} must be from 2 to 16, or 32 for none lost")

    def send(self, update: Any, key: jax.Array) -> Any:
        """What arrives of an update, a tree of float arrays."""
        leaves, tree = jax.tree.flatten(update)
        keys = jax.random.split(key, len(leaves))
        sent = [self._one(x, k) for x, k in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(tree, sent)

    def bytes(self, params: Any) -> int:
        """Length of a message about all of a tree's arrays."""
        total = 0
        for x in jax.tree.leaves(params):
            count, length = x.size, 0
            if self.keep < 1:
                count = _kept(x.size, self.keep)
                length = count * INDEX_BYTES
            if self.bits < 32:
                total += length + math.ceil(count * self.bits / 8) + SCALE_BYTES
            else:
                total += length + count * x.dtype.itemsize
        return total

    def _one(self, x: jax.Array, key: jax.Array) -> jax.Array:
        flat = x.ravel()
        if self.keep < 1:
            at = jax.lax.top_k(jnp.abs(flat), _kept(flat.size, self.keep))[1]
            flat = jnp.zeros_like(flat).at[at].set(flat[at])
        if self.bits < 32:
            most = 2 ** (self.bits - 1) - 1
            unit = jnp.max(jnp.abs(flat)) / most
            unit = jnp.where(unit > 0, unit, 1)
            levels = jnp.floor(flat / unit + jax.random.uniform(key, flat.shape, flat.dtype))
            flat = jnp.clip(levels, -most, most) * unit  # the largest may be rounded up beyond
        return flat.reshape(x.shape)


def _kept(size: int, share: float) -> int:
    return max(1, round(size * share))
