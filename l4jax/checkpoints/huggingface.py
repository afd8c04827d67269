"""Hugging Face directories: config.json beside safetensors, to be read and to be written."""

from __future__ import annotations

import copy
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

import l4jax.checkpoints.compressed as compressed
import l4jax.checkpoints.llama3 as llama3
import l4jax.checkpoints.llama4 as llama4
import l4jax.checkpoints.safetensors as safetensors
import l4jax.checkpoints.vision as vision
from l4jax.checkpoints.fields import Fields
from l4jax.checkpoints.formats import (
    FLOATS,
    SCALE,
    Model,
    Source,
    Spec,
    Target,
    array_shapes,
    base,
    have_sizes,
    is_llama3,
    make_files,
    model_of,
    our_shape,
    places_in,
    some,
)
from l4jax.checkpoints.rows import Cell, Joined, Rows, Sum
from l4jax.checkpoints.tables import SAME, Match, check_complete, expand, their_shape
from l4jax.config import TextConfig
from l4jax.kernels.quantized import DTYPES, Quantized, Scheme, scheme_of
from l4jax.models.llama4 import Llama

CONFIG = "config.json"
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
"""Buffers that early transformers versions saved; RoPE is computed."""
_WRITTEN_BY = "4.51.0"
"""The first transformers version that reads what we write."""


class Description(NamedTuple):
    """What a config.json says. prefix: how the names of text tensors begin."""

    model: Model
    family: ModuleType
    prefix: str
    values: dict[str, Any]


