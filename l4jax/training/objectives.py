"""What is minimised: pure functions (model, batch) → (loss, metrics).

Letters: see `models.layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32

from l4jax.models.llama4 import Llama

Metrics = dict[str, Array]
Objective = Callable[[Llama, Mapping[str, Array]], tuple[Float32[Array, ""], Metrics]]


def next_token(*, balance: float = 0.0) -> Objective:
    """Mean cross-entropy, in nats, of each token given those before it in its segment.

    Args:
        balance: weight of the routers' load-balance term (see `models.moe.Routing`); 0 leaves the
            loss as it is, 0.01 keeps experts in use when training from scratch.
    """

    def objective(model: Llama, batch: Mapping[str, Array]) -> tuple[Float32[Array, ""], Metrics]:
        segments = batch["segment_ids"]
        outputs = model.outputs(batch["tokens"], positions=batch["positions"], segment_ids=segments)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            outputs.logits[:, :-1], batch["tokens"][:, 1:]
        )
        counted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        tokens = counted.sum()
        loss = jnp.where(counted, losses, 0).sum() / jnp.maximum(tokens, 1)
        metrics = {"loss": loss, "tokens": tokens}
        if outputs.routing is None:
            return loss, metrics
        metrics |= {
            "router_entropy": outputs.routing.entropy.mean(),
            "router_balance": outputs.routing.balance.mean(),
            "expert_load": outputs.routing.load,
        }
        return loss + balance * outputs.routing.balance.mean(), metrics

    return objective
