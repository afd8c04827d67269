"""Meta's own directories: params.json beside model-parallel shards `consolidated.NN.pth`.

Sources: Meta's `llama3/model.py`, `llama4/model.py`, `llama4/args.py`, `checkpoint.py` and
`llama4/scripts/quantize.py` (PyPI's llama-models). Every shard holds a part of every tensor; which
part, the family's table says.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

import l4jax.checkpoints.llama3 as llama3
import l4jax.checkpoints.llama4 as llama4
import l4jax.checkpoints.params as params
import l4jax.checkpoints.pth as pth
import l4jax.checkpoints.vision as vision
from l4jax.checkpoints.formats import (
    FLOATS,
    SCALE,
    Model,
    Source,
    Spec,
    Target,
    array_shapes,
    have_sizes,
    is_llama3,
    make_files,
    our_shape,
    some,
)
from l4jax.checkpoints.rows import Cell, Join, Joined, Rows, Sum
from l4jax.checkpoints.safetensors import Entry, write_json
from l4jax.checkpoints.tables import SAME, Layout, Match, expand, their_shape
from l4jax.kernels.quantized import DTYPES, pack_bytes, scheme_of, unpack_bytes

PARAMS = "params.json"
_SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
_DROPPED = re.compile(
    r".*_extra_state|rope\.freqs|.*\.(global|running)_gate_stats_3E|.*\.expert_activation_DE"
)
"""Left by training; no weights."""
_HEAD = "output.weight"
"""May be left out where it would repeat the embedding table."""
_EXPERTS = {"moe_w_in_eD_F": "w1", "moe_w_swiglu_eD_F": "w3", "moe_w_out_eF_D": "w2"}
"""What the files with scales call the experts' tensors."""
SCHEMES = ("fp8", "int4")


class Part(NamedTuple):
    """One of their tensors, spread over the shards.

    cell: the shape in which each shard's part is seen.
    stored: the shape in which it lies in the file.
    dtype: that it must have; None for any floating-point type.
    scales: whether it lies in the file with scales.
    packed: whether a byte of it is two int4 values, whatever type the file says.
    """

    match: Match
    join: Join
    cell: tuple[int, ...]
    stored: tuple[int, ...]
    dtype: np.dtype | None = None
    scales: bool = False
    packed: bool = False

    @property
    def name(self) -> str:
        """Its key in the file."""
        return self.match.theirs


def shard_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """The shards, in order.

    Raises:
        FileNotFoundError: there is none, or one is missing in between.
    """
    found = sorted(p for p in directory.iterdir() if _SHARD.fullmatch(p.name))
    for number, file in enumerate(found):
        expected = _shard_name(number)
        if file.name != expected:
            raise FileNotFoundError(
                f"{directory / expected}: missing, though {file.name} is there: shards are "
                f"numbered from 00 without gaps"
            )
    if not found:
        raise FileNotFoundError(f"{directory / _shard_name(0)}: missing")
    return found


def _shard_name(number: int) -> str:
    return f"consolidated.{number:02}.pth"


# --- Reading -------------------------------------------------------------------------------------
def source(directory: pathlib.Path) -> Source:
    """What is in a directory, checked: every shard has its part of every tensor.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a tensor is missing, unknown or of the wrong shape, or a file is damaged.
    """
    files = shard_files(directory)
    shards = [Shard(file, pth.scan_file(file), pth.stored_crcs(file)) for file in files]
    names = _check_alike(shards)
    scales = [
        Shard(file, pth.scan_file(file), pth.stored_crcs(file))
        for file in _scale_files(directory, len(files))
    ]
    _check_alike(scales)
    values = params.read(directory / PARAMS)
    shapes = {name: entry.shape for name, entry in shards[0].entries.items()}
    model = params.model_from(values, shapes, len(files))
    ours = array_shapes(model)
    parts = _parts(model, _scaled_in(scales), len(files))
    if model.text.tie_embeddings and _HEAD not in names:
        parts = [part for part in parts if part.name != _HEAD]
    _check_names(directory, {p.name for p in parts if not p.scales}, names)
    arrays: dict[str, Spec] = {}
    tensors: dict[str, Rows] = {}
    for part in parts:
        cells = [_cell(part, shard) for shard in (scales if part.scales else shards)]
        whole = tensors[part.match.theirs] = Joined(cells, part.join)
        for name in part.match.ours:
            shape = ours.get(name) or our_shape(part.match.layout, whole.shape)
            arrays[name] = Spec(shape, DTYPES["int4"] if part.packed else whole.dtype)
    looked_at = (directory / PARAMS, *files, *(shard.file for shard in scales))
    matches = [part.match for part in parts]
    described = {"meta": values}
    return Source("meta", directory, model, arrays, matches, tensors, described, looked_at)


