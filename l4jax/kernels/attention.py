"""Causal attention within segments and chunks, never O(T²) in memory.

A query sees a key when the key's position is not after its own, both lie in the same segment, and,
given a chunk size, both positions lie in the same chunk. Up to `DENSE` keys the scores are formed
at once; beyond, block by block with a running softmax (Milakov & Gimelshein 2018; Dao 2022). Small
chunks are folded into the batch instead. Only blocks that can hold a visible key are computed,
forward and backward.

Letters: see `models.layers`; w block width, i and j block numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int

from l4jax import sharding
from l4jax.kernels import on_tpu

DENSE = 1024
"""Longest key sequence whose scores are formed at once."""
STRIP = 128
"""Queries that are formed at once with the keys before them, where rows start at position 0."""
BLOCK = 512
"""Width of the blocks beyond that."""
_HIDDEN = -1e30
"""Score of an invisible key; finite, so that a row without any visible key stays finite."""
SAVED = "attention"
"""Name, for `jax.checkpoint` policies, of the output and the log-sums its backward pass needs."""


class Where(NamedTuple):
    """Where tokens stand.

    positions: absolute, growing by one along each segment; negative marks an empty key.
    segments: tokens of different segments do not see each other; None for one segment per row.
    """

    positions: Int[Array, "b t"]
    segments: Int[Array, "b t"] | None = None


def self_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    where: Where | None = None,
    *,
    chunk: int | None = None,
) -> Float[Array, "b t n h"]:
    """Attention of a sequence to itself; queries are already scaled.

    Without `where` the positions are 0, 1, …, t-1 in every row, so chunks lie at multiples of
    `chunk` and are folded into the batch. With it, positions may restart anywhere; every visible
    key is less than `chunk` tokens back. Either way chunks cost O(t·chunk).
    """
    b, t = q.shape[:2]
    if sharding.platform() == "tpu" and t > 1:
        return _splash(q, k, v, where, chunk, None)
    if where is None:
        if chunk is not None and chunk < t:
            return _fold(q, k, v, chunk)
        where = Where(jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t)))
        if t <= DENSE:
            return _triangle(q, k, v, where.positions)
    if chunk is not None and chunk < t and 2 * chunk <= DENSE:
        return _pairs(q, k, v, where, chunk)
    return _blockwise(q, k, v, (where, where), jnp.arange(t, dtype=jnp.int32), chunk)


def cross_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    queries: Where,
    keys: Where,
    *,
    chunk: int | None = None,
) -> Float[Array, "b t n h"]:
    """Attention to keys in any order, such as a cache's; scores of all pairs are formed at once."""
    b, t, n, h = q.shape
    grouped = q.reshape(b, t, k.shape[2], -1, h)
    scores = _scores(grouped, k, _ranks(queries, chunk), _ranks(keys, chunk))
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(b, t, n, h)


def part_attention(  # noqa: PLR0913 - a sequence, the part of it, and what is visible
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    rows: tuple[np.ndarray, Array | int],
    where: tuple[Where, Where] | None = None,
    *,
    chunk: int | None = None,
) -> Float[Array, "b t n h"]:
    """Attention of some rows of a sequence to all of it; queries are already scaled.

    Args:
        q: of these rows.
        k: of all rows, in order.
        v: as k.
        rows: Int[c t], the row numbers in each of c parts, and the number of this part.
        where: of the queries and of the keys; None if every row is one segment from position 0.
        chunk: as for `self_attention`.
    """
    parts, part = rows
    b, s = k.shape[:2]
    if sharding.platform() == "tpu":
        return _splash(q, k, v, where and where[1], chunk, on_tpu("splash").Rows(parts, part))
    mine = jnp.asarray(parts)[part]
    if where is None:
        everyone = jnp.arange(s, dtype=jnp.int32)
        at, to = (Where(jnp.broadcast_to(x, (b, len(x)))) for x in (mine, everyone))
        where = at, to
    return _blockwise(q, k, v, where, mine, chunk)


