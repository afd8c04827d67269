"""One update of a model: it knows neither the objective nor the optimizer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from l4jax import distributed, paths, sharding
from l4jax.training.objectives import Metrics, Objective

Batch = Mapping[str, Any]


class State(NamedTuple):
    """All that an update changes: nested dicts of arrays.

    params: all parameters, frozen ones too. optimizer: of the trainable ones.
    """

    params: Any
    optimizer: optax.OptState


class Update:
    """One update as a pure function of state and batch, for models of one structure.

    Args:
        model: its structure; the parameters may be abstract.
        objective: what is minimised.
        optimizer: any Optax transformation. It sees the trainable parameters only, in the model's
            tree with None in the places of frozen ones.
        accumulate: pieces that a batch is cut into, one after the other, to save memory. Their
            gradients are weighted by the objective's `count`, so that the sum is the batch's own.
        trainable: which arrays are trained, by their dotted names (see `paths`); all by default.
            The others have neither gradients nor optimizer state, and may be quantized.
        guard: leave parameters and optimizer as they were where the loss or the gradient is not
            finite, and report that as `skipped` (0 or 1).

    Raises:
        ValueError: nothing is trainable, or an array that is holds no floating-point numbers.
    """

    def __init__(
        self,
        model: nnx.Module,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        *,
        accumulate: int = 1,
        trainable: Callable[[str], bool] | None = None,
        guard: bool = True,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"accumulate {accumulate} must be at least 1")
        self._graph, self._abstract = nnx.split(model)
        self._objective, self._optimizer, self._pieces = objective, optimizer, accumulate
        self._trained = _trained(nnx.to_pure_dict(self._abstract), trainable)
        self.guard = guard

    def __call__(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """The state after one update, and the objective's metrics with `grad_norm`."""
        params, frozen = self.parts(state.params)
        loss, gradients, metrics = self._gradients(params, frozen, batch)
        updates, optimizer = self._optimizer.update(gradients, state.optimizer, params)
        new = State(optax.apply_updates(params, updates), optimizer)
        metrics["grad_norm"] = norm = optax.tree.norm(gradients)
        if self.guard:
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            old = State(params, state.optimizer)
            new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
            metrics["skipped"] = 1 - finite.astype(jnp.int32)
        return State(self.joined(new.params, frozen), new.optimizer), metrics

    def parts(self, params: Any) -> tuple[Any, Any]:
        """The trainable and the frozen arrays, each in the whole tree with None for the others."""
        leaves, tree = jax.tree.flatten(params)
        pairs = list(zip(leaves, self._trained, strict=True))
        trainable = [x if trained else None for x, trained in pairs]
        frozen = [None if trained else x for x, trained in pairs]
        return jax.tree.unflatten(tree, trainable), jax.tree.unflatten(tree, frozen)

    @staticmethod
    def joined(trainable: Any, frozen: Any) -> Any:
        """The inverse of `parts`."""
        return jax.tree.map(
            lambda x, y: y if x is None else x, trainable, frozen, is_leaf=lambda x: x is None
        )

    def model(self, params: Any) -> Any:
        """The model with these parameters."""
        state = jax.tree.map(lambda leaf: leaf, self._abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)

    def places(self, params: Any) -> State:
        """Where every array of the state lies: moments beside their parameters."""
        shardings = jax.tree.map(lambda x: x.sharding, params)
        trainable, _ = self.parts(params)
        one = jax.tree.leaves(shardings)[0]
        everywhere = (
            NamedSharding(one.mesh, PartitionSpec()) if isinstance(one, NamedSharding) else one
        )
        found = []

        def beside(moment: Any, param: Any, place: Any) -> Any:
            """Optimizers keep none for some parameters, and factored ones for others."""
            if isinstance(moment, optax.MaskedNode):
                return moment
            return place if moment.shape == param.shape else everywhere

        def place() -> None:
            found.append(
                optax.tree.map_params(
                    self._optimizer,
                    beside,
                    jax.eval_shape(self._optimizer.init, trainable),
                    trainable,
                    self.parts(shardings)[0],
                    transform_non_params=lambda _: everywhere,
                    is_leaf=lambda x: isinstance(x, optax.MaskedNode),
                )
            )

        # Optax makes small arrays on the way, which must not land on devices nobody holds.
        jax.eval_shape(place)
        return State(shardings, found[0])

    def abstract(self, dtype: Any = None) -> State:
        """The first state on the current mesh, as shapes and places, to compile without arrays.

        Args:
            dtype: of the parameters, quantized ones apart; by default the model's.
        """

        def shaped(x: Any, place: Any) -> jax.ShapeDtypeStruct:
            kind = dtype if dtype and jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
            return jax.ShapeDtypeStruct(x.shape, kind, sharding=place)

        places = nnx.to_pure_dict(sharding.shardings(self._abstract))
        params = jax.tree.map(shaped, nnx.to_pure_dict(self._abstract), places)
        shapes = State(params, jax.eval_shape(self._optimizer.init, self.parts(params)[0]))
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
        return State(jax.device_put(params, places.params), init(self.parts(params)[0]))

    def _gradients(self, params: Any, frozen: Any, batch: Batch) -> tuple[Any, Any, Metrics]:
        """Loss, gradients and metrics of the whole batch; metrics are weighted like gradients."""

        def loss(params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
            return self._objective(self.model(self.joined(params, frozen)), batch)

        gradient = jax.value_and_grad(loss, has_aux=True)
        if self._pieces == 1:
            (value, metrics), gradients = gradient(params, batch)
            return value, gradients, metrics
        rows, _ = _size(batch)
        if rows % self._pieces:
            raise ValueError(f"accumulate {self._pieces} does not divide the batch's {rows} rows")

        def cut(x: jax.Array) -> jax.Array:
            """Every piece takes its rows, and its tiles, from all shards alike."""
            return jnp.moveaxis(x.reshape(-1, self._pieces, *x.shape[1:]), 1, 0)

        def piece(total: Any, batch: Batch) -> tuple[Any, None]:
            found = gradient(params, {**whole, **batch})
            count = found[0][1]["count"]
            new = jax.tree.map(
                lambda x: x * count if jnp.issubdtype(x.dtype, jnp.floating) else x, found
            )
            return jax.tree.map(jnp.add, total, new), None

        whole = {n: x for n, x in batch.items() if n != TILES and not _has_rows(x, rows)}
        pieces = {name: cut(x) for name, x in batch.items() if name not in whole}
        first = {**whole, **jax.tree.map(lambda x: x[0], pieces)}
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, first)
        )
        total, _ = jax.lax.scan(piece, zeros, pieces)
        count = jnp.maximum(total[0][1]["count"], 1)
        (value, metrics), gradients = jax.tree.map(
            lambda x: x / count if jnp.issubdtype(x.dtype, jnp.floating) else x, total
        )
        return value, gradients, metrics


