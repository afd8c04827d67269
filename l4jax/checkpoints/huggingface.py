"""A model from and to a Hugging Face directory: config.json beside safetensors."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import l4jax.checkpoints.llama3 as llama3
import l4jax.checkpoints.llama4 as llama4
import l4jax.checkpoints.safetensors as safetensors
from l4jax import sharding
from l4jax.checkpoints.fields import Fields
from l4jax.checkpoints.tables import (
    Match,
    Place,
    check_complete,
    expand,
    places,
    their_shape,
)
from l4jax.config import Execution, TextConfig
from l4jax.models.llama4 import Llama

_FLOATS = ("float32", "bfloat16", "float16", "float64")
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
"""Buffers that early transformers versions saved; RoPE is computed."""


class Source(NamedTuple):
    """What a directory holds: the architecture, its tensors, and how their names begin."""

    config: TextConfig
    matches: list[Match]
    entries: dict[str, safetensors.Entry]


def read_config(file: pathlib.Path) -> tuple[TextConfig, str]:
    """The architecture in a config.json, and the prefix of its text tensors.

    Raises:
        ValueError: it is no JSON object, of another architecture, or has a field that we do not
            know and that might matter.
    """
    try:
        values = json.loads(file.read_text())
        kind = values["model_type"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: no valid model configuration: {error!r}") from None
    if "quantization_config" in values:
        raise ValueError(f"{file}: quantized checkpoints (quantization_config) are not supported")
    if kind == "llama4":
        whole = Fields(values, str(file))
        text = whole.take("text_config", dict)
        whole.take("vision_config", dict, None)
        for name in ("boi_token_index", "eoi_token_index", "image_token_index"):
            whole.take(name, int, None)
        whole.expect("tie_word_embeddings", text.get("tie_word_embeddings", False))
        whole.finish()
        fields, prefix = Fields(text, f"{file}: text_config"), llama4.TEXT_PREFIX
    else:
        fields, prefix = Fields(values, str(file)), ""
    family = {**dict.fromkeys(llama4.MODEL_TYPES, llama4), "llama": llama3}.get(kind)
    if family is None:
        raise ValueError(
            f"{file}: model_type {kind!r} is not supported; "
            f"supported are {', '.join((*llama3.MODEL_TYPES, *llama4.MODEL_TYPES))}"
        )
    try:
        config = family.config_from(fields)
    except ValueError as error:
        raise ValueError(f"{file}: {str(error).removeprefix(f'{fields.source}: ')}") from None
    fields.finish()
    return config, prefix


def inspect(directory: pathlib.Path) -> Source:
    """What is in a directory, checked: every tensor is there once, with the right shape.

    Vision tensors of a `llama4` checkpoint are left aside: the text part is a model of its own.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a tensor is missing, unknown or of the wrong shape, or a file is damaged.
    """
    config, prefix = read_config(directory / "config.json")
    entries = safetensors.scan(directory)
    llama_3 = json.loads((directory / "config.json").read_text())["model_type"] == "llama"
    matches = list(
        expand(llama3.rules(config) if llama_3 else llama4.rules(config, prefix), config)
    )
    expected = {match.theirs for match in matches}
    other = llama4.VISION_PREFIXES if prefix else ()
    unknown = sorted(
        name
        for name in set(entries) - expected
        if not name.startswith(other) and not name.endswith(_IGNORED_SUFFIX)
    )
    if config.tie_embeddings:
        # Some exporters write the tied head as well; it can only repeat the embedding table.
        unknown = [name for name in unknown if not name.endswith("lm_head.weight")]
    if unknown:
        raise ValueError(f"{directory}: no rule matches {_some(unknown)}")
    missing = sorted(expected - set(entries))
    if missing:
        raise ValueError(f"{directory}: tensor missing: {_some(missing)}")
    shapes = _shapes(config)
    for match in matches:
        wanted = their_shape(match.layout, [shapes[name] for name in match.ours])
        found = entries[match.theirs]
        if found.shape != wanted:
            raise ValueError(
                f"{found.file}: {match.theirs} has shape {found.shape}; the configuration calls "
                f"for {wanted}"
            )
        if found.dtype.name not in _FLOATS:
            raise ValueError(
                f"{found.file}: {match.theirs} holds {found.dtype.name}; only "
                f"{', '.join(_FLOATS)} are read"
            )
    return Source(config, matches, entries)


def load(directory: pathlib.Path, *, dtype: str | None, execution: Execution | None) -> Llama:
    """The model in a directory, each parameter read straight to its devices.

    See `checkpoints.load` for the arguments. Raises what `inspect` raises.
    """
    source = inspect(directory)
    if execution is None:
        stored = source.entries[source.matches[0].theirs].dtype
        execution = Execution.for_parameters(dtype or stored)
    model = nnx.eval_shape(lambda: Llama(source.config, execution=execution, rngs=nnx.Rngs(0)))
    graph, abstract = nnx.split(model)
    flat = nnx.to_flat_state(abstract)
    known = places(source.config, model.periods, (path for path, _ in flat))
    check_complete(source.matches, known)
    holders: dict[tuple, list[tuple[Match, int, int | None]]] = {}
    for match in source.matches:
        for part, name in enumerate(match.ours):
            place = known[name]
            holders.setdefault(place.path, []).append((match, part, place.period))
    layout = dict(nnx.to_flat_state(sharding.shardings(abstract)))

    def fill(path: tuple, param: nnx.Variable) -> nnx.Variable:
        stored = {source.entries[match.theirs].dtype for match, _, _ in holders[path]}
        wanted = np.dtype(dtype) if dtype is not None else np.dtype(jnp.result_type(*stored))
        by_index = {index: (match, part) for match, part, index in holders[path]}

        def read(where: tuple[slice, ...] | None) -> np.ndarray:
            assert where is not None

            def one(index: int | None, inside: tuple[slice, ...]) -> np.ndarray:
                match, part = by_index[index]
                return match.layout.load(source.entries[match.theirs].read())[part][inside]

            if None in by_index:
                return one(None, where).astype(wanted)
            wanted_layers = range(len(by_index))[where[0]]
            return np.stack([one(i, where[1:]).astype(wanted) for i in wanted_layers])

        value = jax.make_array_from_callback(param.shape, layout[path].get_raw_value(), read)
        return param.replace(value)

    state = nnx.from_flat_state({path: fill(path, param) for path, param in flat})
    return nnx.merge(graph, state)


def save(
    model: Llama,
    directory: pathlib.Path,
    *,
    max_shard_bytes: int,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json and safetensors into an existing directory, one tensor at a time.

    Args:
        model: its parameters keep their type.
        directory: where the files go.
        max_shard_bytes: size at which a new file begins.
        extra: further fields of config.json, such as token ids.

    Raises:
        ValueError: the format cannot describe this architecture.
    """
    config = model.config
    family = llama3 if llama3.fits(config) else llama4
    matches = list(expand(family.rules(config), config))
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    known = places(config, model.periods, flat)
    check_complete(matches, known)

    def value(place: Place) -> np.ndarray:
        array = flat[place.path].get_raw_value()
        return np.asarray(array if place.period is None else array[place.period])

    def tensor(match: Match) -> safetensors.Tensor:
        spots = [known[name] for name in match.ours]
        arrays = [flat[spot.path].get_raw_value() for spot in spots]
        shapes = [
            a.shape if s.period is None else a.shape[1:] for a, s in zip(arrays, spots, strict=True)
        ]
        return safetensors.Tensor(
            match.theirs,
            their_shape(match.layout, shapes),
            np.dtype(arrays[0].dtype),
            lambda: match.layout.save(tuple(value(spot) for spot in spots)),
        )

    described = family.config_to(config) | {
        "torch_dtype": str(flat[("embed",)].get_raw_value().dtype),
        "transformers_version": "4.51.0",
        **(extra or {}),
    }
    safetensors.write(directory, map(tensor, matches), max_shard_bytes=max_shard_bytes)
    safetensors.write_json(directory / "config.json", described)


def _shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every canonical name."""
    model = nnx.eval_shape(lambda: Llama(config, execution=Execution(scan=False), rngs=nnx.Rngs(0)))
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    return {name: flat[place.path].shape for name, place in places(config, 0, flat).items()}


def _some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
