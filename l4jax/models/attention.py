"""Grouped-query attention of the three layer kinds, without and with a cache.

Order of operations (Meta's `llama4/model.py`, transformers' `modeling_llama4.py`): project; rotate
by position (chunked, causal) and normalise if the model does; or scale by temperature (global);
then softmax(q·k / √h)·v and the output projection.

Letters: see `models.layers`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from l4jax import sharding
from l4jax.config import Attention as AttentionConfig
from l4jax.config import AttentionKind, Temperature, TextConfig
from l4jax.kernels.attention import (
    Where,
    cached_attention,
    cross_attention,
    part_attention,
    self_attention,
)
from l4jax.models.cache import KeyValues, Slots, held, write
from l4jax.models.layers import many_rows, normalize, rope_frequencies, rotate, rotation, weight
from l4jax.models.sequence import Split
from l4jax.sharding import read, total

Rotation = tuple[Float32[Array, "b t 1 r"], Float32[Array, "b t 1 r"]]


class Step(NamedTuple):
    """What a cached call adds: `counts` tokens of each row, behind its first `lengths`."""

    lengths: Int[Array, " b"]
    counts: Int[Array, " b"]
    fresh: bool
    """The cache is empty: the tokens need to see only each other."""
    slots: Slots


class Tokens(NamedTuple):
    """All that attention needs to know of its tokens, worked out once for all layers.

    where: None when every row is one segment that starts at position 0.
    split: how rows are cut over shards, if they are; all else is this shard's part.
    rotations: by layer kind.
    """

    where: Where | None
    split: Split | None
    rotations: dict[AttentionKind, Rotation]
    temperature: Float32[Array, "b t 1 1"]


def describe(
    config: TextConfig,
    positions: Int[Array, "b t"],
    where: Where | None = None,
    split: Split | None = None,
) -> Tokens:
    """The rotations and temperatures of tokens at these positions.

    Inside a chunked layer only distances within a chunk matter, so its angles are taken from the
    position within the chunk: equal to absolute positions in exact arithmetic, and still exact in
    float32 at ten million tokens, where p · frequency would be off by half a radian.
    """
    frequencies = rope_frequencies(config.attention.rope, config.attention.head_dim)
    origins: dict[AttentionKind, Int[Array, "b t"]] = {"causal": positions}
    if config.attention.chunk_size is not None:
        origins["chunked"] = positions % config.attention.chunk_size
    kinds = {layer.attention for layer in config.layers}
    return Tokens(
        where,
        split,
        {kind: rotation(at, frequencies) for kind, at in origins.items() if kind in kinds},
        temperature(config.attention.temperature, positions)[:, :, None, None],
    )


def temperature(config: Temperature | None, positions: Int[Array, "b t"]) -> Float32[Array, "b t"]:
    """1 + scale · ln(⌊(p + 1) / floor⌋ + 1), in float32 from exact integers; 1 without a config."""
    if config is None:
        return jnp.ones(positions.shape, jnp.float32)
    # Padding before a row has negative positions: a logarithm there would be NaN, and spread.
    steps = jnp.maximum(positions + 1, 0) // config.floor
    return 1 + config.scale * jnp.log1p(steps.astype(jnp.float32))


class Attention(nnx.Module):
    """Grouped-query attention of one layer kind."""

    def __init__(self, config: TextConfig, kind: AttentionKind, *, rngs: nnx.Rngs) -> None:
        d, a = config.embed_dim, config.attention
        n, k, h = a.num_heads, a.num_kv_heads, a.head_dim
        self.q = weight(rngs, (d, n, h), ("embed", "heads", "head_dim"), fan_in=d)
        self.k = weight(rngs, (d, k, h), ("embed", "kv_heads", "head_dim"), fan_in=d)
        self.v = weight(rngs, (d, k, h), ("embed", "kv_heads", "head_dim"), fan_in=d)
        self.o = weight(rngs, (n, h, d), ("heads", "head_dim", "embed"), fan_in=n * h)
        self.kind = kind
        self.config: AttentionConfig = a
        self.eps = config.norm_eps

    def __call__(
        self,
        x: Float[Array, "b t d"],
        tokens: Tokens,
        cache: KeyValues | None = None,
        step: Step | None = None,
        layer: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b t d"], KeyValues | None]:
        """The layer's output, and its cache with the new tokens if it has one.

        With `layer`, `cache` holds several layers' and that one is this layer's.
        """
        q, new = self._project(x, tokens)
        chunk = self.config.chunk_size if self.kind == "chunked" else None
        if cache is None or step is None:
            out = _uncached(q, new, tokens, chunk)
        elif step.fresh:
            out = _uncached(q, new, tokens, chunk)
            whole = new if tokens.split is None else jax.tree.map(tokens.split.whole, new)
            cache = write(cache, whole, step.lengths, step.counts, step.slots, layer)
        else:
            out, cache = _cached(q, new, cache, step, chunk, layer)
        axes = sharding.apart(self.o, x)
        o = read(self.o, x.dtype, whole=not axes)
        out = sharding.gather(out.reshape(*x.shape[:2], -1), 0, *axes)
        # Two-dimensional products: XLA copies a three-dimensional weight first on CPU.
        out = sharding.exchange(out @ o.reshape(-1, o.shape[-1]), 0, 2, *axes)
        return total(out, "tensor"), cache

    def _project(
        self, x: Float[Array, "b t d"], tokens: Tokens
    ) -> tuple[Float[Array, "b t n h"], KeyValues]:
        """Queries, scaled, and keys and values, as the softmax wants them."""
        n = self.q.shape[-2]
        heads, v = jnp.split(self._heads(x), (n + self.k.shape[-2],), axis=2)
        scale = self.config.head_dim**-0.5
        if self.kind == "global":
            scale = scale * tokens.temperature
        else:
            heads = rotate(heads, tokens.rotations[self.kind])
        q, k = jnp.split(heads, (n,), axis=2)
        if self.kind != "global" and self.config.qk_norm:
            q, k = (normalize(y, eps=self.eps) for y in (q, k))
        q = (q.astype(jnp.float32) * scale).astype(x.dtype)
        return q, KeyValues(k, v)

    def _heads(self, x: Float[Array, "b t d"]) -> Float[Array, "b t m h"]:
        """The m = n + 2k heads of queries, keys and values, as the weights give them."""
        weights: tuple[nnx.Param, ...] = self.q, self.k, self.v
        axes = sharding.apart(self.q, x)
        if not axes and many_rows(x) and all(isinstance(w[...], jax.Array) for w in weights):
            # One gather and one product for many rows; for few, weights are not worth copying.
            joined = jnp.concatenate([w[...] for w in weights], 1)
            weights = (nnx.Param(joined, axes=sharding.param_axes(self.q)),)
        parts = [read(w, x.dtype, whole=not axes) for w in weights]
        rows = sharding.exchange(x, 2, 0, *axes)
        products = [sharding.scatter(rows @ w.reshape(w.shape[0], -1), 0, *axes) for w in parts]
        # In x's type as the products leave them: XLA would write them in float32 to be rotated.
        heads = jnp.concatenate(products, -1).reshape(*x.shape[:2], -1, self.q.shape[-1])
        return jax.lax.optimization_barrier(heads)


def _uncached(
    q: Float[Array, "b t n h"], new: KeyValues, tokens: Tokens, chunk: int | None
) -> Float[Array, "b t n h"]:
    """Attention of the tokens to each other, wherever their sequence lies."""
    split, where = tokens.split, tokens.where
    if split is None or (chunk is not None and where is None and split.piece % chunk == 0):
        return self_attention(q, *new, where, chunk=chunk)
    # Grouped queries make keys and values small beside the queries, which stay where they are.
    k, v = (split.whole(x) for x in new)
    both = None if where is None else (where, jax.tree.map(split.whole, where))
    shard = sharding.index("context")
    return part_attention(q, k, v, (split.rows, shard), both, chunk=chunk)


def _cached(  # noqa: PLR0913 - a layer's tokens and cache, and what it is
    q: Float[Array, "b t n h"],
    new: KeyValues,
    cache: KeyValues,
    step: Step,
    chunk: int | None,
    layer: Int[Array, ""] | None,
) -> tuple[Float[Array, "b t n h"], KeyValues]:
    """Attention to what the cache holds and to the new tokens, and the cache with them."""
    t, slots = q.shape[1], step.slots
    updated = write(cache, new, step.lengths, step.counts, slots, layer)
    if t == 1:
        # In a ring of one chunk, what the chunk holds are the first slots; so it is without a ring.
        seen = slots.here(step.lengths % slots.of(cache) + 1, cache)
        return cached_attention(q, *updated, seen, layer=layer, axes=slots.axes), updated
    at = Where(step.lengths[:, None] + jnp.arange(t, dtype=jnp.int32))
    mine = cache if layer is None else KeyValues(cache.k[layer], cache.v[layer])
    old = KeyValues(*(slots.whole(x) for x in mine))
    keys, values = (
        jnp.concatenate([x.astype(y.dtype), y], axis=1) for x, y in zip(old, new, strict=True)
    )
    there = Where(jnp.concatenate([held(step.lengths, old.k.shape[1]), at.positions], axis=1))
    return cross_attention(q, keys, values, at, there, chunk=chunk), updated