def _trained(params: Any, trainable: Callable[[str], bool] | None) -> list[bool]:
    """For every array, in the tree's order, whether it is trained."""
    named = [(paths.name(p), x) for p, x in jax.tree_util.tree_leaves_with_path(params)]
    found = [trainable is None or bool(trainable(name)) for name, _ in named]
    if not any(found):
        some = ", ".join(name for name, _ in named[:6])
        raise ValueError(f"no parameter is trainable; there are {some}, …")
    for (name, x), trained in zip(named, found, strict=True):
        if trained and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{name} holds {x.dtype} numbers, which have no gradients: it cannot be trainable"
            )
    return found


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
        trainable: see `Update`.
        guard: see `Update`.
    """

    def __init__(
        self,
        model: nnx.Module,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        *,
        accumulate: int = 1,
        trainable: Callable[[str], bool] | None = None,
        guard: bool = True,
    ) -> None:
        self.update = Update(
            model, objective, optimizer, accumulate=accumulate, trainable=trainable, guard=guard
        )
        self.state = self.update.first(nnx.to_pure_dict(nnx.state(model)))
        self._step = compiled(self.update)

    @property
    def model(self) -> Any:
        """The model as it is now; valid until the next step."""
        return self.update.model(self.state.params)

    def step(self, batch: Batch) -> Metrics:
        """Begins one update, with a batch that `spread` has placed; its metrics are on the way."""
        self.state, metrics = self._step(self.state, batch)
        return metrics

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
            metrics = self.step(spread(batch))
            if waiting is not None:
                yield self._read(waiting[0], number - 1, begun - waiting[1])
            waiting = metrics, begun
        if waiting is not None:
            jax.block_until_ready(waiting[0])
            yield self._read(waiting[0], number, time.perf_counter() - waiting[1])

    @staticmethod
    def _read(metrics: Metrics, step: int, seconds: float) -> dict[str, Any]:
        return {"step": step, "seconds": seconds, **jax.device_get(metrics)}


# --- Batches on the mesh -------------------------------------------------------------------------
def spread(batch: Batch) -> Batch:
    """A batch on the mesh, each row where its tokens will be computed.

    Arrays [b t …] are laid out by rows and tokens, others of b rows by rows, tiles of images like
    rows; scalars and what has no rows are whole everywhere. b and t are those of `tokens`, or of
    the first array without it.
    Of several processes each hands in its own rows only (`distributed.local_rows`).

    Raises:
        ValueError: the mesh does not divide the batch.
    """
    if jax.sharding.get_mesh().empty:
        return batch
    rows, length = _size(batch)
    parts = _parts_of_rows(batch)
    token = batch_sharding(rows * parts, length) if rows else None

    def put(name: str, x: Any) -> Any:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x
        shape, place = np.shape(x), NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
        if token is not None and (name == TILES or _has_rows(x, rows)):
            tokens = name != TILES and len(shape) > 1 and shape[1] == length
            place = token if tokens else NamedSharding(token.mesh, PartitionSpec(*token.spec[:1]))
            shape = (shape[0] * parts, *shape[1:])
        if jax.process_count() == 1:
            return jax.device_put(x, place)
        return jax.make_array_from_process_local_data(place, np.asarray(x), shape)

    return {name: put(name, x) for name, x in batch.items()}


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


TILES = "tiles"
"""An array of a batch that is of images, not of rows."""


def _size(batch: Batch) -> tuple[int, int]:
    """Rows of a batch and tokens of a row, on this process; 0 for what it has not."""
    arrays = [x for x in batch.values() if np.ndim(x)]
    shape = np.shape(batch.get("tokens", arrays[0] if arrays else 0))
    return (*shape, 0, 0)[:2]


def _has_rows(x: Any, rows: int) -> bool:
    return np.ndim(x) > 0 and np.shape(x)[0] == rows


def _parts_of_rows(batch: Batch) -> int:
    """How many times the rows that this process hands in make a whole batch."""
    if jax.process_count() == 1 or any(
        isinstance(x, jax.Array) and not x.is_fully_addressable for x in batch.values()
    ):
        return 1
    mesh = jax.sharding.get_mesh()
    axes = tuple(axis for axis in sharding.BATCH if mesh.shape[axis] > 1)
    shards = math.prod(mesh.shape[axis] for axis in axes)
    here = distributed.local_rows(NamedSharding(mesh, PartitionSpec(axes or None)), shards)
    return shards // len(here)


# --- Evaluation ----------------------------------------------------------------------------------
def evaluate(model: nnx.Module, objective: Objective, batches: Iterable[Batch]) -> dict[str, Any]:
    """What `evaluator` finds, compiled for this call only."""
    return evaluator(objective)(model, batches)


def evaluator(objective: Objective) -> Callable[[nnx.Module, Iterable[Batch]], dict[str, Any]]:
    """A function of model and batches, compiled once: the objective's metrics over all batches.

    Its result has `loss` and every other fractional scalar, as means over all that counts; `count`
    and other whole scalars, as sums; and the sum of `expert_load`, None without experts. It raises
    ValueError if there is no batch, or if no token in it counts.
    """
    measure = jax.jit(lambda model, batch: objective(model, batch)[1])

    def run(model: nnx.Module, batches: Iterable[Batch]) -> dict[str, Any]:
        sums: dict[str, Any] = {}
        load = None
        for batch in batches:
            if jax.process_count() > 1:
                batch = spread(batch)
            metrics = jax.device_get(measure(model, batch))
            more = metrics.pop("expert_load", None)
            load = more if load is None else load + more
            count = int(metrics["count"])
            for name, x in metrics.items():
                if np.ndim(x) == 0:
                    whole = jnp.issubdtype(x.dtype, jnp.integer)
                    value = int(x) if whole else float(x) * count
                    sums[name] = sums.get(name, 0 if whole else 0.0) + value
        if not sums.get("count"):
            raise ValueError("nothing to evaluate: no batch has a token that counts")
        count = sums["count"]
        means = {name: x / count if isinstance(x, float) else x for name, x in sums.items()}
        return {**means, "expert_load": load}

    return run
