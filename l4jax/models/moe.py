"""Mixture of experts: a sigmoid router that scales each token on its way into its expert.

y = shared(x) + Σ_chosen expert(sigmoid(router(x)) · x). The score multiplies the expert's *input*
(Meta's `llama4/moe.py`; SwiGLU being non-linear, scaling the output would be another function), and
scores are not normalised. Dropless by default: every token reaches its experts, however uneven the
load.

Letters: see `models.layers`; m = tokens · experts per token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from l4jax import sharding
from l4jax.config import MoE
from l4jax.models.exchange import through_experts
from l4jax.models.layers import SwiGLU, weight
from l4jax.sharding import read, total


class Routing(NamedTuple):
    """What a routed layer did, over all shards; stacked over layers by the decoder.

    load: assignments to each expert, dropped ones among them. dropped: assignments beyond a row's
    capacity. entropy: of the router's softmax, mean over tokens, in nats. balance: e · Σ_e (share
    of assignments · mean softmax), 1 when even (Fedus et al. 2021, eq. 4); its gradient reaches the
    router.
    """

    load: Int32[Array, "*l e"]
    dropped: Int32[Array, "*l"]
    entropy: Float32[Array, "*l"]
    balance: Float32[Array, "*l"]


class Tiling(NamedTuple):
    """The mesh axes that rows, and each row's tokens, are cut over; what others hold are copies."""

    rows: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()


class Experts(nnx.Module):
    """Router, routed experts and the shared expert."""

    def __init__(self, d: int, config: MoE, *, rngs: nnx.Rngs) -> None:
        e, f = config.num_experts, config.mlp_dim
        self.router = weight(rngs, (d, e), ("embed", "router"), fan_in=d)
        self.gate = weight(rngs, (e, d, f), ("experts", "expert_embed", "mlp"), fan_in=d)
        self.up = weight(rngs, (e, d, f), ("experts", "expert_embed", "mlp"), fan_in=d)
        self.down = weight(rngs, (e, f, d), ("experts", "mlp", "expert_embed"), fan_in=f)
        self.shared = SwiGLU(d, config.shared_mlp_dim, rngs=rngs) if config.shared_mlp_dim else None
        self.experts_per_token = config.experts_per_token

    def __call__(
        self, x: Float[Array, "b t d"], tiling: Tiling = Tiling(), capacity: float | None = None
    ) -> tuple[Float[Array, "b t d"], Routing]:
        """The layer's output, in x's type, and what its router did.

        With `capacity`, a row gives no expert more than capacity · (an even share of its tokens);
        later ones see the shared expert only. Rows decide for themselves, on every mesh alike.
        """
        b, t, d = x.shape
        k, e = self.experts_per_token, self.router.shape[1]
        tokens = x.reshape(b * t, d)
        logits = jnp.einsum("md,de->me", tokens.astype(jnp.float32), read(self.router, jnp.float32))
        top, experts = jax.lax.top_k(logits, k)
        scores = jax.nn.sigmoid(top).astype(x.dtype)
        scaled = (tokens[:, None] * scores[:, :, None]).reshape(-1, d)
        kept = jnp.ones((b, t * k), bool)
        if capacity is not None:
            kept = _within(experts.reshape(b, t * k), e, capacity, tiling.tokens)
        chosen = jnp.where(kept.reshape(-1), experts.reshape(-1), e)
        copies = "expert" not in tiling.rows
        axes = sharding.apart(self.gate, scaled, *(() if copies else ("expert",)))
        gate, up, down = (read(w, x.dtype, whole=not axes) for w in (self.gate, self.up, self.down))
        routed = through_experts(scaled, (gate, up, down), chosen, e, replicated=copies, axes=axes)
        y = routed.reshape(b, t, k, d).sum(2)
        if self.shared is not None:
            y += self.shared.part(x)
        y = total(y, "tensor")
        load = jnp.zeros(e, jnp.int32).at[experts.reshape(-1)].add(1)
        return y, _routing(logits, load, (~kept).sum(dtype=jnp.int32), tiling)


def _within(
    experts: Int[Array, "b m"], num_experts: int, capacity: float, axes: tuple[str, ...]
) -> Bool[Array, "b m"]:
    """Which assignments come before their expert has its fill of their row."""
    most = math.ceil(capacity * experts.shape[1] * sharding.size(*axes) / num_experts)
    one_hot = jax.nn.one_hot(experts, num_experts, dtype=jnp.int32)
    earlier = jnp.cumsum(one_hot, axis=1) - one_hot
    for axis in axes:
        # Tokens on earlier shards of the row come first.
        sums = jax.lax.all_gather(one_hot.sum(1), axis)
        before = jnp.arange(sums.shape[0]) < sharding.index(axis)
        earlier += jnp.where(before[:, None, None], sums, 0).sum(0)[:, None]
    return (earlier * one_hot).sum(-1) < most


def _routing(
    logits: Float32[Array, "m e"], load: Int[Array, " e"], dropped: Int[Array, ""], tiling: Tiling
) -> Routing:
    """The layer's statistics from its router's logits, over all shards that hold other tokens."""
    axes = (*tiling.rows, *tiling.tokens)
    log_probabilities = jax.nn.log_softmax(logits)
    probabilities = jnp.exp(log_probabilities)
    tokens = logits.shape[0] * sharding.size(*axes)
    mean = total(probabilities.sum(0), *axes) / tokens
    entropy = -total(jnp.sum(probabilities * log_probabilities), *axes) / tokens
    load = total(load, *axes)
    share = load / jnp.sum(load)
    balance = logits.shape[1] * jnp.sum(share * mean)
    return Routing(load, total(dropped, *axes), entropy, balance)
