"""Adapters as PEFT keeps them: a directory that `peft.PeftModel` loads beside transformers' model.

    peft.save(model, "adapter")                  # adapter_config.json, adapter_model.safetensors
    model = peft.load(base, "adapter")

A torch weight W (out, in) gets scale · B A, with B (out, r) and A (r, in): `lora_B` and `lora_A`.
The sides that our layout reorders (heads, rotated pairs) go through the tables that reorder the
weights. Routed experts of Llama 4 are one parameter (e, in, out), which PEFT adapts by way of
`target_parameters`: as its module does not say otherwise, PEFT takes the parameter for (e, out, in)
and calls our b `lora_A` (e · r, out) and our a `lora_B` (in, r · e). Gate and up projections being
one tensor, they have one A and one B, of both ranks together. Written for PEFT 0.21, against which
tests/parity/test_peft.py holds it; PEFT says that it ignores the pattern of such a rank, and heeds
it all the same. Other readers may know dense layers only: `lora.merge` and export the whole model.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

import l4jax.checkpoints.llama3 as llama3
import l4jax.checkpoints.llama4 as llama4
from l4jax import lora, weights
from l4jax.checkpoints.directory import new_directory
from l4jax.checkpoints.formats import is_llama3, model_of, places_in, some
from l4jax.checkpoints.safetensors import Tensor, scan_file, write, write_json
from l4jax.checkpoints.tables import Match, expand
from l4jax.models.llama4 import Llama
from l4jax.weights import Matrix

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_BEFORE = "base_model.model."
_FIXED = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
}
"""With other settings an adapter would be more than scale · B A."""


class Factors(NamedTuple):
    """scale · Σ_r a · b of one layer's matrix: a [e… in… r], b [e… out… r]."""

    a: np.ndarray
    b: np.ndarray
    scale: float


class Pair(NamedTuple):
    """What PEFT keeps of scale · B A: the weights called lora_A and lora_B."""

    a: np.ndarray
    b: np.ndarray
    rank: int
    scale: float


class Part(NamedTuple):
    """One layer's share of a matrix of ours: its number in the stack, None if it is no stack."""

    matrix: Matrix
    period: int | None


# --- Writing -------------------------------------------------------------------------------------
def save(
    model: Llama, path: str | os.PathLike[str], *, base: str | None = None, prefix: str = ""
) -> None:
    """Writes a model's adapters as a new directory, which appears whole or not at all.

    Args:
        model: with adapters (`l4jax.lora`).
        path: must not exist, or be an empty directory.
        base: where the model without adapters is found, for those who open only the adapter.
        prefix: before the names of the text model's modules: "language_model." for a Llama 4 that
            is loaded with its vision part.

    Raises:
        FileExistsError: something is already there.
        ValueError: the model has no adapters.
    """
    pairs = _pairs(model)
    if not pairs:
        raise ValueError("the model has no adapters to save; lora.apply gives it some")
    every = [_module(match.theirs) for match in _matches(model)]
    kinds = collections.Counter((pair.rank, pair.scale) for pair in pairs.values())
    ((rank, scale), _), *_ = kinds.most_common()
    own = {
        prefix + _module(name): pair
        for name, pair in pairs.items()
        if (pair.rank, pair.scale) != (rank, scale)
    }
    modules = [_module(name) for name in pairs if not _is_experts(name)]
    parameters = [name for name in pairs if _is_experts(name)]
    config = _FIXED | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "rank_pattern": {name: pair.rank for name, pair in own.items()},
        "alpha_pattern": {name: pair.scale * pair.rank for name, pair in own.items()},
        "target_modules": _targets(modules, every, prefix),
        "target_parameters": _targets(parameters, every, prefix) or None,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors = []
    for name, pair in pairs.items():
        for letter, x in (("A", pair.a), ("B", pair.b)):
            key = _key(prefix + name, letter, parameters)
            tensors.append(Tensor(key, x.shape, x.dtype, functools.partial(np.asarray, x)))
    with new_directory(path) as directory:
        if jax.process_index() == 0:
            write(directory, tensors, max_shard_bytes=2**62)
            os.replace(directory / "model.safetensors", directory / TENSORS)
            write_json(directory / CONFIG, config)


def _pairs(model: Llama) -> dict[str, Pair]:
    """What PEFT keeps, by the name of the tensor in transformers' model."""
    parts, found = _parts(model), {}
    for match in _matches(model):
        mine = [parts[name] for name in match.ours]
        factors = [_factors(part) for part in mine]
        if _is_experts(match.theirs) and any(factors):
            found[match.theirs] = _experts_pair([part.matrix for part in mine], factors)
        elif factors[0] is not None:
            found[match.theirs] = _module_pair(match, mine[0].matrix, factors[0])
    return found