class Part(NamedTuple):
    """One of their tensors: its match, its shape, and the stored tensors that make it up.

    names: one, or one for each of its rows.
    kinds: the types that it may have.
    """

    match: Match
    shape: tuple[int, ...]
    names: list[str]
    kinds: tuple[str, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of each stored tensor."""
        return self.shape if len(self.names) == 1 else self.shape[1:]


def describe(file: pathlib.Path) -> Description:
    """The architecture in a config.json.

    Raises:
        ValueError: it is no JSON object, of another architecture, quantized in a way that is not
            read, or has a field that we do not know and that might matter.
    """
    try:
        values = json.loads(file.read_text())
        kind = values["model_type"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: no valid model configuration: {error!r}") from None
    family = {**dict.fromkeys(llama4.MODEL_TYPES, llama4), "llama": llama3}.get(kind)
    if family is None:
        raise ValueError(
            f"{file}: model_type {kind!r} is not supported; "
            f"supported are {', '.join((*llama3.MODEL_TYPES, *llama4.MODEL_TYPES))}"
        )
    whole = Fields(values, str(file))
    compressed.check(whole.take("quantization_config", dict, None), str(file))
    images = None
    if kind == "llama4":
        text = whole.take("text_config", dict)
        seen = whole.take("vision_config", dict, None)
        images = seen and vision.config_from(Fields(seen, f"{file}: vision_config"))
        for name in ("boi_token_index", "eoi_token_index", "image_token_index"):
            whole.take(name, int, None)
        whole.expect("tie_word_embeddings", text.get("tie_word_embeddings", False))
        whole.finish()
        fields, prefix = Fields(text, f"{file}: text_config"), llama4.TEXT_PREFIX
    else:
        fields, prefix = whole, ""
    try:
        config = family.config_from(fields)
    except ValueError as error:
        raise ValueError(f"{file}: {str(error).removeprefix(f'{fields.source}: ')}") from None
    fields.finish()
    return Description(Model(config, images or None), family, prefix, values)


# --- Reading -------------------------------------------------------------------------------------
def source(directory: pathlib.Path) -> Source:
    """What is in a directory, checked: every tensor is there once, with the right shape.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a tensor is missing, unknown or of the wrong shape, or a file is damaged.
    """
    found = describe(directory / CONFIG)
    entries = safetensors.scan(directory)
    text, images = found.model
    if not any(name.startswith(vision.HF_PREFIXES) for name in entries):
        images = None
    found = found._replace(model=Model(text, images))
    shapes = array_shapes(found.model)
    parts = _parts_in(found, entries, shapes)
    _check_names(directory, {name for part in parts for name in part.names}, entries)
    tensors: dict[str, Rows] = {}
    arrays: dict[str, Spec] = {}
    for part in parts:
        _check_part(part, entries)
        whole = tensors[part.match.theirs] = _joined(part, entries)
        packed = part.match.theirs.endswith(compressed.PACKED)
        for name in part.match.ours:
            shape = shapes.get(name) or our_shape(part.match.layout, part.shape)
            arrays[name] = Spec(shape, DTYPES["int4"] if packed else whole.dtype)
    files = (directory / CONFIG, *sorted({entry.file for entry in entries.values()}))
    matches = [part.match for part in parts]
    described = {"huggingface": found.values}
    return Source("hf", directory, found.model, arrays, matches, tensors, described, files)


def _parts_in(
    found: Description,
    entries: Mapping[str, safetensors.Entry],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[Part]:
    """The tensors that a directory should hold, given which experts and scales are there."""
    split = any(".experts.0." in name for name in entries)
    parts = []
    table = _table(found, split_experts=split)
    if found.model.text.tie_embeddings and (head := f"{found.prefix}lm_head.weight") in entries:
        # Some exporters write the tied head as well; it can only repeat the embedding table.
        table.append(Match(head, ("embed",), SAME))
    for match in table:
        shape = their_shape(match.layout, [shapes[name] for name in match.ours])
        stem = match.theirs.removesuffix(".weight")
        scale = entries.get(_stored(stem + compressed.SCALED, found.model.text)[0])
        if scale is None:
            parts.append(_part(match, shape, FLOATS, found.model.text))
            continue
        values = entries.get(_stored(match.theirs, found.model.text)[0])
        scheme = "int4" if values is None else scheme_of(values.dtype)
        if scheme is None:
            assert values is not None
            raise ValueError(
                f"{values.file}: {match.theirs} has a scale, so it should hold int8 or "
                f"float8_e4m3fn; it holds {values.dtype.name}"
            )
        groups = scale.shape[-1] if scale.shape and shape[-1] % (scale.shape[-1] or 1) == 0 else 1
        parts += _quantized(match, shape, (*shape[:-1], groups), scheme, found.model.text)
    return parts


def _table(found: Description, *, split_experts: bool) -> list[Match]:
    """Every tensor of the unquantized model."""
    config, images = found.model
    if found.family is llama3:
        rules = llama3.rules(config)
    else:
        rules = llama4.rules(config, found.prefix, split_experts=split_experts)
    matches = [match for match, _ in expand(rules, config)]
    if images is not None:
        arrays = vision.arrays(images, config.embed_dim)
        matches += vision.matches(arrays, lambda array: array.hf)
    return matches


def _part(match: Match, shape: tuple[int, ...], kinds: tuple[str, ...], config: TextConfig) -> Part:
    return Part(match, shape, _stored(match.theirs, config), kinds)


def _quantized(
    match: Match,
    shape: tuple[int, ...],
    scale: tuple[int, ...],
    scheme: Scheme,
    config: TextConfig,
) -> list[Part]:
    """The tensors of one weight in compressed-tensors' format."""
    kinds = {
        compressed.PACKED: ("int32",),
        compressed.SCALED: FLOATS,
        compressed.SHAPE: ("int64", "int32"),
    }
    found = []
    for part, its_shape in compressed.split(
        match, shape, scale, scheme, config.attention.num_heads
    ):
        suffix = next((s for s in kinds if part.theirs.endswith(s)), "")
        kind = kinds.get(suffix, (DTYPES[scheme].name,))
        found.append(_part(part, its_shape, kind, config))
    return found


def _stored(theirs: str, config: TextConfig) -> list[str]:
    """The stored tensors that make up theirs: one, or one for every expert."""
    if "{e}" not in theirs:
        return [theirs]
    assert config.moe is not None
    return [theirs.format(e=e) for e in range(config.moe.num_experts)]


def _joined(part: Part, entries: Mapping[str, safetensors.Entry]) -> Joined:
    """Theirs from its stored tensors, each of which is one row of it if there are several."""
    if len(part.names) == 1:
        return Joined([Cell(part.names[0], entries[part.names[0]])])
    row = (1, *part.shape[1:])
    return Joined([Cell(name, entries[name], shape=row) for name in part.names])


def _check_names(
    directory: pathlib.Path, expected: set[str], entries: Mapping[str, safetensors.Entry]
) -> None:
    """Raises ValueError naming tensors that no rule matches, or that are missing."""
    unknown = sorted(name for name in set(entries) - expected if not _ignored(name))
    if unknown:
        raise ValueError(f"{directory}: no rule matches {some(unknown)}")
    missing = sorted(expected - set(entries))
    if missing:
        raise ValueError(f"{directory}: tensor missing: {some(missing)}")


def _ignored(name: str) -> bool:
    return name.endswith(_IGNORED_SUFFIX)


def _check_part(part: Part, entries: Mapping[str, safetensors.Entry]) -> None:
    """Raises ValueError if a stored tensor has another shape, or a type that it may not have."""
    for name in part.names:
        found = entries[name]
        if found.shape != part.stored_shape:
            raise ValueError(
                f"{found.file}: {name} has shape {found.shape}; the configuration calls for "
                f"{part.stored_shape}"
            )
        if found.dtype.name not in part.kinds or found.dtype != entries[part.names[0]].dtype:
            kinds = (
                part.kinds
                if found.dtype.name not in part.kinds
                else (f"{entries[part.names[0]].dtype.name} as in {part.names[0]}",)
            )
            raise ValueError(
                f"{found.file}: {name} holds {found.dtype.name}; only {', '.join(kinds)} are read"
            )


# --- Writing -------------------------------------------------------------------------------------
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
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    arrays: dict[str, tuple[Any, int | None]] = {}
    for name, place in places_in(model).items():
        value = flat[place.path].get_raw_value()
        if isinstance(value, Quantized):
            arrays[name + SCALE] = value.scale, place.period
            value = value.values
        arrays[name] = value, place.period
    wanted = {
        name: Spec(x.shape if period is None else x.shape[1:], np.dtype(x.dtype))
        for name, (x, period) in arrays.items()
    }
    kind = model_of(model)
    floating = {base(name) for name in wanted}
    check_complete(_table(_description(kind, None), split_experts=False), floating)
    new = target(
        kind,
        wanted,
        directory,
        described={},
        max_shard_bytes=max_shard_bytes,
        extra=extra,
    )
    new.create()
    sums: dict[str, Sum] = {}
    for match in new.matches:
        parts = tuple(
            np.asarray(x if period is None else x[period])
            for x, period in (arrays[name] for name in match.ours)
        )
        tensor = new.tensors[match.theirs]
        tensor.write(0, np.asarray(match.layout.save(parts)))
        sums |= tensor.sums()
    new.finish(sums)


def target(
    model: Model,
    wanted: Mapping[str, Spec],
    directory: pathlib.Path,
    *,
    described: Mapping[str, Any],
    max_shard_bytes: int,
    extra: Mapping[str, Any] | None = None,
) -> Target:
    """A directory to be written, with these arrays.

    Args:
        model: what the arrays make up.
        wanted: shape and type of every canonical array, scales included.
        directory: where the files go.
        described: what the source says of the model; its `huggingface` part is kept.
        max_shard_bytes: size at which a new safetensors file begins.
        extra: further fields of config.json.

    Raises:
        ValueError: the format cannot describe this architecture or these scales.
    """
    found = _description(model, described.get("huggingface"))
    split = model.text.moe is not None and any(name.endswith(SCALE) for name in wanted)
    parts = _parts_for(found, wanted, split=split)
    shards = safetensors.plan(
        directory,
        ((n, part.stored_shape, np.dtype(part.kinds[0])) for part in parts for n in part.names),
        max_shard_bytes=max_shard_bytes,
    )
    entries = {name: entry for shard in shards for name, entry in shard.entries.items()}
    values = copy.deepcopy(found.values) | dict(extra or {})
    floats = wanted["embed"].dtype.name
    for section in (values, values.get("text_config"), values.get("vision_config")):
        if section is not None and (section is values or {"torch_dtype", "dtype"} & section.keys()):
            section.pop("dtype", None)
            section["torch_dtype"] = floats
    values.pop("quantization_config", None)
    if (quantization := _quantization(model, wanted, parts)) is not None:
        values["quantization_config"] = quantization

    files = {directory / shard.name: shard.size for shard in shards}

    def finish(sums: Mapping[str, Sum]) -> None:
        for shard in shards:
            with open(directory / shard.name, "r+b") as stream:
                stream.write(shard.header)
                stream.flush()
                os.fsync(stream.fileno())
        safetensors.write_index(directory, shards)
        safetensors.write_json(directory / CONFIG, values)

    return Target(
        matches=[part.match for part in parts],
        tensors={part.match.theirs: _joined(part, entries) for part in parts},
        size=sum(files.values()),
        intact=lambda: have_sizes(files),
        create=lambda: make_files(files),
        finish=finish,
    )


def _description(model: Model, values: dict[str, Any] | None) -> Description:
    """What the config.json of a model will say: what it said before if that is the same model."""
    family = llama3 if is_llama3(model) else llama4
    if values is not None and model.vision is None and "text_config" in values:
        # Only the text part is there: its own section describes it.
        values = values["text_config"] | {"architectures": ["Llama4ForCausalLM"]}
    if values is not None:
        family = llama3 if values["model_type"] in llama3.MODEL_TYPES else llama4
        prefix = llama4.TEXT_PREFIX if "text_config" in values else ""
        return Description(model, family, prefix, values)
    text = family.config_to(model.text) | {"transformers_version": _WRITTEN_BY}
    if model.vision is None:
        return Description(model, family, "", text)
    values = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "tie_word_embeddings": model.text.tie_embeddings,
        **llama4.IMAGE_TOKENS,
        "text_config": text,
        "vision_config": vision.config_to(model.vision),
    }
    return Description(model, family, llama4.TEXT_PREFIX, values)


