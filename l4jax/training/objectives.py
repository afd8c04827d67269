"""What is minimised: pure functions (model, batch) → (loss, metrics).

Letters: see `models.layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int

from l4jax import sharding
from l4jax.kernels.cross_entropy import linear_cross_entropy
from l4jax.models.llama4 import Llama

Metrics = dict[str, Array]
"""Has at least `loss`, what the objective is named after, and `count`, how many things (tokens,
pairs) that is the mean of: evaluation and accumulated gradients weigh batches by it."""
Objective = Callable[[Llama, Mapping[str, Array]], tuple[Float32[Array, ""], Metrics]]


def next_token(*, balance: float = 0.0) -> Objective:
    """Mean cross-entropy, in nats, of each token given those before it in its segment.

    A batch has `tokens`, and may have `segment_ids` (0 is padding) with `positions`.

    Args:
        balance: weight of the routers' load-balance term (see `models.moe.Routing`); 0 leaves the
            loss as it is, 0.01 keeps experts in use when training from scratch.
    """

    def objective(model: Llama, batch: Mapping[str, Array]) -> tuple[Float32[Array, ""], Metrics]:
        tokens, segments = batch["tokens"], batch.get("segment_ids")
        hidden, routing = model.hidden(
            tokens, positions=batch.get("positions"), segment_ids=segments
        )
        last = jnp.arange(tokens.shape[1]) == tokens.shape[1] - 1
        counted = jnp.broadcast_to(~last, tokens.shape)
        if segments is not None:
            counted &= (jnp.roll(segments, -1, axis=1) == segments) & (segments > 0)
        count = counted.sum()
        weights = counted / jnp.maximum(count, 1).astype(jnp.float32)
        loss = cross_entropy(model, hidden, jnp.roll(tokens, -1, axis=1), weights)
        metrics = {"loss": loss, "count": count}
        if routing is None:
            return loss, metrics
        metrics |= {
            "router_entropy": routing.entropy.mean(),
            "router_balance": routing.balance.mean(),
            "expert_load": routing.load,
            "dropped": routing.dropped.sum(),
        }
        return loss + balance * routing.balance.mean(), metrics

    return objective


def cross_entropy(
    model: Llama,
    hidden: Float[Array, "b t d"],
    labels: Int[Array, "b t"],
    weights: Float32[Array, "b t"],
) -> Float32[Array, ""]:
    """Σ weight · -log p(label) after these hidden states; never all logits in memory."""
    tied, table = model.head is None, model.embed if model.head is None else model.head
    rows, context = sharding.token_axes(*labels.shape)
    graph, state = nnx.split((table, model.norm))

    def shard(state: nnx.State, x: Array, labels: Array, weights: Array) -> Array:
        head, norm = nnx.merge(graph, state)
        matrix = sharding.read(head, x.dtype)
        x = norm(x).reshape(-1, x.shape[-1])
        loss = linear_cross_entropy(
            x, matrix.T if tied else matrix, labels.reshape(-1), weights.reshape(-1)
        )
        return sharding.total(loss, *rows, *context)

    token = PartitionSpec(rows or None, *context)
    specs = (sharding.specs(state), token, token, token)
    return sharding.per_shard(shard, specs, PartitionSpec())(state, hidden, labels, weights)