def _factors(part: Part) -> Factors | None:
    """A layer's adapter on the host; None if it has none."""
    matrix, value = part.matrix, part.matrix.value
    if not isinstance(value, lora.LowRank):
        return None
    a, b = (_host(x) if part.period is None else _host(x)[part.period] for x in (value.a, value.b))
    experts = matrix.batch[matrix.stack :]
    rank = a.shape[-1]
    return Factors(
        a.reshape(*experts, *matrix.inputs, rank),
        b.reshape(*experts, *matrix.outputs, rank),
        value.scale,
    )


def _host(x: jax.Array) -> np.ndarray:
    """All of an array, whoever holds its parts."""
    if not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _module_pair(match: Match, matrix: Matrix, factors: Factors) -> Pair:
    """Of a linear module. A side of several dimensions is reordered as the weight's would be."""
    a, b, scale = factors
    layout = match.layout
    return Pair(
        np.ascontiguousarray(a.T if len(matrix.inputs) == 1 else layout.save((a,))),
        np.ascontiguousarray(
            b if len(matrix.outputs) == 1 else layout.save((np.moveaxis(b, -1, 0),))
        ),
        a.shape[-1],
        scale,
    )


def _experts_pair(matrices: Sequence[Matrix], factors: Sequence[Factors | None]) -> Pair:
    """Of routed experts: ours behind each other along the rank, outputs in their halves."""
    scale = next(x.scale for x in factors if x is not None)
    widths = [matrix.outputs[0] for matrix in matrices]
    a = np.concatenate([x.a for x in factors if x is not None], axis=-1)
    b, column, row = np.zeros((a.shape[0], sum(widths), a.shape[-1]), a.dtype), 0, 0
    for width, x in zip(widths, factors, strict=True):
        if x is not None:
            rank = x.b.shape[-1]
            b[:, column : column + width, row : row + rank] = x.b * (x.scale / scale)
            row += rank
        column += width
    e, d, r = a.shape
    lora_a = np.ascontiguousarray(b.swapaxes(1, 2)).reshape(e * r, -1)
    return Pair(lora_a, np.ascontiguousarray(a.transpose(1, 2, 0)).reshape(d, r * e), r, scale)


def _targets(names: Sequence[str], every: Sequence[str], prefix: str) -> list[str]:
    """What PEFT is told to adapt: the ends of names where they mean just these, else the names."""
    for length in (1, 2):
        ends = sorted({".".join(name.split(".")[-length:]) for name in names})
        if {name for name in every if _ends(name, ends)} == set(names):
            return ends
    return [prefix + name for name in names]


# --- Reading -------------------------------------------------------------------------------------
def load(model: Llama, path: str | os.PathLike[str], *, prefix: str = "") -> Llama:
    """The model with the adapters in a directory of PEFT's, to use, train on or merge.

    Layers that are stacked have adapters of one rank here: missing ones are 0 there, and where all
    of a layer's are, they stay 0 in training.

    Args:
        model: without adapters.
        path: with adapter_config.json and adapter_model.safetensors.
        prefix: see `save`.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: the adapter is of another kind or for another model; the message says what.
    """
    directory = pathlib.Path(path)
    for name in (CONFIG, TENSORS):
        if not (directory / name).exists():
            raise FileNotFoundError(f"{directory / name}: no such file")
    config = json.loads((directory / CONFIG).read_text())
    for name, value in _FIXED.items():
        if config.get(name, value) not in (value, None, []):
            raise ValueError(
                f"{directory / CONFIG}: {name} {config[name]!r} is not supported; only {value!r} is"
            )
    entries = scan_file(directory / TENSORS)
    named = config.get("target_parameters") or ()
    matches = _matches(model)
    parameters = [
        x.theirs for x in matches if _is_experts(x.theirs) and _ends(prefix + x.theirs, named)
    ]
    parts = _parts(model)
    found: dict[str, Factors] = {}
    for match in matches:
        keys = [_key(prefix + match.theirs, letter, parameters) for letter in "AB"]
        if _is_experts(match.theirs) and match.theirs not in parameters or keys[0] not in entries:
            continue
        if keys[1] not in entries:
            raise ValueError(f"{directory / TENSORS}: lacks {keys[1]}, which belongs to {keys[0]}")
        a, b = (np.asarray(entries.pop(key).read(), np.float32) for key in keys)
        mine = [parts[name].matrix for name in match.ours]
        read = _experts_factors if _is_experts(match.theirs) else _module_factors
        scale = _scale(config, prefix + _module(match.theirs))
        try:
            found |= zip(match.ours, read(match, mine, a, b, scale), strict=True)
        except ValueError:
            raise ValueError(
                f"{directory / TENSORS}: {keys[0]} and {keys[1]} have shapes {a.shape} and "
                f"{b.shape}, which do not fit {match.theirs} of this model"
            ) from None
    if entries:
        raise ValueError(f"{directory / TENSORS}: the model has no place for {some(entries)}")
    return weights.replaced(model, _values(parts, found))