class Shard(NamedTuple):
    """A file, its tensors, and the CRC-32 that it states of them."""

    file: pathlib.Path
    entries: dict[str, Entry]
    crcs: dict[str, int]


def _check_alike(shards: Sequence[Shard]) -> set[str]:
    """The names of the weights in every shard.

    Raises:
        ValueError: a shard lacks one that another has.
    """
    names: set[str] = set()
    for number, shard in enumerate(shards):
        there = {name for name in shard.entries if not _DROPPED.fullmatch(name)}
        if number and there != names:
            raise ValueError(
                f"{shard.file}: {some(sorted(there ^ names))} is not in both this shard and "
                f"{shards[0].file}"
            )
        names = there
    return names


def _cell(part: Part, shard: Shard) -> Cell:
    """A shard's part, with its shape and type checked."""
    entry = shard.entries.get(part.name)
    if entry is None:
        raise ValueError(f"{shard.file}: lacks {part.name}")
    if entry.shape != part.stored:
        raise ValueError(
            f"{entry.file}: {part.name} has shape {entry.shape}; {PARAMS} calls for {part.stored}"
        )
    kinds: tuple[str, ...] = FLOATS if part.dtype is None else (part.dtype.name,)
    if part.packed:
        kinds = ("float8_e4m3fn", "int8", "uint8")  # torch's parameters cannot be integers
    if entry.dtype.name not in kinds:
        raise ValueError(
            f"{entry.file}: {part.name} holds {entry.dtype.name}; only {', '.join(kinds)} are read"
        )
    return Cell(
        f"{entry.file.name}:{part.name}",
        entry,
        shape=part.cell,
        dtype=np.dtype(np.uint8) if part.packed else None,
        expected_crc=shard.crcs.get(part.name),
    )


def _scale_files(directory: pathlib.Path, shards: int) -> list[pathlib.Path]:
    """The files with scales, one for each shard; none if the checkpoint is not quantized."""
    for scheme in SCHEMES:
        files = [directory / f"{scheme}_scales_{number}.pt" for number in range(shards)]
        if any(file.exists() for file in files):
            missing = next((file for file in files if not file.exists()), None)
            if missing is not None:
                raise FileNotFoundError(
                    f"{missing}: missing, though other shards have their scales"
                )
            return files
    return []


class Scaled(NamedTuple):
    """How a layer's experts are quantized. scale: the shape of a shard's scales."""

    scheme: str
    scale: tuple[int, ...]


def _scaled_in(shards: Sequence[Shard]) -> dict[str, Scaled]:
    """By canonical name, the experts that have scales."""
    found: dict[str, Scaled] = {}
    ours = {"w1": "gate", "w3": "up", "w2": "down"}
    for key, entry in (shards[0].entries if shards else {}).items():
        match = re.fullmatch(r"layers\.(\d+)\.feed_forward\.experts\.(w[123])", key)
        if match is None or len(entry.shape) not in (2, 3):
            raise ValueError(f"{entry.file}: no rule matches {key} of shape {entry.shape}")
        scheme = entry.file.name.partition("_")[0]
        found[f"layers.{match[1]}.ffn.{ours[match[2]]}"] = Scaled(scheme, entry.shape)
    return found


def _parts(model: Model, scaled: Mapping[str, Scaled], shards: int) -> list[Part]:
    """Every tensor of a model that is divided among this many shards."""
    text = model.text
    family: ModuleType = llama3 if is_llama3(model) else llama4
    shapes = array_shapes(model)
    rules = family.meta_rules(text)
    pairs = [(match, rule.join) for match, rule in expand(rules, text)]
    if model.vision is not None:
        arrays = vision.arrays(model.vision, text.embed_dim)
        matches = vision.matches(arrays, lambda array: array.meta)
        pairs += zip(matches, (array.join for array in arrays), strict=True)
    parts = []
    for match, join in pairs:
        whole = their_shape(match.layout, [shapes[name] for name in match.ours])
        quantized = match.ours and scaled.get(match.ours[0])
        if quantized:
            parts += _quantized(match, join, whole, quantized, shards)
        else:
            parts.append(_part(match, join, whole, shards))
    return parts