def cached_attention(
    q: Float[Array, "b 1 n h"],
    k: Float[Array, "*l b s k h"],
    v: Float[Array, "*l b s k h"],
    counts: Int[Array, " b"],
    *,
    layer: Int[Array, ""] | None = None,
    axes: tuple[str, ...] = (),
) -> Float[Array, "b 1 n h"]:
    """Attention of one token per row to the first `counts` slots of its cache.

    Args:
        q: queries, already scaled.
        k: of the cache, or with `layer` those of several layers.
        v: as k.
        counts: how many slots of each row count.
        layer: which one it is.
        axes: mesh axes that the slots are cut over; k, v and counts are then this shard's.
    """
    if sharding.platform() == "tpu":
        out, log_total = on_tpu("decode").decode_attention(q[:, 0], k, v, counts, layer=layer)
    else:
        if layer is not None:
            k, v = k[layer], v[layer]
        out, log_total = decode_reference(q[:, 0], k, v, counts)
    here = sharding.live(*axes)
    if here:
        weight = jnp.exp(log_total - jax.lax.pmax(log_total, here))[..., None]
        total = jax.lax.psum(weight, here)
        out = jax.lax.psum(out.astype(jnp.float32) * weight, here) / total
    return out[:, None].astype(q.dtype)


def decode_reference(
    q: Float[Array, "b n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    counts: Int[Array, " b"],
) -> tuple[Float[Array, "b n h"], Float32[Array, "b n"]]:
    """Attention to the first `counts` slots, and the logarithm of its softmax's denominator.

    Without any slot they are 0 and the least score.
    """
    b, n, h = q.shape
    grouped = q.reshape(b, k.shape[2], -1, h)
    scores = jnp.einsum("bkgh,bskh->bkgs", grouped, k, preferred_element_type=jnp.float32)
    seen = (jnp.arange(k.shape[1]) < counts[:, None])[:, None, None]
    scores = jnp.where(seen, scores, _HIDDEN)
    log_total = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(seen, jnp.exp(scores - log_total[..., None]), 0)
    out = jnp.einsum("bkgs,bskh->bkgh", weights.astype(v.dtype), v)
    return out.reshape(b, n, h), jnp.where(counts[:, None], log_total.reshape(b, n), _HIDDEN)


def _splash(
    q: Array, k: Array, v: Array, keys: Where | None, chunk: int | None, rows: Any
) -> Array:
    """The TPU kernel, which knows rows and groups, but no positions."""
    splash_attention = on_tpu("splash").splash_attention
    if keys is None:
        return splash_attention(q, k, v, chunk=chunk, rows=rows)
    of_keys = _groups(keys, chunk)
    of_queries = of_keys if rows is None else of_keys[:, jnp.asarray(rows.layout)[rows.shard]]
    back = None if chunk is None else chunk - 1
    return splash_attention(q, k, v, back=back, groups=(of_queries, of_keys), rows=rows)


def _groups(where: Where, chunk: int | None) -> Int[Array, "b t"]:
    """Numbers that are equal where segment and chunk are; -1 for empty keys.

    Positions grow by one along a segment: there, the order of rows is the order of positions.
    """
    chunks = jnp.zeros_like(where.positions) if chunk is None else where.positions // chunk
    if where.segments is None:
        return jnp.where(where.positions < 0, -1, chunks)
    # Chunk numbers may be large, so pairs are told apart by counting where they change.
    changed = (jnp.diff(where.segments, axis=1) != 0) | (jnp.diff(chunks, axis=1) != 0)
    numbers = jnp.cumsum(jnp.pad(changed, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)
    return jnp.where(where.positions < 0, -1, numbers)


class _Ranks(NamedTuple):
    """What decides visibility: equal groups, and a key no later than its query."""

    positions: Int[Array, "*i b t"]
    groups: Int[Array, "*i b t 2"]


def _ranks(where: Where, chunk: int | None) -> _Ranks:
    """Positions, and (segment, chunk) as the group."""
    nothing = jnp.zeros_like(where.positions)
    segments = nothing if where.segments is None else where.segments
    chunks = nothing if chunk is None else where.positions // chunk
    return _Ranks(where.positions, jnp.stack([segments, chunks], -1))


def _scores(q: Array, k: Array, at: _Ranks, to: _Ranks) -> Float32[Array, "b k g t s"]:
    """Query-key products [b t k g h] · [b s k h] in float32; invisible keys at the least value."""
    seen = (to.positions[:, None] <= at.positions[:, :, None]) & (to.positions >= 0)[:, None]
    seen &= (at.groups[:, :, None] == to.groups[:, None]).all(-1)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    return jnp.where(seen[:, None, None], scores, _HIDDEN)


def _fold(
    q: Float[Array, "b t n h"], k: Float[Array, "b t k h"], v: Float[Array, "b t k h"], chunk: int
) -> Float[Array, "b t n h"]:
    """Chunked attention of rows that start at position 0: every chunk becomes a row."""
    b, t = q.shape[:2]
    q, k, v = (_cut(x, chunk).reshape(-1, chunk, *x.shape[2:]) for x in (q, k, v))
    return self_attention(q, k, v).reshape(b, -1, *q.shape[2:])[:, :t]


def _cut(x: Array, width: int, fill: int = 0) -> Array:
    """[b t …] → [b blocks w …], padded at the end."""
    padding = ((0, 0), (0, -x.shape[1] % width)) + ((0, 0),) * (x.ndim - 2)
    x = jnp.pad(x, padding, constant_values=fill)
    return x.reshape(x.shape[0], -1, width, *x.shape[2:])


def _pairs(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    where: Where,
    chunk: int,
) -> Float[Array, "b t n h"]:
    """Chunked attention from any positions: `chunk` queries meet theirs and the `chunk` before."""
    b, t = q.shape[:2]

    def fold(x: Array, fill: int = 0, *, before: bool = False) -> Array:
        """[b t …] → [b·blocks c …], or with the block before [b·blocks 2·c …]."""
        x = _cut(x, chunk, fill)
        if before:
            shifted = jnp.concatenate([jnp.full_like(x[:, :1], fill), x[:, :-1]], axis=1)
            x = jnp.concatenate([shifted, x], axis=2)
        return x.reshape(-1, *x.shape[2:])

    def place(*, before: bool) -> Where:
        segments = None if where.segments is None else fold(where.segments, before=before)
        return Where(fold(where.positions, -1, before=before), segments)

    k, v = fold(k, before=True), fold(v, before=True)
    out = cross_attention(fold(q), k, v, place(before=False), place(before=True), chunk=chunk)
    return out.reshape(b, -1, *q.shape[2:])[:, :t]


def _triangle(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    positions: Int[Array, "b t"],
) -> Float[Array, "b t n h"]:
    """Plain causal attention, each strip of queries meeting only the keys up to its own end."""
    t, out = q.shape[1], []
    for start in range(0, t, STRIP):
        end = min(start + STRIP, t)
        at, to = Where(positions[:, start:end]), Where(positions[:, :end])
        out.append(cross_attention(q[:, start:end], k[:, :end], v[:, :end], at, to))
    return jnp.concatenate(out, axis=1)


def _blockwise(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    where: tuple[Where, Where],
    rows: Int[Array, " t"],
    chunk: int | None,
) -> Float[Array, "b t n h"]:
    """Attention by where queries and keys stand, block by block where there are many keys.

    A query in row r sees no key after row r, and none a chunk or more before it.
    """
    (b, t, n, h), (s, kv) = q.shape, k.shape[1:3]
    if s <= DENSE:
        return cross_attention(q, k, v, *where, chunk=chunk)
    back = s if chunk is None else min(chunk, s) - 1

    def cut(x: Array, fill: int = 0) -> Array:
        """[b t …] → [blocks b w …]."""
        return jnp.moveaxis(_cut(x, BLOCK, fill), 1, 0)

    ranks = (_ranks(x, chunk) for x in where)
    at, to = (_Ranks(cut(r.positions, -1), cut(r.groups)) for r in ranks)
    padded = jnp.pad(rows, (0, -t % BLOCK), mode="edge").reshape(-1, BLOCK)
    # The blocks of keys that a block of queries needs: from its first row's to its last one's.
    bounds = jnp.maximum(padded.min(1) - back, 0) // BLOCK, padded.max(1) // BLOCK + 1
    out = _flash(cut(q.reshape(b, t, kv, n // kv, h)), cut(k), cut(v), at, to, bounds)
    return jnp.moveaxis(out, 0, 1).reshape(b, -1, n, h)[:, :t]


@jax.custom_vjp
def _flash(q: Array, k: Array, v: Array, at: _Ranks, to: _Ranks, bounds: tuple) -> Array:
    """Blockwise attention of q [i b w k g h] to k and v [j b w k h]; returns q's shape.

    bounds: the first block of keys of each block of queries, and one past the last.
    """
    return _flash_forward(q, k, v, at, to, bounds)[0]


def _flash_forward(
    q: Array, k: Array, v: Array, at: _Ranks, to: _Ranks, bounds: tuple
) -> tuple[Array, tuple]:
    """The output, and what the backward pass needs."""

    def query_block(args: tuple) -> tuple[Array, Array]:
        q_i, ranks_i, (first, end) = args

        def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, top, total = carry
            scores = _scores(q_i, k[j], ranks_i, jax.tree.map(lambda x: x[j], to))
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            add = jnp.einsum("bkgts,bskh->bkgth", weights.astype(v.dtype), v[j])
            out = out * shrink[..., None] + add.astype(jnp.float32)
            return out, new_top, total * shrink + weights.sum(-1)

        b, w, kv, g, h = q_i.shape
        start = (
            jnp.zeros((b, kv, g, w, h), jnp.float32),
            jnp.full((b, kv, g, w), 2 * _HIDDEN, jnp.float32),
            jnp.zeros((b, kv, g, w), jnp.float32),
        )
        out, top, total = jax.lax.fori_loop(first, end, step, start)
        normal = jnp.moveaxis(out / total[..., None], 3, 1).astype(q.dtype)
        return normal, top + jnp.log(total)

    out, log_total = jax.lax.map(query_block, (q, at, bounds))
    out, log_total = checkpoint_name(out, SAVED), checkpoint_name(log_total, SAVED)
    return out, (q, k, v, at, to, bounds, out, log_total)


def _flash_backward(saved: tuple, d_out: Array) -> tuple[Array | None, ...]:
    """Gradients of q, k and v; the weights are formed again, block by block."""
    q, k, v, at, to, bounds, out, log_total = saved
    # Σ_s weight · d_weight of each query, the softmax's correction (Dao 2022, section B.2).
    correction = jnp.einsum(
        "ibtkgh,ibtkgh->ibkgt", d_out.astype(jnp.float32), out.astype(jnp.float32)
    )

    def query_block(carry: tuple[Array, Array], args: tuple) -> tuple[tuple, Array]:
        q_i, ranks_i, (first, end), log_i, d_out_i, correction_i = args

        def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_q, d_k, d_v = carry
            scores = _scores(q_i, k[j], ranks_i, jax.tree.map(lambda x: x[j], to))
            weights = jnp.exp(scores - log_i[..., None])
            d_v_j = jnp.einsum("bkgts,btkgh->bskh", weights.astype(v.dtype), d_out_i)
            d_weights = jnp.einsum(
                "btkgh,bskh->bkgts", d_out_i, v[j], preferred_element_type=jnp.float32
            )
            d_scores = (weights * (d_weights - correction_i[..., None])).astype(q.dtype)
            d_q += jnp.einsum("bkgts,bskh->btkgh", d_scores, k[j]).astype(jnp.float32)
            d_k_j = jnp.einsum("bkgts,btkgh->bskh", d_scores, q_i)
            d_k = d_k.at[j].add(d_k_j.astype(jnp.float32))
            return d_q, d_k, d_v.at[j].add(d_v_j.astype(jnp.float32))

        start = (jnp.zeros(q_i.shape, jnp.float32), *carry)
        d_q, d_k, d_v = jax.lax.fori_loop(first, end, step, start)
        return (d_k, d_v), d_q

    zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    (d_k, d_v), d_q = jax.lax.scan(
        query_block, zeros, (q, at, bounds, log_total, d_out, correction)
    )
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None, None


_flash.defvjp(_flash_forward, _flash_backward)