def _scale(config: Mapping[str, Any], module: str) -> Any:
    """A function from the rank to the scale, as PEFT's patterns and settings give it."""
    alpha = next(
        (
            x
            for pattern, x in (config.get("alpha_pattern") or {}).items()
            if re.match(rf"(.*\.)?({pattern})$", module)
        ),
        config["lora_alpha"],
    )
    root = config.get("use_rslora", False)
    return lambda rank: float(alpha) / (rank**0.5 if root else rank)


def _module_factors(
    match: Match, matrices: Sequence[Matrix], a: np.ndarray, b: np.ndarray, scale: Any
) -> list[Factors]:
    """The inverse of `_module_pair`."""
    (matrix,), rank = matrices, a.shape[0]
    ours = a.T if len(matrix.inputs) == 1 else match.layout.load(a)[0]
    if len(matrix.outputs) > 1:
        b = np.moveaxis(match.layout.load(b)[0], 0, -1)
    return [
        Factors(ours.reshape(*matrix.inputs, rank), b.reshape(*matrix.outputs, rank), scale(rank))
    ]


def _experts_factors(
    match: Match, matrices: Sequence[Matrix], a: np.ndarray, b: np.ndarray, scale: Any
) -> list[Factors]:
    """Of each part of a tensor of experts; parts share the inputs' factor."""
    experts, inputs = matrices[0].batch[-1], matrices[0].fan_in
    rank = a.shape[0] // experts
    ours = b.reshape(inputs, rank, experts).transpose(2, 0, 1)
    outs = a.reshape(experts, rank, sum(x.outputs[0] for x in matrices)).swapaxes(1, 2)
    ends = np.cumsum([x.outputs[0] for x in matrices])[:-1]
    return [Factors(ours, x, scale(rank)) for x in np.split(outs, ends, axis=1)]


def _values(parts: Mapping[str, Part], found: Mapping[str, Factors]) -> dict[str, lora.LowRank]:
    """The adapted matrices of the model, each in its place, by name."""
    layers: dict[str, dict[int | None, Factors]] = {}
    matrices = {part.matrix.name: part.matrix for part in parts.values()}
    for name, factors in found.items():
        part = parts[name]
        layers.setdefault(part.matrix.name, {})[part.period] = factors
    values = {}
    for name, own in layers.items():
        matrix, first = matrices[name], next(iter(own.values()))
        rank = max(x.a.shape[-1] for x in own.values())
        like = lora.outline(matrix, rank, first.scale)
        a, b = np.zeros(like.a.shape, np.float32), np.zeros(like.b.shape, np.float32)
        for period, x in own.items():
            at = ... if period is None else period
            r = x.a.shape[-1]
            a[at][..., :r] = x.a.reshape(*a[at].shape[:-1], r)
            b[at][..., :r] = x.b.reshape(*b[at].shape[:-1], r) * (x.scale / first.scale)
        place = weights.place(matrix.param, like)
        values[name] = dataclasses.replace(
            like, a=jax.device_put(a, place.a), b=jax.device_put(b, place.b)
        )
    return values


# --- Names ---------------------------------------------------------------------------------------
def _parts(model: Llama) -> dict[str, Part]:
    """Every layer's matrices by canonical name."""
    every = {matrix.name: matrix for matrix in weights.matrices(model, weights.EVERY)}
    return {
        name: Part(every[stem], place.period)
        for name, place in places_in(model).items()
        if (stem := ".".join(map(str, place.path))) in every
    }


def _matches(model: Llama) -> list[Match]:
    """The tensors that hold matrices, in transformers' names."""
    family = llama3 if is_llama3(model_of(model)) else llama4
    known = _parts(model)
    every = [match for match, _ in expand(family.rules(model.config), model.config)]
    return [match for match in every if match.ours[0] in known]


def _is_experts(theirs: str) -> bool:
    """Whether a tensor is a parameter of a module of experts, and not a module's weight."""
    return not theirs.endswith(".weight")


def _module(theirs: str) -> str:
    return theirs.removesuffix(".weight")


def _ends(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _key(theirs: str, letter: str, parameters: Sequence[str]) -> str:
    """PEFT's name of a factor. Of two adapted parameters of a module the last one is outermost."""
    module = _module(theirs)
    if _is_experts(theirs):
        module, _, name = theirs.rpartition(".")
        both = {x.rpartition(".")[2] for x in parameters if _ends(module, [x.rpartition(".")[0]])}
        if len(both) == 2 and name == "gate_up_proj":
            module += ".base_layer"
    return f"{_BEFORE}{module}.lora_{letter}.weight"