def _part(match: Match, join: Join, whole: tuple[int, ...], shards: int) -> Part:
    """A tensor of this shape; experts are seen in three dimensions and lie in two."""
    cell = list(whole)
    if join.axis is not None:
        holders = shards // join.copies(shards)
        sections = (*(join.sections or (whole[join.axis],)), join.holders or holders)
        wrong = next((n for n in sections if n % holders), None)
        if wrong is not None or shards % holders:
            raise ValueError(
                f"{shards} shards do not divide {match.theirs}, of shape {whole}, "
                f"into equal parts; choose a number that does"
            )
        cell[join.axis] = sum(sections[:-1]) // holders
    stored = (cell[0] * cell[1], cell[2]) if len(cell) == 3 else tuple(cell)
    return Part(match, join, tuple(cell), stored)


_BYTES = Layout(
    lambda x: (unpack_bytes(x),), lambda parts: pack_bytes(np.ascontiguousarray(parts[0])), cut=0
)


def _quantized(
    match: Match, join: Join, whole: tuple[int, ...], scaled: Scaled, shards: int
) -> list[Part]:
    """The experts' values in the shards and their scales beside them.

    fp8: one scale for each output of each shard's part, (e, outputs). int4: two values in a byte,
    scales (e, inputs / group, outputs).
    """
    e, inputs, outputs = whole
    prefix, _, last = match.theirs.rpartition(".")
    key, names = f"{prefix}.{_EXPERTS[last]}", (match.ours[0] + SCALE,)
    if scaled.scheme == "int4":
        values = _part(match._replace(layout=_BYTES), join, (e, inputs // 2, outputs), shards)
        scale = Part(Match(key, names, SAME), join, scaled.scale, scaled.scale, scales=True)
        return [values._replace(packed=True), scale]
    values = _part(match, join, whole, shards)._replace(dtype=DTYPES["fp8"])
    groups = shards if join.axis == 1 else 1

    def save(parts: tuple[np.ndarray, ...]) -> np.ndarray:
        (scale,) = parts
        shape = (len(scale), groups, outputs)
        return np.ascontiguousarray(np.broadcast_to(scale, shape)).reshape(len(scale), -1)

    layout = Layout(lambda x: (x.reshape(-1, groups, outputs),), save, cut=0)
    cell = (e, outputs if join.axis == 1 else outputs // shards)
    return [values, Part(Match(key, names, layout), Join(1), cell, cell, scales=True)]


def _check_names(directory: pathlib.Path, expected: set[str], found: set[str]) -> None:
    """Raises ValueError naming tensors that no rule matches, or that are missing."""
    unknown = sorted(found - expected)
    if unknown:
        raise ValueError(f"{directory}: no rule matches {some(unknown)}")
    missing = sorted(expected - found)
    if missing:
        raise ValueError(f"{directory}: tensor missing: {some(missing)}")


# --- Writing -------------------------------------------------------------------------------------
def target(
    model: Model,
    wanted: Mapping[str, Spec],
    directory: pathlib.Path,
    *,
    described: Mapping[str, Any],
    shards: int,
) -> Target:
    """A directory to be written, with these arrays.

    Args:
        model: what the arrays make up.
        wanted: shape and type of every canonical array, scales included.
        directory: where the files go.
        described: what the source says of the model; its `meta` part is kept.
        shards: among how many files every tensor is divided.

    Raises:
        ValueError: the format cannot describe this architecture or these scales, or the number of
            shards does not divide it.
    """
    _check_heads(model, shards)
    scaled = {
        name: _scaled_for(name, spec, wanted[name + SCALE].shape, scheme, shards)
        for name, spec in wanted.items()
        if (scheme := scheme_of(spec.dtype))
    }
    parts = _parts(model, scaled, shards)
    plans: dict[pathlib.Path, pth.Plan] = {}
    cells: dict[str, list[Cell]] = {part.name: [] for part in parts}
    for file, inside in _files_to_write(directory, parts, scaled, shards):
        plans[file], new = _file_to_write(file, inside, wanted)
        for name, cell in new.items():
            cells[name].append(cell)
    values = params.values_to(model, described.get("meta"))

    files = {file: plan.size for file, plan in plans.items()}

    def finish(sums: Mapping[str, Sum]) -> None:
        for file, plan in plans.items():
            crcs = {name: sums[f"{file.name}:{name}"].crc for name in plan.offsets}
            with open(file, "r+b") as stream:
                for offset, data in plan.framing(crcs):
                    stream.seek(offset)
                    stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        write_json(directory / PARAMS, values)

    return Target(
        matches=[part.match for part in parts],
        tensors={part.name: Joined(cells[part.name], part.join) for part in parts},
        size=sum(files.values()),
        intact=lambda: have_sizes(files),
        create=lambda: make_files(files),
        finish=finish,
    )


def _check_heads(model: Model, shards: int) -> None:
    """Raises ValueError unless each shard gets whole heads, which Meta's code counts on.

    Llama 3 repeats key-value heads where there are fewer than shards.
    """
    a = model.text.attention
    counts = {"query heads": a.num_heads, "key-value heads": a.num_kv_heads}
    if is_llama3(model) and shards % a.num_kv_heads == 0:
        del counts["key-value heads"]
    if model.vision is not None:
        counts["heads of the vision encoder"] = model.vision.num_heads
    for what, count in counts.items():
        if count % shards:
            raise ValueError(f"{shards} shards do not divide the {count} {what}")


def _files_to_write(
    directory: pathlib.Path, parts: Sequence[Part], scaled: Mapping[str, Scaled], shards: int
) -> Iterator[tuple[pathlib.Path, list[Part]]]:
    """Every file and the parts that have a share in it."""
    for number in range(shards):
        yield directory / _shard_name(number), [part for part in parts if not part.scales]
        if scaled:
            scheme = next(iter(scaled.values())).scheme
            name = f"{scheme}_scales_{number}.pt"
            yield directory / name, [part for part in parts if part.scales]


def _file_to_write(
    file: pathlib.Path, parts: Sequence[Part], wanted: Mapping[str, Spec]
) -> tuple[pth.Plan, dict[str, Cell]]:
    """The plan of one file with its share of these parts, and the cells in it by name."""
    specs = [pth.Spec(part.name, part.stored, _stored_dtype(part, wanted)) for part in parts]
    plan = pth.plan(specs, archive=file.stem)
    cells = {}
    for part, spec in zip(parts, specs, strict=True):
        entry = Entry(file, part.stored, spec.dtype, plan.offsets[part.name])
        view = np.dtype(np.uint8) if part.packed else None
        key = f"{file.name}:{part.name}"
        cells[part.name] = Cell(key, entry, shape=part.cell, dtype=view, crc=True)
    return plan, cells


def _scaled_for(name: str, spec: Spec, scale: tuple[int, ...], scheme: str, shards: int) -> Scaled:
    """How an array to be written is quantized."""
    if scheme not in SCHEMES or len(spec.shape) != 3:
        raise ValueError(
            f"{name}: Meta's format has no {scheme} of this weight, only "
            f"{' and '.join(SCHEMES)} of routed experts; convert to orbax or hf, or ask for a "
            f"floating-point type such as bfloat16"
        )
    e, groups, outputs = scale
    across = name.endswith(".down")
    if scheme == "fp8":
        if groups not in (1, shards if across else 1):
            raise ValueError(
                f"{name} has {groups} scales for each output channel; Meta's fp8 has one for each "
                f"of the {shards} shards. Use {groups} shards, or ask for bfloat16"
            )
        return Scaled(scheme, (e, outputs))
    if across and groups % shards:
        raise ValueError(f"{name}: {shards} shards do not divide its {groups} groups of inputs")
    if across:
        return Scaled(scheme, (e, groups // shards, outputs))
    return Scaled(scheme, (e, groups, outputs // shards))


def _stored_dtype(part: Part, wanted: Mapping[str, Spec]) -> np.dtype:
    """What the file says: packed int4 goes by the name of an 8-bit float, as in Meta's script."""
    return DTYPES["fp8"] if part.packed else wanted[part.match.ours[0]].dtype


def checklist(directory: pathlib.Path) -> dict[str, str]:
    """The MD5 sums that Meta publishes beside a checkpoint, by file name; empty without them.

    Raises:
        ValueError: a line is malformed.
    """
    file = directory / "checklist.chk"
    if not file.exists():
        return {}
    found = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        match = re.fullmatch(r"([0-9a-f]{32})\s+\*?(\S+)", line.strip())
        if line.strip() and match is None:
            raise ValueError(f"{file}: line {number} is no MD5 sum and file name: {line[:80]!r}")
        if match is not None:
            found[pathlib.PurePath(match[2]).name] = match[1]
    return found
