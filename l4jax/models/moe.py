"""Mixture of experts: a sigmoid router that scales each token on its way into its expert.

y = shared(x) + Σ_chosen expert(sigmoid(router(x)) · x). The score multiplies the expert's *input*
(Meta's `llama4/moe.py`; SwiGLU being non-linear, scaling the output would be another function), and
scores are not normalised. Dropless: every token reaches its experts, however uneven the load.

Letters: see `models.layers`; m = tokens · experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32

from l4jax.config import MoE
from l4jax.kernels.experts import grouped_swiglu
from l4jax.models.layers import SwiGLU, weight


class Routing(NamedTuple):
    """What a routed layer did; stacked over layers by the decoder.

    load: assignments to each expert. entropy: of the router's softmax, mean over tokens, in nats.
    balance: e · Σ_e (share of assignments · mean softmax), 1 when even (Fedus et al. 2021, eq. 4);
    its gradient reaches the router.
    """

    load: Int32[Array, "*l e"]
    entropy: Float32[Array, "*l"]
    balance: Float32[Array, "*l"]


class Experts(nnx.Module):
    """Router, routed experts and the shared expert."""

    def __init__(self, d: int, config: MoE, *, rngs: nnx.Rngs) -> None:
        e, f = config.num_experts, config.mlp_dim
        self.router = weight(rngs, (d, e), ("embed", "router"), fan_in=d)
        self.gate = weight(rngs, (e, d, f), ("experts", "embed", "mlp"), fan_in=d)
        self.up = weight(rngs, (e, d, f), ("experts", "embed", "mlp"), fan_in=d)
        self.down = weight(rngs, (e, f, d), ("experts", "mlp", "embed"), fan_in=f)
        self.shared = SwiGLU(d, config.shared_mlp_dim, rngs=rngs) if config.shared_mlp_dim else None
        self.experts_per_token = config.experts_per_token

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Routing]:
        """The layer's output, in x's type, and what its router did."""
        b, t, d = x.shape
        tokens = x.reshape(b * t, d)
        logits = jnp.einsum(
            "md,de->me",
            tokens.astype(jnp.float32),
            self.router[...].astype(jnp.float32),
        )
        top, experts = jax.lax.top_k(logits, self.experts_per_token)
        scores = jax.nn.sigmoid(top).astype(x.dtype)
        load = jnp.zeros(logits.shape[1], jnp.int32).at[experts.reshape(-1)].add(1)
        order = jnp.argsort(experts.reshape(-1), stable=True)
        scaled = (tokens[:, None] * scores[:, :, None]).reshape(-1, d)
        gate, up, down = (w[...].astype(x.dtype) for w in (self.gate, self.up, self.down))
        inverse = jnp.argsort(order)
        routed = grouped_swiglu(_permute(scaled, order, inverse), gate, up, down, load)
        y = _permute(routed, inverse, order).reshape(b, t, self.experts_per_token, d).sum(2)
        if self.shared is not None:
            y += self.shared(x)
        return y, _routing(logits, load)


def _routing(logits: Float32[Array, "m e"], load: Int[Array, " e"]) -> Routing:
    """The layer's statistics from its router's logits."""
    log_probabilities = jax.nn.log_softmax(logits)
    probabilities = jnp.exp(log_probabilities)
    share = load / jnp.sum(load)
    return Routing(
        load=load,
        entropy=-jnp.mean(jnp.sum(probabilities * log_probabilities, axis=-1)),
        balance=logits.shape[1] * jnp.sum(share * probabilities.mean(0)),
    )


@jax.custom_vjp
def _permute(x: Float[Array, "m d"], order: Array, inverse: Array) -> Float[Array, "m d"]:
    """x[order]; its gradient is a gather by `inverse`, where plain indexing would scatter."""
    return x[order]


_permute.defvjp(
    lambda x, order, inverse: (x[order], inverse),
    lambda inverse, d_y: (d_y[inverse], None, None),
)
