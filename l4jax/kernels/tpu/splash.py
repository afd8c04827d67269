"""Block-sparse flash attention on TPU: JAX's splash kernels behind tables of our own.

The kernels (`jax.experimental.pallas.ops.tpu.splash_attention`) walk a table that names, for every
block of queries, the blocks of keys worth reading. JAX's own tables come from evaluating the mask
block by block in NumPy, which takes minutes at 100,000 tokens, and hold one order of queries per
program. Here a query's visible keys are always one stretch, from the start of its chunk (or `back`
rows before it) to itself, so the tables follow from two numbers per query; and one program holds
the tables of all context shards and picks its own by number.

Blocks that are wholly invisible are neither read nor computed. Which pairs inside a block are
visible is computed in the kernel, so no mask lies in memory.

Letters: see `models.layers`; c context shards, i and j block numbers of queries and keys.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, SegmentIds
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    DEFAULT_MASK_VALUE,
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Float, Int

from l4jax.kernels.attention import SAVED

BLOCK = 1024
"""Most queries, and most keys, of a block: longer ones waste more on the diagonal."""
LONG = 32 * 1024
"""Visible rows from which blocks of keys are twice as wide."""
PRODUCT = 512
"""Most keys of one product within a block; scores of 1024 by 512 fit the default 16 MiB of VMEM."""
LANES = 128
"""Blocks are multiples of this."""
FUSED_SHARE = 0.25
"""Least visible share of all blocks for which the fused backward kernel is used.

It forms 5 products per visible block instead of 7, but writes the queries' gradients once for every
block of keys, visible or not. With 1024 keys a block and products at 60 % of peak, the two saved
take as long as that traffic when a tenth (v5p) to a third (v6e) of the blocks is visible.
"""
PARTIAL_BYTES = 2**30
"""Memory for those partial gradients; key heads beyond it are computed one group after another.

