"""Attention of one query per context to its cache, on TPU: only the filled blocks are read.

The cache [b s k h] is viewed as rows [b s·k h], slot by slot, which is how it lies in a TPU's
memory for any number of heads: no copy of it is made. All query heads meet all rows of a block in
one matrix product, and the rows of other key heads are masked out. That costs nothing where it
matters: decoding waits for the cache to arrive, and the matrix unit takes as long to load a block
of keys as to pass the queries by it. The softmax is a running one in float32 (Milakov & Gimelshein
2018), over blocks (Dao et al. 2023, "Flash-Decoding").

Letters: see `models.layers`; p parallel parts, r rows.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int

ROWS = 4096
"""Most rows of a block: 1 MiB of bfloat16 keys of width 128, and of values."""
LANES = 128
SUBLANES = 16
"""Queries are padded to a multiple of this, the height of a bfloat16 tile."""
HIDDEN = -1e30
"""Score of an invisible key, and log-sum of a context without any; finite."""
Ref = Any
"""A kernel's view of an array in memory."""


class _Division(NamedTuple):
    """Who computes what: key heads, queries of each, and parts that every context is cut into.

    Part i of a context takes its blocks i, i + parts, …
    """

    heads: int
    group: int
    parts: int

    def block(self, p: Array, j: Array) -> Array:
        """The block that program p meets at step j."""
        return j * self.parts + jax.lax.rem(p, self.parts)

    def context(self, p: Array) -> Array:
        """The context of program p."""
        return jax.lax.div(p, self.parts)

    def head(self, row: Array) -> Array:
        """The key head of a row; division is slow on the vector unit, most counts powers of 2."""
        power = self.heads & (self.heads - 1) == 0
        return row & (self.heads - 1) if power else jax.lax.rem(row, self.heads)


def decode_attention(
    q: Float[Array, "b n h"],
    k: Float[Array, "*l b s k h"],
    v: Float[Array, "*l b s k h"],
    counts: Int[Array, " b"],
    *,
    layer: Int[Array, ""] | int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b n h"], Float32[Array, "b n"]]:
    """Attention of queries, already scaled, to the first `counts` slots of each context's cache.

    Returns the output and the logarithm of the softmax's denominator, by which the parts
    of a cache are combined. Without any slot they are 0 and -1e30.

    With `layer`, the caches of several layers are given and that one is read. A slice of them would
    have to be copied for the kernel, which takes longer than the attention itself.
    """
    b, s, kv, h = k.shape[-4:]
    n = q.shape[1]
    queries = jnp.pad(q.astype(k.dtype), ((0, 0), (0, -n % SUBLANES), (0, 0)))
    rows, height = s * kv, queries.shape[1]
    blocks = -(-rows // ROWS)
    block = -(-rows // (blocks * LANES)) * LANES
    # The two cores of a v5p chip divide the programs; of an odd batch, also the contexts.
    parts = 2 if b % 2 and blocks > 1 else 1
    division = _Division(heads=kv, group=n // kv, parts=parts)

    def at(p: Array, j: Array, counts: Ref, layer: Ref) -> tuple[Array, Array, Array, int]:
        # Past its last filled block a program names that one again, which reads nothing.
        context = division.context(p)
        steps = pl.cdiv(pl.cdiv(counts[context] * kv, block) - jax.lax.rem(p, parts), parts)
        block_number = division.block(p, jnp.minimum(j, jnp.maximum(steps - 1, 0)))
        return layer[0], context, block_number, 0

    def result(width: int) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
        spec = pl.BlockSpec((None, height, width), lambda p, *_: (p, 0, 0))
        return spec, jax.ShapeDtypeStruct((b * parts, height, width), jnp.float32)

    cached = pl.BlockSpec((None, None, block, h), at)
    out_specs, out_shape = zip(result(h), result(LANES), strict=True)
    out, log_total = pl.pallas_call(
        functools.partial(_kernel, division=division),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b * parts, -(-blocks // parts)),
            in_specs=[
                pl.BlockSpec((None, height, h), lambda p, *_: (division.context(p), 0, 0)),
                cached,
                cached,
            ],
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((height, LANES), jnp.float32)] * 2,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * b * height * rows * h,
            # A row takes whole tiles of memory, however few lanes it fills.
            bytes_accessed=2 * b * rows * (-(-h // LANES) * LANES) * k.dtype.itemsize,
            transcendentals=b * height * rows,
        ),
        interpret=interpret,
        name="decode_attention",
    )(
        counts,
        jnp.full(1, 0 if layer is None else layer, jnp.int32),
        queries,
        k.reshape(-1, b, rows, h),
        v.reshape(-1, b, rows, h),
    )
    out = out.reshape(b, parts, height, h)[:, :, :n]
    log_total = log_total.reshape(b, parts, height, LANES)[:, :, :n, 0]
    top = log_total.max(1)
    weights = jnp.exp(log_total - top[:, None])
    total = weights.sum(1)
    out = (out * weights[..., None]).sum(1) / total[..., None]
    return out.astype(q.dtype), top + jnp.log(total)


def _kernel(
    counts_ref: Ref,
    _: Ref,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    out_ref: Ref,
    log_ref: Ref,
    *scratch: Ref,
    division: _Division,
) -> None:
    """One block of rows: q [n h], k and v [r h]; the scratch holds running maxima and sums."""
    p, j = pl.program_id(0), pl.program_id(1)
    top_ref, total_ref = scratch
    height = k_ref.shape[0]
    first = division.block(p, j) * height
    left = counts_ref[division.context(p)] * division.heads - first

    @pl.when(j == 0)
    def start() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)
        top_ref[...] = jnp.full_like(top_ref, HIDDEN)
        total_ref[...] = jnp.zeros_like(total_ref)

    def attend(*, whole: bool) -> None:
        scores = jax.lax.dot_general(
            q_ref[...], k_ref[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        row = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        query = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        seen = division.head(first + row) == jax.lax.div(query, division.group)
        v = v_ref[...]
        if not whole:
            seen &= row < left
            # What lies past the filled slots, or past the cache's end, may be NaN.
            filled = jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) < left
            v = jnp.where(filled, v.astype(jnp.float32), 0).astype(v.dtype)
        scores = jnp.where(seen, scores, HIDDEN)
        old = top_ref[:, :1]
        top = jnp.maximum(old, scores.max(1, keepdims=True))
        weights = jnp.exp(scores - top)
        shrink = jnp.exp(old - top)
        out_ref[...] = out_ref[...] * shrink + jnp.dot(
            weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        total = total_ref[:, :1] * shrink + weights.sum(1, keepdims=True)
        total_ref[...] = jnp.broadcast_to(total, total_ref.shape)
        top_ref[...] = jnp.broadcast_to(top, top_ref.shape)

    pl.when(left >= height)(functools.partial(attend, whole=True))
    pl.when((left > 0) & (left < height))(functools.partial(attend, whole=False))

    @pl.when(j == pl.num_programs(1) - 1)
    def finish() -> None:
        total = total_ref[...]
        some = jnp.where(total > 0, total, 1)
        out_ref[...] /= some[:, :1]
        log_ref[...] = top_ref[...] + jnp.log(some)
