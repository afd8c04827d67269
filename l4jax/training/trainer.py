"""The training loop: it knows neither the objective nor the optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from l4jax import sharding
from l4jax.models.llama4 import Llama
from l4jax.training.objectives import Metrics, Objective

Batch = Mapping[str, Any]


class State(NamedTuple):
    """All that an update changes: nested dicts of arrays."""

    params: Any
    optimizer: optax.OptState


class Update:
    """One update as a pure function of state and batch, for models of one structure.

    Args:
        model: its structure; the parameters may be abstract.
        objective: what is minimised.
        optimizer: any Optax transformation.
        accumulate: pieces that a batch is cut into, one after the other, to save memory. Their
            gradients are weighted by the objective's `count`, so that the sum is the batch's own.
    """

    def __init__(
        self,
        model: Llama,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        *,
        accumulate: int = 1,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"accumulate {accumulate} must be at least 1")
        self._graph, self._abstract = nnx.split(model)
        self._objective, self._optimizer, self._pieces = objective, optimizer, accumulate

    def __call__(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """The state after one update, and the objective's metrics with `grad_norm`."""
        gradients, metrics = self._gradients(state.params, batch)
        updates, optimizer = self._optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.tree.norm(gradients)
        return State(params, optimizer), metrics

    def model(self, params: Any) -> Llama:
        """The model with these parameters."""
        state = jax.tree.map(lambda leaf: leaf, self._abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)

    def places(self, params: Any) -> State:
        """Where every array of the state lies: moments beside their parameters."""
        shardings = jax.tree.map(lambda x: x.sharding, params)
        one = jax.tree.leaves(shardings)[0]
        everywhere = (
            NamedSharding(one.mesh, PartitionSpec()) if isinstance(one, NamedSharding) else one
        )
        found = []

        def place() -> None:
            found.append(
                optax.tree.map_params(
                    self._optimizer,
                    lambda _, place: place,
                    jax.eval_shape(self._optimizer.init, params),
                    shardings,
                    transform_non_params=lambda _: everywhere,
                )
            )

        # Optax makes small arrays on the way, which must not land on devices nobody holds.
        jax.eval_shape(place)
        return State(shardings, found[0])

    def abstract(self, dtype: Any = None) -> State:
        """The first state on the current mesh, as shapes and places, to compile without arrays."""
        places = nnx.to_pure_dict(sharding.shardings(self._abstract))
        params = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=place),
            nnx.to_pure_dict(self._abstract),
            places,
        )
        shapes = State(params, jax.eval_shape(self._optimizer.init, params))
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            shapes,
            self.places(params),
        )

    def first(self, params: Any) -> State:
        """The state before the first update.

        Every array is committed to its place, as the step's results will be: the step is then
        compiled once, and not again for its own output.
        """
        places = self.places(params)
        init = jax.jit(self._optimizer.init, out_shardings=places.optimizer)
        return State(jax.device_put(params, places.params), init(params))

    def _gradients(self, params: Any, batch: Batch) -> tuple[Any, Metrics]:
        """Of the whole batch; and the metrics, weighted like the gradients."""

        def loss(params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
            return self._objective(self.model(params), batch)

        gradient = jax.grad(loss, has_aux=True)
        if self._pieces == 1:
            return gradient(params, batch)
        rows = jax.tree.leaves(batch)[0].shape[0]
        if rows % self._pieces:
            raise ValueError(f"accumulate {self._pieces} does not divide the batch's {rows} rows")

        def cut(x: jax.Array) -> jax.Array:
            """Every piece takes its rows from all shards alike."""
            return jnp.moveaxis(x.reshape(rows // self._pieces, self._pieces, *x.shape[1:]), 1, 0)

        def piece(total: Any, batch: Batch) -> tuple[Any, None]:
            gradients, metrics = gradient(params, batch)
            count = metrics["count"]
            new = jax.tree.map(
                lambda x: x * count if jnp.issubdtype(x.dtype, jnp.floating) else x,
                (gradients, metrics),
            )
            return jax.tree.map(jnp.add, total, new), None

        pieces = jax.tree.map(cut, dict(batch))
        first = jax.tree.map(lambda x: x[0], pieces)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, first)
        )
        (gradients, metrics), _ = jax.lax.scan(piece, zeros, pieces)
        count = jnp.maximum(metrics["count"], 1)
        return jax.tree.map(
            lambda x: x / count if jnp.issubdtype(x.dtype, jnp.floating) else x,
            (gradients, metrics),
        )


TPU_OPTIONS = {
    "xla_tpu_use_minor_sharding_for_major_trivial_input": "true",
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
    "xla_tpu_assign_all_reduce_scatter_layout": "true",
    "xla_tpu_enable_async_all_to_all": "true",
}
"""The first three let gradients lie so that their sums become reduce-scatters. Without them, most
are all-reduces on v5p, which send twice as much (found by compiling; MaxText's recipes for Llama 4
have them too). The last one lets tokens travel to their experts while other work goes on."""


def compiled(update: Update) -> Callable:
    """`update`, jitted for the current mesh; the state that goes in is used up."""

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        return update(state, batch)

    options = TPU_OPTIONS if sharding.platform() == "tpu" else None
    return jax.jit(step, donate_argnums=0, compiler_options=options)


class Training:
    """A model being trained.

    Args:
        model: where to start; its parameters are taken over and changed in place.
        objective: what is minimised.
        optimizer: any Optax transformation.
        accumulate: see `Update`.
    """

    def __init__(
        self,
        model: Llama,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        *,
        accumulate: int = 1,
    ) -> None:
        self._update = Update(model, objective, optimizer, accumulate=accumulate)
        self.state = self._update.first(nnx.to_pure_dict(nnx.state(model)))
        self._step = compiled(self._update)

    @property
    def model(self) -> Llama:
        """The model as it is now; valid until the next step."""
        return self._update.model(self.state.params)

    def run(self, batches: Iterable[Batch], steps: int) -> Iterator[dict[str, Any]]:
        """Makes `steps` updates and yields each one's metrics, on the host.

        Metrics come one step late, so that the device already works on the next step while this
        one's numbers are read. Each has `step`, from 0; `seconds` from this step's start to the
        next one's; `grad_norm`; and what the objective reports.

        Raises:
            ValueError: the mesh's data, fsdp and expert axes do not divide a batch's rows.
        """
        waiting: tuple[Metrics, float] | None = None
        for number, batch in zip(range(steps), batches, strict=False):
            begun = time.perf_counter()
            self.state, metrics = self._step(self.state, _spread(batch))
            if waiting is not None:
                yield self._read(waiting[0], number - 1, begun - waiting[1])
            waiting = metrics, begun
        if waiting is not None:
            jax.block_until_ready(waiting[0])
            yield self._read(waiting[0], number, time.perf_counter() - waiting[1])

    @staticmethod
    def _read(metrics: Metrics, step: int, seconds: float) -> dict[str, Any]:
        return {"step": step, "seconds": seconds, **jax.device_get(metrics)}


def _spread(batch: Batch) -> Batch:
    """A batch on the mesh, each row where its tokens will be computed."""
    if jax.sharding.get_mesh().empty:
        return batch

    def put(x: Any) -> Any:
        # Arrays over several processes come from `distributed.global_batch`, in their places.
        if np.ndim(x) != 2 or isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x
        return jax.device_put(x, batch_sharding(*x.shape))

    return {name: put(x) for name, x in batch.items()}


def batch_sharding(rows: int, length: int) -> NamedSharding:
    """Where the arrays of a training batch [rows length] lie on the current mesh.

    Raises:
        ValueError: the mesh does not divide it.
    """
    mesh = jax.sharding.get_mesh()
    batch, context = sharding.token_axes(rows, length)
    for name, axes, n, cut in (
        ("rows", sharding.BATCH, rows, batch),
        ("tokens in a row", ("context",), length, context),
    ):
        wanted = [axis for axis in axes if mesh.shape[axis] > 1]
        if list(cut) != wanted:
            parts = " · ".join(f"{axis}={mesh.shape[axis]}" for axis in wanted)
            raise ValueError(f"{parts} does not divide the {n} {name} of a training batch")
    return NamedSharding(mesh, PartitionSpec(batch or None, *context))


def evaluate(model: Llama, objective: Objective, batches: Iterable[Batch]) -> dict[str, Any]:
    """The objective's `loss` over all that counts in `batches`, and the sum of `expert_load`.

    Raises:
        ValueError: there is no batch, or no token in it counts.
    """
    measure = jax.jit(lambda model, batch: objective(model, batch)[1])
    total, count, load = 0.0, 0, None
    for batch in batches:
        metrics = jax.device_get(measure(model, batch))
        total += float(metrics["loss"]) * int(metrics["count"])
        count += int(metrics["count"])
        if "expert_load" in metrics:
            load = metrics["expert_load"] if load is None else load + metrics["expert_load"]
    if not count:
        raise ValueError("nothing to evaluate: no batch has a token that counts")
    return {"loss": total / count, "count": count, "expert_load": load}