Where one key head's are larger, the other kernels are used.
"""


class Rows(NamedTuple):
    """Which rows of the key sequence the queries are, on every context shard.

    layout: row c is shard c's, a constant. shard: which one is ours.
    """

    layout: np.ndarray
    shard: Int[Array, ""] | int = 0


def splash_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    chunk: int | None = None,
    back: int | None = None,
    groups: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None = None,
    rows: Rows | None = None,
    interpret: bool = False,
) -> Float[Array, "b t n h"]:
    """Attention of queries, already scaled, to keys of the same sequence.

    A query of row r sees the keys of rows j <= r that lie in the same chunk, at most `back` rows
    before it, and in the same group: `groups` are those of the queries and of the keys.

    Without `rows`, queries are rows 0, 1, …, t-1 and t = s.
    """
    b, t = q.shape[:2]
    if rows is None and chunk is not None and chunk < t and not (t % chunk or chunk % LANES):
        # Whole chunks become rows of the batch: all their blocks are near the diagonal, so that
        # the fused backward kernel pays.
        def fold(x: Array) -> Array:
            return x.reshape(b * (t // chunk), chunk, *x.shape[2:])

        q, k, v, groups = jax.tree.map(fold, (q, k, v, groups))
        out = splash_attention(q, k, v, back=back, groups=groups, interpret=interpret)
        return out.reshape(b, t, *out.shape[2:])
    if rows is None:
        rows = Rows(np.arange(t)[None])
    # A bound that nothing meets is none: chunked and global layers then are one compiled kernel.
    s = k.shape[1]
    stretch = _Stretch(
        None if chunk is None or chunk >= s else chunk,
        None if back is None or back >= s - 1 else back,
    )
    row_bytes = q.shape[2] // k.shape[2] * q.shape[3] * q.dtype.itemsize
    plan = _Plan.of(rows.layout, s, stretch, row_bytes=row_bytes)
    return _by_heads(plan, q, k, v, groups, plan.kernel(rows.shard, interpret=interpret))


def _by_heads(
    plan: _Plan,
    q: Array,
    k: Array,
    v: Array,
    groups: tuple[Array, Array] | None,
    kernel: SplashAttentionKernel,
) -> Array:
    """`kernel` for every key head and the queries that share it.

    The key heads are a mapped dimension, not one of the kernel's: only mapped dimensions are split
    between the two cores of a v5p chip in the backward kernels.
    """
    b, t, n, h = q.shape
    kv = k.shape[2]

    def heads(x: Array, length: int) -> Array:
        """[b t k … h] → [b·k … length h]."""
        x = jnp.moveaxis(x, 1, -2)
        x = jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, length - x.shape[-2]), (0, 0)))
        return x.reshape(b * kv, *x.shape[2:])

    def segments(ids: Array, length: int) -> Array:
        """[b t] → [b·k length]; as with rows, what is added repeats the last query."""
        ids = jnp.pad(ids, ((0, 0), (0, length - ids.shape[1])), mode="edge")
        return jnp.repeat(ids, kv, axis=0)

    ids = groups and SegmentIds(segments(groups[0], plan.t), segments(groups[1], plan.s))
    args = heads(q.reshape(b, t, kv, n // kv, h), plan.t), heads(k, plan.s), heads(v, plan.s), ids
    together = _divisor(b * kv, PARTIAL_BYTES // max(plan.partial_bytes, 1))
    out = jax.lax.map(lambda x: kernel(*x), args, batch_size=together)
    return jnp.moveaxis(out.reshape(b, n, plan.t, h)[:, :, :t], 1, 2)


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` up to `most`, or its least above 1: both cores want work."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return max([d for d in divisors if d <= most] + divisors[:2])


@dataclasses.dataclass(frozen=True)
class _Stretch:
    """The rows a query sees: equal ones are one compiled kernel."""

    chunk: int | None
    back: int | None

    def longest(self, s: int) -> int:
        """The most rows that any sees, of s."""
        return min(x for x in (s, self.chunk, self.back and self.back + 1) if x is not None)

    def first(self, rows: np.ndarray) -> np.ndarray:
        """The first row that each sees."""
        start = np.zeros_like(rows) if self.chunk is None else rows - rows % self.chunk
        return start if self.back is None else np.maximum(start, rows - self.back)

    def __call__(self, r: Array, j: Array) -> Array:
        """Whether row r sees row j; on int32 vectors, in the kernel."""
        seen = j <= r
        if self.chunk is not None:
            # Integer division is slow on a TPU's vector unit, and model chunks are powers of 2.
            power = self.chunk & (self.chunk - 1) == 0
            seen &= j >= (r & -self.chunk if power else r - jax.lax.rem(r, self.chunk))
        if self.back is not None:
            seen &= j >= r - self.back
        return seen


class _Table(NamedTuple):
    """For every shard, which blocks to compute (1) and which to have in memory meanwhile.

    A block that is not computed names the next that is, so that reading it begins early.
    """

    computed: np.ndarray
    block: np.ndarray

    @classmethod
    def of(cls, seen: np.ndarray, *, axis: int) -> _Table:
        """From seen [c i j], naming blocks along `axis`."""
        seen = np.moveaxis(seen, axis, -1)
        size = seen.shape[-1]
        numbers = np.where(seen, np.arange(size), size)
        following = np.minimum.accumulate(numbers[..., ::-1], axis=-1)[..., ::-1]
        last = np.where(seen, np.arange(size), 0).max(-1, keepdims=True)
        return cls(*(np.moveaxis(x, -1, axis) for x in (seen, np.minimum(following, last))))

    def shrunk(self, *, axis: int) -> _Table:
        """As short along `axis` as the most blocks in a line allow; idle ones first."""
        width = self.computed.sum(axis).max()
        order = np.argsort(self.computed, axis=axis, kind="stable")
        order = np.take(order, range(order.shape[axis] - width, order.shape[axis]), axis)
        computed, block = (np.take_along_axis(x, order, axis) for x in self)
        # An idle entry in front waits for the first computed block, which follows it.
        first = np.take_along_axis(block, np.argmax(computed, axis, keepdims=True), axis)
        return _Table(computed, np.where(computed, block, first))

    def info(self, rows: np.ndarray, shard: Array | int) -> MaskInfo:
        """What the kernel wants to know, of one shard."""

        def mine(table: np.ndarray) -> Array:
            x = jnp.asarray(table, jnp.int32)
            return x[0] if x.shape[0] == 1 else jax.lax.dynamic_index_in_dim(x, shard, 0, False)

        return MaskInfo(
            data_next=mine(self.block)[None],
            mask_next=None,
            block_mask=mine(self.computed)[None],
            partial_mask_blocks=None,
            q_sequence=cast(np.ndarray, mine(rows)),  # JAX's hint says constants only
        )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Blocks, and what is visible in each.

    rows [c t]: the layout, lengthened to t. s: keys, lengthened. partial_bytes: what the fused
    backward kernel writes of partial gradients per key head; 0 where the other kernels are used.
    blocks: queries and keys of one. product: keys of one product. seen [c i j].
    """

    stretch: _Stretch
    rows: np.ndarray
    s: int
    partial_bytes: int
    blocks: tuple[int, int]
    product: int
    seen: np.ndarray

    @property
    def t(self) -> int:
        """Queries, lengthened."""
        return self.rows.shape[1]

    @classmethod
    def of(cls, layout: np.ndarray, s: int, stretch: _Stretch, *, row_bytes: int) -> _Plan:
        """For the queries of `layout`, whose heads per key head fill `row_bytes`, and s keys."""
        if layout.min() < 0 or layout.max() >= s:
            raise ValueError(
                f"layout has rows {layout.min()} to {layout.max()}, the keys are rows 0 to {s - 1}"
            )
        c, t = layout.shape
        queries = _even(t, BLOCK)
        product = _even(s, PRODUCT)
        # Wide blocks of keys mean fewer partial gradients, and more waste on the diagonal.
        most = 2 * BLOCK if stretch.longest(s) >= LONG else BLOCK
        keys = product * max(1, min(most // product, -(-s // product)))
        blocks = -(-t // queries), -(-s // keys)
        # Added queries repeat the last one's row, so that they see a key and divide by no 0. Added
        # keys come after every query and are seen by none.
        rows = np.pad(layout, ((0, 0), (0, blocks[0] * queries - t)), mode="edge")
        # +1 where a query's stretch begins, -1 past its end; the sum counts those inside it.
        counts = np.zeros((c, blocks[0], blocks[1] + 1), np.int32)
        at = np.arange(c)[:, None], np.arange(rows.shape[1])[None] // queries
        np.add.at(counts, (*at, stretch.first(rows) // keys), 1)
        np.add.at(counts, (*at, rows // keys + 1), -1)
        seen = counts.cumsum(-1)[..., :-1] > 0
        partial = blocks[1] * rows.shape[1] * row_bytes
        if seen.mean() < FUSED_SHARE or partial > PARTIAL_BYTES:
            partial = 0
        return cls(stretch, rows, blocks[1] * keys, partial, (queries, keys), product, seen)

    def kernel(self, shard: Array | int, *, interpret: bool) -> SplashAttentionKernel:
        """Attention of q [g t h] to k and v [s h], both lengthened."""
        queries, keys = self.blocks
        fused = self.partial_bytes > 0
        sizes = BlockSizes(
            block_q=queries,
            block_kv=keys,
            block_kv_compute=self.product,
            block_q_dkv=queries,
            block_kv_dkv=keys,
            block_kv_dkv_compute=self.product,
            block_q_dq=None if fused else queries,
            block_kv_dq=None if fused else keys,
            use_fused_bwd_kernel=fused,
        )
        along_keys = _Table.of(self.seen, axis=2).shrunk(axis=2).info(self.rows, shard)
        along_queries = _Table.of(self.seen, axis=1)
        # The fused kernel writes a partial gradient for every pair of blocks.
        along_queries = along_queries if fused else along_queries.shrunk(axis=1)
        return SplashAttentionKernel(
            along_keys,
            None if fused else along_keys,
            along_queries.info(self.rows, shard),
            block_sizes=sizes,
            is_mqa=True,
            save_residuals=False,
            mask_value=DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=SAVED,
            mask_function=self.stretch,
            interpret=interpret,
        )


def _even(length: int, most: int) -> int:
    """Width of the fewest equal blocks that cover `length`, none wider than `most`."""
    blocks = -(-length // most)
    return math.ceil(length / blocks / LANES) * LANES