def _parts_for(found: Description, wanted: Mapping[str, Spec], *, split: bool) -> list[Part]:
    """The tensors that hold these arrays; the first of each one's kinds is the type to write."""
    config = found.model.text
    parts = []
    for match in _table(found, split_experts=split):
        first = wanted[match.ours[0]]
        shape = their_shape(match.layout, [wanted[name].shape for name in match.ours])
        scheme = scheme_of(first.dtype)
        if scheme is None:
            parts.append(_part(match, shape, (first.dtype.name,), config))
            continue
        layout = compressed.scale_layout(match.layout, config.attention.num_heads)
        spec = wanted.get(match.ours[0] + SCALE)
        if spec is None:
            raise ValueError(
                f"{match.ours[0]} holds {first.dtype.name} without a scale, which is no weight; "
                f"only {', '.join(FLOATS)} are written as they are"
            )
        scale = their_shape(layout, [spec.shape])
        if scheme != "int4" and scale[-1] != 1:
            raise ValueError(
                f"{match.ours[0]} has {scale[-1]} scales for each output channel; Hugging Face's "
                f"{scheme} packages have one. Ask for a floating-point type instead of "
                f"{scheme}, such as bfloat16"
            )
        for part in _quantized(match, shape, scale, scheme, config):
            scales = part.match.theirs.endswith(compressed.SCALED)
            parts.append(part._replace(kinds=(spec.dtype.name,)) if scales else part)
    return parts


