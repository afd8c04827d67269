"""A linear head's losses and log-probabilities without its logits: some tokens at a time.

At a vocabulary of 202,048, the logits of 8,192 tokens are 6.6 GB. Here only some tokens' logits
exist at once. Where the loss is a weighted sum with weights known beforehand, each piece's
gradients follow from its own logits: the backward pass only scales them, and the head is multiplied
three times instead of four. Where they are not, as in preferences, the backward pass computes each
piece's logits again.

Letters: see `models.layers`; m tokens.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from l4jax.sharding import gather, index, live, size, total

PIECE_BYTES = 2**30
"""Most memory for the float32 logits of one piece."""
AXIS = "tensor"
"""The mesh axis that the vocabulary may be split over, inside `sharding.per_shard`."""


# --- Weighted cross-entropy ----------------------------------------------------------------------
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def linear_cross_entropy(
    x: Float[Array, "m d"],
    head: Float[Array, "d v"],
    labels: Int[Array, " m"],
    weights: Float32[Array, " m"],
    z: float = 0.0,
) -> tuple[Float32[Array, ""], Float32[Array, ""] | None]:
    """Σ_m weight · (lse - x · head[:, label] + z · lse²) and its last term; in float32.

    lse is log Σ_v exp(x · head). The last term keeps it near 0 (PaLM, Chowdhery et al. 2022, §5:
    z = 1e-4; the form is that of ST-MoE, Zoph et al. 2022, eq. 5). It is there to be reported and
    has no gradient of its own, and is None where z is 0. Tokens of weight 0 may have any label.
    """
    return _pieces(x, head, labels, weights, z, gradients=False)[0]


def _forward(
    x: Array, head: Array, labels: Array, weights: Array, z: float
) -> tuple[tuple[Array, Array | None], tuple]:
    return _pieces(x, head, labels, weights, z, gradients=True)


def _backward(z: float, gradients: tuple[Array, Array], scales: tuple) -> tuple:
    # Each shard of the vocabulary was given its share of the cotangent of a loss that all have.
    scale = total(scales[0], AXIS)
    d_x, d_head = (g * scale.astype(g.dtype) for g in gradients)
    return d_x, d_head, None, None


linear_cross_entropy.defvjp(_forward, _backward)


def _pieces(
    x: Array, head: Array, labels: Array, weights: Array, z: float, *, gradients: bool
) -> tuple[tuple[Array, Array | None], tuple]:
    """The loss with its last term, and with `gradients` those of x and head, in their types."""

    def piece(d_head: Array | None, args: tuple) -> tuple[Array | None, tuple]:
        losses, d_x, more = _piece(head, *args, z=z, gradients=gradients)
        return None if d_head is None or more is None else d_head + more, (losses, d_x)

    m, d = x.shape
    pieces = _cut(head, x, labels, weights)
    if pieces[0].shape[0] == 1:
        losses, d_x, d_head = _piece(head, *(a[0] for a in pieces), z=z, gradients=gradients)
        d_x = None if d_x is None else d_x[None]
    else:
        start = jnp.zeros(head.shape, jnp.float32) if gradients else None
        d_head, (losses, d_x) = jax.lax.scan(piece, start, pieces)
    losses = jax.tree.map(jnp.sum, losses)
    if d_x is None or d_head is None:
        return losses, ()
    return losses, (d_x.reshape(-1, d)[:m], d_head.astype(head.dtype))


def _piece(
    head: Array, x: Array, labels: Array, weights: Array, *, z: float, gradients: bool
) -> tuple[tuple[Array, Array | None], Array | None, Array | None]:
    """One piece's loss and its last term; gradients of its x, and of the head in float32."""
    logits = jnp.einsum("md,dv->mv", x, head, preferred_element_type=jnp.float32)
    one_hot = jnp.arange(head.shape[1]) == _local(head, labels, -1)[:, None]
    picked = total(jnp.where(one_hot, logits, 0).sum(axis=1), AXIS)
    top, exponentials, sums = _exponentials(logits)
    lse, penalty, more = top + jnp.log(sums), None, weights
    loss = jnp.sum(weights * (lse - picked))
    if z:
        penalty = z * jnp.sum(weights * jnp.square(lse))
        loss += penalty
        more = weights * (1 + 2 * z * lse)
    if not gradients:
        return (loss, penalty), None, None
    d_logits = exponentials * (more / sums)[:, None] - jnp.where(one_hot, weights[:, None], 0)
    return (loss, penalty), *_products(head, x, d_logits)


# --- Log-probabilities ---------------------------------------------------------------------------
@jax.custom_vjp
def linear_log_probs(
    x: Float[Array, "m d"], head: Float[Array, "d v"], labels: Int[Array, "m ..."]
) -> tuple[Float32[Array, "m ..."], Float32[Array, " m"]]:
    """x · head[:, label] - lse of each token's labels, and lse = log Σ_v exp(x · head); float32.

    Of a label outside the vocabulary, which a loss must leave out, it is -lse.
    """
    return _label_scores(x, head, labels)


