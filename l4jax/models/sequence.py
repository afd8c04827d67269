"""How a sequence is cut over the shards of the context axis.

A causal shard with the last tokens works most, so each shard holds two pieces, one from either end
of the sequence ("balanced"; Brandon et al. 2023, striped by halves). Where that would cut attention
chunks and contiguous shards would not, shards are contiguous: in chunked layers nothing then needs
to be sent, and Llama has three of them for every global one.

Letters: see `models.layers`; c shards of the context axis.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from l4jax import sharding
from l4jax.config import TextConfig


@dataclasses.dataclass(frozen=True)
class Split:
    """A sequence of `length` tokens over `shards` shards."""

    shards: int
    length: int
    balanced: bool

    @property
    def piece(self) -> int:
        """Tokens that lie together."""
        return self.length // self.shards // (2 if self.balanced else 1)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """Int[c t]: the row numbers that each shard holds, in its own order."""
        pieces = np.arange(self.length, dtype=np.int32).reshape(-1, self.piece)
        if not self.balanced:
            return pieces
        return np.concatenate([pieces[: self.shards], pieces[: self.shards - 1 : -1]], axis=1)

    @functools.cached_property
    def places(self) -> np.ndarray:
        """Where each row number lies among all shards' rows."""
        return np.argsort(self.rows.reshape(-1))

    def whole(self, x: jax.Array) -> jax.Array:
        """All shards' rows of `x` [b t …], in their natural order."""
        x = sharding.gather(x, 1, "context")
        if not self.balanced:
            return x
        pieces = x.reshape(x.shape[0], -1, self.piece, *x.shape[2:])
        order = self.places.reshape(-1, self.piece)[:, 0] // self.piece
        return pieces[:, order].reshape(x.shape)

    def contiguous(self, x: jax.Array) -> jax.Array:
        """The rows of `x` [b t …] that this shard would hold if shards were contiguous."""
        if not self.balanced:
            return x
        c, half = self.shards, self.piece
        home = [min(p, 2 * c - 1 - p) for p in range(2 * c)]
        # The two pieces of a shard have numbers of different parity: one trip for each parity.
        shard = sharding.index("context")
        odd = jnp.asarray(shard) % 2 == 1
        low, high = x[:, :half], x[:, half:]
        trips = jnp.where(odd, high, low), jnp.where(odd, low, high)
        even, uneven = (
            jax.lax.ppermute(trip, "context", [(home[p], p // 2) for p in range(parity, 2 * c, 2)])
            for parity, trip in enumerate(trips)
        )
        return jnp.concatenate([even, uneven], axis=1)


def split(config: TextConfig, length: int, *, in_order: bool = False) -> Split | None:
    """How a sequence of this length lies over the context axis; None if it is not cut.

    Outside of `per_shard`: the mesh alone decides. With `in_order`, shards are contiguous.
    """
    _, context = sharding.token_axes(1, length)
    if not context:
        return None
    shards = jax.sharding.get_abstract_mesh().shape["context"]
    kinds = {layer.attention for layer in config.layers}
    chunk = config.attention.chunk_size if "chunked" in kinds else None
    halves = length % (2 * shards) == 0
    fits = chunk is None or length // (2 * shards) % chunk == 0 or length // shards % chunk != 0
    balanced = halves and fits and kinds != {"chunked"} and not in_order
    return Split(shards, length, balanced)
