"""The training loop: it knows neither the objective nor the optimizer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from l4jax.models.llama4 import Llama
from l4jax.training.objectives import Metrics, Objective

Batch = Mapping[str, Any]


class State(NamedTuple):
    """All that an update changes: nested dicts of arrays."""

    params: Any
    optimizer: optax.OptState


class Training:
    """A model being trained.

    Args:
        model: where to start; its parameters are taken over and changed in place.
        objective: what is minimised.
        optimizer: any Optax transformation.
    """

    def __init__(
        self, model: Llama, objective: Objective, optimizer: optax.GradientTransformation
    ) -> None:
        self._graph, self._abstract = nnx.split(model)
        self.state = _placed(nnx.to_pure_dict(self._abstract), optimizer)

        def step(state: State, batch: Batch) -> tuple[State, Metrics]:
            def loss(params: Any) -> tuple[jax.Array, Metrics]:
                return objective(self._merge(params), batch)

            (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            metrics["grad_norm"] = optax.tree.norm(gradients)
            return State(params, optimizer_state), metrics

        self._step = jax.jit(step, donate_argnums=0)

    @property
    def model(self) -> Llama:
        """The model as it is now; valid until the next step."""
        return self._merge(self.state.params)

    def run(self, batches: Iterable[Batch], steps: int) -> Iterator[dict[str, Any]]:
        """Makes `steps` updates and yields each one's metrics, on the host.

        Metrics come one step late, so that the device already works on the next step while this
        one's numbers are read. Each has `step`, from 0; `seconds` from this step's start to the
        next one's; `grad_norm`; and what the objective reports.
        """
        waiting: tuple[Metrics, float] | None = None
        for number, batch in zip(range(steps), batches, strict=False):
            begun = time.perf_counter()
            self.state, metrics = self._step(self.state, batch)
            if waiting is not None:
                yield self._read(waiting[0], number - 1, begun - waiting[1])
            waiting = metrics, begun
        if waiting is not None:
            jax.block_until_ready(waiting[0])
            yield self._read(waiting[0], number, time.perf_counter() - waiting[1])

    def _merge(self, params: Any) -> Llama:
        state = jax.tree.map(lambda leaf: leaf, self._abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)

    @staticmethod
    def _read(metrics: Metrics, step: int, seconds: float) -> dict[str, Any]:
        return {"step": step, "seconds": seconds, **jax.device_get(metrics)}


def _placed(params: Any, optimizer: optax.GradientTransformation) -> State:
    """The first state, its moments beside their parameters.

    Every array is committed to its place, as the step's results will be: the step is then compiled
    once, and not again for its own output.
    """
    shardings = jax.tree.map(lambda x: x.sharding, params)
    one = jax.tree.leaves(shardings)[0]
    everywhere = NamedSharding(one.mesh, PartitionSpec()) if isinstance(one, NamedSharding) else one
    places = optax.tree.map_params(
        optimizer,
        lambda _, place: place,
        jax.eval_shape(optimizer.init, params),
        shardings,
        transform_non_params=lambda _: everywhere,
    )
    init = jax.jit(optimizer.init, out_shardings=places)
    return State(jax.device_put(params, shardings), init(params))


def evaluate(model: Llama, objective: Objective, batches: Iterable[Batch]) -> dict[str, Any]:
    """The objective's `loss` over all counted tokens of `batches`, and the sum of `expert_load`.

    Raises:
        ValueError: there is no batch, or no token in it counts.
    """
    measure = jax.jit(lambda model, batch: objective(model, batch)[1])
    total, tokens, load = 0.0, 0, None
    for batch in batches:
        metrics = jax.device_get(measure(model, batch))
        total += float(metrics["loss"]) * int(metrics["tokens"])
        tokens += int(metrics["tokens"])
        if "expert_load" in metrics:
            load = metrics["expert_load"] if load is None else load + metrics["expert_load"]
    if not tokens:
        raise ValueError("nothing to evaluate: no batch has a token that counts")
    return {"loss": total / tokens, "tokens": tokens, "expert_load": load}