def _label_scores(x: Array, head: Array, labels: Array) -> tuple[Array, Array]:
    def piece(x: Array, labels: Array) -> tuple[Array, Array]:
        logits = jnp.einsum("md,dv->mv", x, head, preferred_element_type=jnp.float32)
        local = _local(head, labels.reshape(len(x), -1), head.shape[1])
        picked = jnp.take_along_axis(logits, local, axis=1, mode="fill", fill_value=0)
        top, _, sums = _exponentials(logits)
        lse = top + jnp.log(sums)
        return (total(picked, AXIS) - lse[:, None]).reshape(labels.shape), lse

    log_probs, lse = jax.lax.map(lambda args: piece(*args), _cut(head, x, labels))
    return log_probs.reshape(-1, *labels.shape[1:])[: len(x)], lse.reshape(-1)[: len(x)]


def _label_scores_forward(x: Array, head: Array, labels: Array) -> tuple[tuple, tuple]:
    log_probs, lse = _label_scores(x, head, labels)
    return (log_probs, lse), (x, head, labels, lse)


def _label_scores_backward(saved: tuple, scales: tuple[Array, Array]) -> tuple:
    x, head, labels, lse = saved
    # As above: what comes in is this shard's share.
    d_picked, d_lse = total(scales, AXIS)
    d_picked = d_picked.reshape(len(x), -1)
    d_lse -= d_picked.sum(axis=1)

    def piece(d_head: Array, args: tuple) -> tuple[Array, Array]:
        x, labels, lse, d_picked, d_lse = args
        logits = jnp.einsum("md,dv->mv", x, head, preferred_element_type=jnp.float32)
        d_logits = jnp.exp(logits - lse[:, None]) * d_lse[:, None]
        rows = jnp.arange(len(x))[:, None]
        local = _local(head, labels, head.shape[1])
        d_logits = d_logits.at[rows, local].add(d_picked, mode="drop")
        d_x, more = _products(head, x, d_logits)
        return d_head + more, d_x

    pieces = _cut(head, x, labels.reshape(len(x), -1), lse, d_picked, d_lse)
    d_head, d_x = jax.lax.scan(piece, jnp.zeros(head.shape, jnp.float32), pieces)
    return d_x.reshape(-1, x.shape[1])[: len(x)], d_head.astype(head.dtype), None


linear_log_probs.defvjp(_label_scores_forward, _label_scores_backward)


def linear_top_log_probs(
    x: Float[Array, "m d"], head: Float[Array, "d v"], k: int
) -> tuple[Int32[Array, "m k"], Float32[Array, "m k"]]:
    """The k most likely ids after each token, the likeliest first, and their log-probabilities.

    Raises:
        ValueError: the vocabulary has fewer ids.
    """
    v = head.shape[1]
    if not 1 <= k <= v * size(AXIS):
        raise ValueError(f"top {k} must be at least 1 and at most the vocabulary, {v * size(AXIS)}")

    def piece(x: Array) -> tuple[Array, Array]:
        logits = jnp.einsum("md,dv->mv", x, head, preferred_element_type=jnp.float32)
        top, _, sums = _exponentials(logits)
        values, ids = jax.lax.top_k(logits, min(k, v))
        values, ids = (gather(a, 1, AXIS) for a in (values, ids + index(AXIS) * v))
        values, places = jax.lax.top_k(values, k)
        log_probs = values - (top + jnp.log(sums))[:, None]
        return jnp.take_along_axis(ids, places, axis=1), log_probs

    ids, log_probs = jax.lax.map(lambda args: piece(*args), _cut(head, x))
    return ids.reshape(-1, k)[: len(x)], log_probs.reshape(-1, k)[: len(x)]


# --- Parts ---------------------------------------------------------------------------------------
def _cut(head: Array, *arrays: Array) -> tuple[Array, ...]:
    """The arrays [m …] in pieces [pieces tokens …], the last one filled with zeros."""
    m, v = arrays[0].shape[0], head.shape[1]
    # A power of two fills the tiles of a matrix unit.
    tokens = min(m, 2 ** max(3, (PIECE_BYTES // (4 * v)).bit_length() - 1))
    count = -(-m // tokens)

    def cut(x: Array) -> Array:
        padding = ((0, count * tokens - m),) + ((0, 0),) * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(count, tokens, *x.shape[1:])

    return tuple(cut(x) for x in arrays)


def _local(head: Array, labels: Array, elsewhere: int) -> Array:
    """Where labels lie in this shard's part of the vocabulary; `elsewhere` if they do not."""
    local = labels - index(AXIS) * head.shape[1]
    here = (local >= 0) & (local < head.shape[1])
    return jnp.where(here, local, elsewhere)


def _exponentials(logits: Array) -> tuple[Array, Array, Array]:
    """The largest logit of each token, exp(logit - largest) [m v], and the whole sum of these."""
    top = logits.max(axis=1)
    if live(AXIS):
        top = jax.lax.pmax(top, live(AXIS))
    exponentials = jnp.exp(logits - top[:, None])
    return top, exponentials, total(exponentials.sum(axis=1), AXIS)


def _products(head: Array, x: Array, d_logits: Array) -> tuple[Array, Array]:
    """Gradients of x, in its type, and of the head, in float32."""
    d_logits = d_logits.astype(x.dtype)
    d_x = jnp.einsum("mv,dv->md", d_logits, head)
    d_head = jnp.einsum("md,mv->dv", x, d_logits, preferred_element_type=jnp.float32)
    return d_x, d_head
