"""Cross-entropy of a linear head without its logits: some tokens at a time, gradients on the way.

At a vocabulary of 202,048, the logits of 8,192 tokens are 6.6 GB. Here only some tokens' logits
exist at once. As the loss is a weighted sum with weights known beforehand, each piece's gradients
follow from its own logits: the backward pass only scales them, and the head is multiplied three
times instead of four.

Letters: see `models.layers`; m tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from l4jax.sharding import index, live, total

PIECE_BYTES = 2**30
"""Most memory for the float32 logits of one piece."""
AXIS = "tensor"
"""The mesh axis that the vocabulary may be split over, inside `sharding.per_shard`."""


@jax.custom_vjp
def linear_cross_entropy(
    x: Float[Array, "m d"],
    head: Float[Array, "d v"],
    labels: Int[Array, " m"],
    weights: Float32[Array, " m"],
) -> Float32[Array, ""]:
    """Σ_m weight · (log Σ_v exp(x · head) - x · head[:, label]), in float32.

    Tokens of weight 0 may have any label.
    """
    return _pieces(x, head, labels, weights, gradients=False)[0]


def _forward(x: Array, head: Array, labels: Array, weights: Array) -> tuple[Array, tuple]:
    return _pieces(x, head, labels, weights, gradients=True)


def _backward(gradients: tuple[Array, Array], scale: Array) -> tuple:
    # Each shard of the vocabulary was given its share of the cotangent of a loss that all have.
    scale = total(scale, AXIS)
    d_x, d_head = (g * scale.astype(g.dtype) for g in gradients)
    return d_x, d_head, None, None


linear_cross_entropy.defvjp(_forward, _backward)


def _pieces(
    x: Array, head: Array, labels: Array, weights: Array, *, gradients: bool
) -> tuple[Array, tuple]:
    """The loss, and with `gradients` those of x and of the head, in their types."""
    m, v = x.shape[0], head.shape[1]
    # A power of two fills the tiles of a matrix unit.
    size = min(m, 2 ** max(3, (PIECE_BYTES // (4 * v)).bit_length() - 1))
    count = -(-m // size)

    def cut(x: Array) -> Array:
        padding = ((0, count * size - m),) + ((0, 0),) * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(count, size, *x.shape[1:])

    def piece(d_head: Array | None, args: tuple) -> tuple[Array | None, tuple]:
        loss, d_x, more = _piece(head, *args, gradients=gradients)
        return None if d_head is None or more is None else d_head + more, (loss, d_x)

    pieces = cut(x), cut(labels), cut(weights)
    if count == 1:
        loss, d_x, d_head = _piece(head, *(a[0] for a in pieces), gradients=gradients)
        d_x = None if d_x is None else d_x[None]
    else:
        start = jnp.zeros(head.shape, jnp.float32) if gradients else None
        d_head, (loss, d_x) = jax.lax.scan(piece, start, pieces)
    loss = jnp.sum(loss)
    if d_x is None or d_head is None:
        return loss, ()
    return loss, (d_x.reshape(-1, x.shape[1])[:m], d_head.astype(head.dtype))


def _piece(
    head: Array, x: Array, labels: Array, weights: Array, *, gradients: bool
) -> tuple[Array, Array | None, Array | None]:
    """One piece's loss; gradients of its x, and of the head in float32."""
    logits = jnp.einsum("md,dv->mv", x, head, preferred_element_type=jnp.float32)
    local = labels - index(AXIS) * head.shape[1]
    here = (local >= 0) & (local < head.shape[1])
    one_hot = jnp.arange(head.shape[1]) == jnp.where(here, local, -1)[:, None]
    picked = total(jnp.where(one_hot, logits, 0).sum(axis=1), AXIS)
    top = logits.max(axis=1)
    if live(AXIS):
        top = jax.lax.pmax(top, live(AXIS))
    exponentials = jnp.exp(logits - top[:, None])
    sums = total(exponentials.sum(axis=1), AXIS)
    loss = jnp.sum(weights * (top + jnp.log(sums) - picked))
    if not gradients:
        return loss, None, None
    d_logits = exponentials * (weights / sums)[:, None] - jnp.where(one_hot, weights[:, None], 0)
    d_logits = d_logits.astype(x.dtype)
    d_x = jnp.einsum("mv,dv->md", d_logits, head)
    d_head = jnp.einsum("md,mv->dv", x, d_logits, preferred_element_type=jnp.float32)
    return loss, d_x, d_head
