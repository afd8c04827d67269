"""Every token through its own expert: SwiGLU over rows sorted by expert.

One entry point, `grouped_swiglu`, with three implementations that agree:

- "ragged": `jax.lax.ragged_dot`; for GPUs, and wherever d is cut (on CPU O(rows · e)).
- "tpu": the grouped products of `kernels.tpu.grouped`.
- "blocks": for CPU: one loop over the blocks of rows that the experts really have, so that an
  expert without rows is not even read. From one row (decoding) to thousands (training).

Letters: see `models.layers`; m rows, that is tokens times experts per token.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from l4jax import sharding
from l4jax.kernels import on_tpu

Implementation = Literal["auto", "ragged", "tpu", "blocks"]
_FASTEST: dict[str, Implementation] = {"cpu": "blocks", "tpu": "tpu"}
BLOCK = 128
"""Most rows per matrix product of the "blocks" implementation."""


def grouped_swiglu(
    x: Float[Array, "m d"],
    gate: Float[Array, "e d f"],
    up: Float[Array, "e d f"],
    down: Float[Array, "e f d"],
    group_sizes: Int[Array, " e"],
    *,
    implementation: Implementation = "auto",
    axes: tuple[str, ...] = (),
) -> Float[Array, "m d"]:
    """down(silu(gate(x)) · up(x)) with each row's own expert.

    Rows are sorted by expert: the first `group_sizes[0]` belong to expert 0, and so on. Dropless:
    any sizes are right, 0 among them. They add up to m or less; the rows behind give 0.

    With `axes`, x and the weights have their part of d along them, and products sum over them.
    """
    if implementation == "auto":
        implementation = _FASTEST.get(sharding.platform(), "ragged")
    if axes or implementation == "ragged":
        tpu = implementation == "tpu"
        product = on_tpu("grouped").grouped_matmul if tpu else jax.lax.ragged_dot
        gated, lifted = (sharding.total(product(x, w, group_sizes), *axes) for w in (gate, up))
        return product(jax.nn.silu(gated) * lifted, down, group_sizes)
    swiglu = on_tpu("grouped").grouped_swiglu_tpu if implementation == "tpu" else _blocks
    y: Array = swiglu(x, gate, up, down, group_sizes)
    return y


@jax.custom_vjp
def _blocks(x: Array, gate: Array, up: Array, down: Array, group_sizes: Array) -> Array:
    """Loops over blocks of rows, each of one expert, whose weights it takes by number.

    A block may run past its expert's last row. What it writes there is wrong, and overwritten by
    the next block, whose rows begin there; the backward pass masks such rows out instead of
    letting them reach a weight's gradient.
    """
    return _blocks_forward(x, gate, up, down, group_sizes)[0]


class _Plan(NamedTuple):
    """Which rows each block covers; `width` rows from `first[e] + (j - blocks_before[e]) · width`.

    width: no more than x has rows, and about twice an even share, so that few rows are wasted when
    there are fewer rows than experts. last: one past each expert's last row. blocks_upto: blocks of
    each expert and those before it.
    """

    width: int
    first: Array
    last: Array
    blocks_before: Array
    blocks_upto: Array

    @classmethod
    def of(cls, x: Array, group_sizes: Array) -> _Plan:
        """For the rows of x."""
        m, e = x.shape[0], group_sizes.shape[0]
        share = max(1, 2 * m // e)
        width = min(BLOCK, 2 ** (share - 1).bit_length(), m)
        last = jnp.cumsum(group_sizes)
        blocks = -(-group_sizes // width)
        upto = jnp.cumsum(blocks)
        return cls(width, last - group_sizes, last, upto - blocks, upto)

    def place(self, j: Array) -> tuple[Array, Array, Array]:
        """Block j's expert, its first row, and which of its rows are the expert's own [width 1]."""
        expert = jnp.sum(self.blocks_upto <= j)
        row = self.first[expert] + (j - self.blocks_before[expert]) * self.width
        own = row + jnp.arange(self.width) < self.last[expert]
        return expert, row, own[:, None]

    def pad(self, x: Array) -> Array:
        """`x` with a block of zeros below, so that the last block's slice stays inside."""
        return jnp.pad(x, ((0, self.width), (0, 0)))

    def cut(self, x: Array, row: Array) -> Array:
        """The block of `x` from `row` on."""
        return jax.lax.dynamic_slice_in_dim(x, row, self.width)


def _blocks_forward(
    x: Array, gate: Array, up: Array, down: Array, group_sizes: Array
) -> tuple[Array, tuple[Array, ...]]:
    """The output, and what the backward pass needs: the inputs and both projections."""
    plan = _Plan.of(x, group_sizes)
    padded = plan.pad(x)

    def block(j: Array, carry: tuple) -> tuple:
        expert, row, _ = plan.place(j)
        x_j = plan.cut(padded, row)
        gated, lifted = x_j @ gate[expert], x_j @ up[expert]
        new = gated, lifted, (jax.nn.silu(gated) * lifted) @ down[expert]
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(old, value, row, 0)
            for old, value in zip(carry, new, strict=True)
        )

    hidden = jnp.zeros((padded.shape[0], gate.shape[2]), x.dtype)
    start = hidden, hidden, jnp.zeros_like(padded)
    gated, lifted, y = jax.lax.fori_loop(0, plan.blocks_upto[-1], block, start)
    # The last block may have run past all experts' rows.
    y = jnp.where(jnp.arange(x.shape[0])[:, None] < plan.last[-1], y[: x.shape[0]], 0)
    return y, (x, gate, up, down, group_sizes, gated, lifted)


def _blocks_backward(saved: tuple[Array, ...], d_y: Array) -> tuple[Array | None, ...]:
    """Gradients of x and of the three weights; the weights' are summed in float32."""
    x, gate, up, down, group_sizes, gated, lifted = saved
    plan = _Plan.of(x, group_sizes)
    padded, d_y = plan.pad(x), plan.pad(d_y)

    def block(j: Array, carry: tuple) -> tuple:
        d_x, *d_weights = carry
        expert, row, own = plan.place(j)
        x_j, d_y_j, gated_j, lifted_j = (plan.cut(a, row) for a in (padded, d_y, gated, lifted))
        d_y_j = jnp.where(own, d_y_j, 0)
        activated, silu_vjp = jax.vjp(jax.nn.silu, gated_j)
        d_hidden = d_y_j @ down[expert].T
        (d_gated,) = silu_vjp(d_hidden * lifted_j)
        d_lifted = d_hidden * activated
        d_x_j = d_gated @ gate[expert].T + d_lifted @ up[expert].T
        add = (
            _outer(x_j, d_gated),
            _outer(x_j, d_lifted),
            _outer(activated * lifted_j, d_y_j),
        )
        return (
            jax.lax.dynamic_update_slice_in_dim(d_x, d_x_j, row, 0),
            *(w.at[expert].add(a) for w, a in zip(d_weights, add, strict=True)),
        )

    zeros = tuple(jnp.zeros(w.shape, jnp.float32) for w in (gate, up, down))
    start = jnp.zeros_like(padded), *zeros
    d_x, *d_weights = jax.lax.fori_loop(0, plan.blocks_upto[-1], block, start)
    return d_x[: x.shape[0]], *(w.astype(gate.dtype) for w in d_weights), None


def _outer(x: Array, y: Array) -> Array:
    """Σ over rows of x ⊗ y, in float32."""
    return jnp.einsum("md,mf->df", x, y, preferred_element_type=jnp.float32)


_blocks.defvjp(_blocks_forward, _blocks_backward)