def _quantization(
    model: Model, wanted: Mapping[str, Spec], parts: Iterable[Part]
) -> dict[str, Any] | None:
    """The `quantization_config` for these arrays; None if no array is quantized.

    Raises:
        ValueError: there are several schemes, or several sizes of groups.
    """
    schemes = sorted({s for spec in wanted.values() if (s := scheme_of(spec.dtype))})
    if not schemes:
        return None
    if len(schemes) > 1:
        raise ValueError(
            f"weights are in {' and '.join(schemes)}; Hugging Face's packages have one scheme: "
            f"quantize all in one, or write orbax"
        )
    shapes = {part.match.theirs: part.shape for part in parts}
    sizes = {
        8 * shape[-1] // shapes[name.removesuffix(compressed.PACKED) + compressed.SCALED][-1]
        for name, shape in shapes.items()
        if name.endswith(compressed.PACKED)
    }
    if len(sizes) > 1:
        raise ValueError(f"int4 groups of different sizes {sorted(sizes)} in one checkpoint")
    narrow = {
        name.removesuffix(compressed.SCALED)
        for part in parts
        for name in part.names
        if name.endswith(compressed.SCALED)
    }
    layers = [
        name.removesuffix(".weight")
        for part in parts
        for name in part.names
        if name.endswith("_proj.weight")
    ]
    return compressed.describe(
        schemes[0],
        groups=sizes.pop() if sizes else None,
        ignored=compressed.ignored(
            narrow, [name for name in layers if name not in narrow], llama3=is_llama3(model)
        ),
    )
