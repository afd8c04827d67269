"""Every token through its own expert: SwiGLU over rows sorted by expert.

One entry point, `grouped_swiglu`, with three implementations that agree:

- "masked": every expert on every row, the others' rows masked out. The definition; cost O(rows · e).
- "ragged": `jax.lax.ragged_dot`, a native grouped matrix product on TPU (on CPU as slow as masked).
- "blocks": for CPU: experts in turn, each over as many blocks of rows as it really has.

Letters: see `models.layers`; m rows, that is tokens times experts per token.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Implementation = Literal["auto", "masked", "ragged", "blocks"]
BLOCK = 128
"""Rows per matrix product of the "blocks" implementation."""


def grouped_swiglu(
    x: Float[Array, "m d"],
    gate: Float[Array, "e d f"],
    up: Float[Array, "e d f"],
    down: Float[Array, "e f d"],
    group_sizes: Int[Array, " e"],
    *,
    implementation: Implementation = "auto",
) -> Float[Array, "m d"]:
    """down(silu(gate(x)) · up(x)) with each row's own expert.

    Rows are sorted by expert: the first `group_sizes[0]` belong to expert 0, and so on; the sizes
    add up to m. Dropless: any sizes are right, 0 among them.
    """
    if implementation == "auto":
        implementation = "blocks" if jax.default_backend() == "cpu" else "ragged"
    function = {"masked": _masked, "ragged": _ragged, "blocks": _blocks}[implementation]
    return function(x, gate, up, down, group_sizes)


def _masked(x: Array, gate: Array, up: Array, down: Array, group_sizes: Array) -> Array:
    ends = jnp.cumsum(group_sizes)
    rows = jnp.arange(x.shape[0])

    def expert(y: Array, weights: tuple[Array, ...]) -> tuple[Array, None]:
        g, u, d, end, size = weights
        mine = (rows < end) & (rows >= end - size)
        return jnp.where(mine[:, None], (jax.nn.silu(x @ g) * (x @ u)) @ d, y), None

    return jax.lax.scan(expert, jnp.zeros_like(x), (gate, up, down, ends, group_sizes))[0]


def _ragged(x: Array, gate: Array, up: Array, down: Array, group_sizes: Array) -> Array:
    hidden = jax.nn.silu(jax.lax.ragged_dot(x, gate, group_sizes))
    hidden *= jax.lax.ragged_dot(x, up, group_sizes)
    return jax.lax.ragged_dot(hidden, down, group_sizes)


@jax.custom_vjp
def _blocks(x: Array, gate: Array, up: Array, down: Array, group_sizes: Array) -> Array:
    """Loops over experts and, inside, over the blocks that hold this expert's rows.

    A block may run past its expert's last row. What it writes there is wrong, and overwritten by
    the next expert, whose rows begin there; the backward pass masks such rows out instead of
    letting them reach a weight's gradient.
    """
    return _blocks_forward(x, gate, up, down, group_sizes)[0]


def _block_plan(x: Array, group_sizes: Array) -> tuple[int, Array]:
    """Block width, no wider than x has rows, and the first row of every expert."""
    return min(BLOCK, x.shape[0]), jnp.cumsum(group_sizes) - group_sizes


def _pad(x: Array, width: int) -> Array:
    """`x` with a block of zeros below, so that the last block's slice stays inside."""
    return jnp.pad(x, ((0, width), (0, 0)))


def _blocks_forward(
    x: Array, gate: Array, up: Array, down: Array, group_sizes: Array
) -> tuple[Array, tuple[Array, ...]]:
    """The output, and what the backward pass needs: the inputs and both projections."""
    width, starts = _block_plan(x, group_sizes)
    padded = _pad(x, width)

    def expert(carry: tuple, args: tuple) -> tuple[tuple, None]:
        g, u, d, start, size = args

        def block(j: Array, carry: tuple) -> tuple:
            row = start + j * width
            x_j = jax.lax.dynamic_slice_in_dim(padded, row, width)
            gated, lifted = x_j @ g, x_j @ u
            new = gated, lifted, (jax.nn.silu(gated) * lifted) @ d
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(old, value, row, 0)
                for old, value in zip(carry, new, strict=True)
            )

        return jax.lax.fori_loop(0, -(-size // width), block, carry), None

    rows, f = padded.shape[0], gate.shape[2]
    carry = (*(jnp.zeros((rows, f), x.dtype) for _ in range(2)), jnp.zeros_like(padded))
    (gated, lifted, y), _ = jax.lax.scan(expert, carry, (gate, up, down, starts, group_sizes))
    return y[: x.shape[0]], (x, gate, up, down, group_sizes, gated, lifted)


def _blocks_backward(saved: tuple[Array, ...], d_y: Array) -> tuple[Array | None, ...]:
    """Gradients of x and of the three weights."""
    x, gate, up, down, group_sizes, gated, lifted = saved
    width, starts = _block_plan(x, group_sizes)
    padded, d_y = _pad(x, width), _pad(d_y, width)

    def expert(d_x: Array, args: tuple) -> tuple[Array, tuple[Array, ...]]:
        g, u, d, start, size = args

        def block(j: Array, carry: tuple) -> tuple:
            d_x, d_g, d_u, d_d = carry
            row = start + j * width
            x_j, d_y_j, gated_j, lifted_j = (
                jax.lax.dynamic_slice_in_dim(a, row, width) for a in (padded, d_y, gated, lifted)
            )
            mine = (j * width + jnp.arange(width) < size)[:, None]
            d_y_j = jnp.where(mine, d_y_j, 0)
            activated, silu_vjp = jax.vjp(jax.nn.silu, gated_j)
            d_hidden = d_y_j @ d.T
            (d_gated,) = silu_vjp(d_hidden * lifted_j)
            d_lifted = d_hidden * activated
            d_x_j = d_gated @ g.T + d_lifted @ u.T
            return (
                jax.lax.dynamic_update_slice_in_dim(d_x, d_x_j, row, 0),
                d_g + _outer(x_j, d_gated),
                d_u + _outer(x_j, d_lifted),
                d_d + _outer(activated * lifted_j, d_y_j),
            )

        zeros = tuple(jnp.zeros(w.shape, jnp.float32) for w in (g, u, d))
        d_x, *d_weights = jax.lax.fori_loop(0, -(-size // width), block, (d_x, *zeros))
        return d_x, tuple(w.astype(x.dtype) for w in d_weights)

    d_x, (d_gate, d_up, d_down) = jax.lax.scan(
        expert, jnp.zeros_like(padded), (gate, up, down, starts, group_sizes)
    )
    return d_x[: x.shape[0]], d_gate, d_up, d_down, None


def _outer(x: Array, y: Array) -> Array:
    """Σ over rows of x ⊗ y, in float32."""
    return jnp.einsum("md,mf->df", x, y, preferred_element_type=jnp.float32)


_blocks.defvjp(_blocks_forward, _blocks_backward)
