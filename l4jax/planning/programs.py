"""The programs that a plan compiles: the very functions that training and generation run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from l4jax import sharding
from l4jax.config import Execution, TextConfig
from l4jax.inference import decoding
from l4jax.inference.sampling import Sampling
from l4jax.models.llama4 import Llama, cache_specs
from l4jax.models.multimodal import Images, Multimodal
from l4jax.planning.meshes import UPDATES, Pictures, Work
from l4jax.training import objectives, optimizers, schedules, teacher
from l4jax.training.trainer import Update, batch_sharding, compiled

STEPS = decoding.PIECE
"""Tokens of each context that the program for decoding adds. What it does before and after them,
such as to lay the cache out for the kernels, counts in parts."""
_STOPS = 2
"""Ids that end a row, when planning a decode step."""
_SEGMENTS = 16
"""Answers in a row, when planning preferences."""
_NAMED = 64
"""Tokens that a teacher says the probability of, when planning distillation."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and what it is called with, as shapes and places on a mesh.

    parts: of the arguments, by what they are for.
    """

    mesh: Mesh
    rules: sharding.Rules
    function: Any
    arguments: tuple[Any, ...]
    static: dict[str, Any]
    parts: dict[str, Any]

    def lower(self) -> Any:
        """The program, traced for its mesh."""
        with sharding.use(self.mesh, self.rules):
            return self.function.lower(*self.arguments, **self.static)

    def bytes(self) -> dict[str, int]:
        """What every part of the arguments takes on one device."""
        return {name: _bytes(tree) for name, tree in self.parts.items()}


def program(config: TextConfig, work: Work, *, execution: Execution, mesh: Mesh) -> Program:
    """The step of a task.

    Args:
        config: the architecture.
        work: its task, rows, tokens and images. "train" reads rows of one document each, "sft"
            packed rows with masks, "dpo" packed pairs with what their reference says of them,
            computed before, "distill" packed rows with what a teacher says of them; all update
            float32 parameters with AdamW in float32. "teach" is that teacher's pass, "prefill"
            fills a cache with prompts, "decode" adds `STEPS` tokens to each context; these hold
            parameters in the type they compute in.
            Tiles of images come as float32 pixels, on the devices that read their rows.
        execution: how the model computes.
        mesh: of devices that may belong to nobody here.
    """
    task, rules = work.task, work.rules
    if task == "decode":
        # A loop over layers would copy each one's experts for the kernels, at every step.
        execution = dataclasses.replace(execution, scan=False)
    with sharding.use(mesh, rules):
        model = nnx.eval_shape(lambda: _model(config, work.images, execution))
        if task in UPDATES:
            function, arguments, parts = _update(model, work)
            return Program(mesh, rules, function, arguments, {}, parts)
        model = _placed(model, execution.dtype)
        make = {"teach": _teach, "prefill": _prefill, "decode": _decode}[task]
        function, arguments, static, parts = make(model, work)
        return Program(mesh, rules, function, (model, *arguments), static, parts)


def _model(config: TextConfig, images: Pictures | None, execution: Execution) -> Llama:
    if images is None:
        return Llama(config, execution=execution, rngs=nnx.Rngs(0))
    return Multimodal(config, images.config, execution=execution, rngs=nnx.Rngs(0))


def _update(model: Llama, work: Work) -> tuple[Callable, tuple, dict]:
    batch, seq, task, images = work.batch, work.length, work.task, work.images
    schedule = schedules.warmup_cosine(1e-4, steps=10_000, warmup=100)
    others = {"dpo": objectives.dpo(), "distill": objectives.distill()}
    objective = others.get(task) or objectives.next_token()
    frozen = images is not None and images.frozen
    trainable = (lambda name: not name.startswith("vision.")) if frozen else None
    update = Update(model, objective, optimizers.adamw(schedule), trainable=trainable)
    state, place = update.abstract(), batch_sharding(batch, seq)
    rows = _rows(work, packed=task != "train")
    if task == "dpo":
        rows["reference"] = _array((batch, _SEGMENTS), np.float32, *place.spec[:1])
    if task == "distill":
        for name, kind in (("teacher_ids", np.int32), ("teacher_log_probs", np.float32)):
            rows[name] = _array((batch, seq, _NAMED), kind, *place.spec)
        rows["soft_weight"] = _array((), np.float32)
    parts = {"parameters": state.params, "optimizer": state.optimizer}
    return compiled(update), (state, rows), parts


def _rows(work: Work, *, packed: bool) -> dict[str, Any]:
    """Rows of tokens of a step, and of tiles where they have images."""
    shape = (work.batch, work.length)
    place = batch_sharding(*shape)
    kinds: dict[str, Any] = {"tokens": np.int32}
    if packed:
        kinds |= {"segment_ids": np.int32, "positions": np.int32, "loss_mask": np.bool_}
    if work.images is not None:
        kinds["places"] = np.int32
    rows: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(shape, kind, sharding=place) for name, kind in kinds.items()
    }
    if work.images is not None:
        rows["tiles"] = _tiles(work.images, work.batch * work.images.tiles, *place.spec[:1])
    return rows


def _teach(model: Llama, work: Work) -> tuple[Callable, tuple, dict, dict]:
    rows = _rows(work, packed=True)
    return teacher.top_tokens(model, _NAMED).function, (rows,), {}, {"parameters": model}


def _prefill(model: Llama, work: Work) -> tuple[Callable, tuple, dict, dict]:
    batch, seq = work.batch, work.length
    rows, context = sharding.token_axes(batch, seq)
    arguments: tuple[Any, ...] = (
        _array((batch, seq), np.int32, rows or None, context or None),
        _array((batch,), np.int32, rows or None),
        _array((), _key_type()),
        _array((_STOPS,), np.int32),
    )
    static = {"sampling": Sampling(temperature=0.0, top_k=None, top_p=1.0), "context": seq}
    if work.images is not None:
        tiles = batch * work.images.tiles
        cut, _ = sharding.token_axes(tiles)
        places = _array((batch, seq), np.int32, rows or None, context or None)
        static["images"] = Images(_tiles(work.images, tiles, cut or None), places)
    return decoding.compiled().prefill, arguments, static, {"parameters": model}


def _decode(model: Llama, work: Work) -> tuple[Callable, tuple, dict, dict]:
    batch, seq = work.batch, work.length
    rows, _ = sharding.token_axes(batch)
    shapes = jax.eval_shape(lambda: model.empty_cache(batch, seq))
    places = cache_specs(shapes, PartitionSpec(rows or None))
    cache = jax.tree.map(lambda x, spec: _array(x.shape, x.dtype, *spec), shapes, places)
    token, live = (_array((batch,), kind, rows or None) for kind in (np.int32, bool))
    state = decoding.State(token, live, cache)
    number = _array((), np.int32)
    arguments = state, _array((), _key_type()), _array((_STOPS,), np.int32), number, number
    static = {"sampling": Sampling(temperature=0.0, top_k=None, top_p=1.0)}
    return decoding.compiled().advance, arguments, static, {"parameters": model, "cache": cache}


def _tiles(images: Pictures, count: int, *axes: Any) -> Any:
    c = images.config
    return _array((count, c.channels, c.image_size, c.image_size), np.float32, *axes)


def _placed(model: Llama, dtype: str) -> Llama:
    """The model with every parameter in this type, in its place."""
    graph, state = nnx.split(model)
    places = sharding.shardings(state)
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=place),
        state,
        places,
    )
    return nnx.merge(graph, state)


def _array(shape: tuple[int, ...], dtype: Any, *axes: Any) -> Any:
    """What stands for an array: its shape, and its place on the mesh."""
    place = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def _key_type() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0)).dtype


def _bytes(tree: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
