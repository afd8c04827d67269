"""The safetensors file format: lazily mapped in, streamed out.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}
and the tensors' bytes back to back (https://github.com/huggingface/safetensors, "Format"). The
safetensors package cannot hold bfloat16 lazily nor float8 at all in NumPy, hence this module.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100 << 20


class Entry(NamedTuple):
    """Where a tensor lies: file, shape, dtype and first byte."""

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor's bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor, mapped: nothing is read before it is used."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


def scan_file(file: pathlib.Path) -> dict[str, Entry]:
    """Every tensor of one file, from its header alone.

    Raises:
        ValueError: the file is truncated, or its header is not what the format allows.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(
                f"{file}: truncated or no safetensors file: its header should take {length} bytes, "
                f"the whole file has {size}"
            )
        try:
            header = dict(json.loads(stream.read(length), object_pairs_hook=_unique))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: its safetensors header is not valid: {error}") from None
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, item, 8 + length, size) for name, item in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise ValueError(
                f"{file}: {name} begins at byte {entry.offset}, but the tensor before it ends at "
                f"{end}: tensors must lie back to back"
            )
        end += entry.nbytes
    if end != size:
        raise ValueError(f"{file}: {size - end} bytes behind its last tensor belong to none")
    return entries


def scan(directory: pathlib.Path) -> dict[str, Entry]:
    """Every tensor of a directory: by its index, or of its one `model.safetensors`.

    Raises:
        FileNotFoundError: a file that the index names, or both kinds of directory, are missing.
        ValueError: the index disagrees with the files, or names a file outside the directory.
    """
    index = directory / INDEX
    if not index.exists():
        single = directory / "model.safetensors"
        if not single.exists():
            raise FileNotFoundError(f"{directory}: neither {INDEX} nor model.safetensors is there")
        return scan_file(single)
    try:
        weight_map = dict(json.loads(index.read_text(), object_pairs_hook=_unique)["weight_map"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index}: no valid index with a weight_map: {error}") from None
    entries: dict[str, Entry] = {}
    for name in sorted(set(weight_map.values())):
        if pathlib.PurePath(name).name != name or name in ("", ".."):
            raise ValueError(f"{index}: file name {name!r} leaves the directory")
        if not (directory / name).exists():
            raise FileNotFoundError(f"{directory / name}: named by {INDEX}, but missing")
        for tensor, entry in scan_file(directory / name).items():
            if weight_map.get(tensor) != name:
                raise ValueError(
                    f"{directory / name}: holds {tensor}, which {INDEX} places in "
                    f"{weight_map.get(tensor, 'no file')}"
                )
            entries[tensor] = entry
    missing = sorted(set(weight_map) - set(entries))
    if missing:
        raise ValueError(
            f"{directory / weight_map[missing[0]]}: lacks {missing[0]}, which {INDEX} places there"
        )
    return entries


class Tensor(NamedTuple):
    """A tensor to write: its bytes are asked for when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]


class Shard(NamedTuple):
    """A file to write: its name, its first bytes, where its tensors lie, and its whole size."""

    name: str
    header: bytes
    entries: dict[str, Entry]
    size: int


def plan(
    directory: pathlib.Path,
    tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]],
    *,
    max_shard_bytes: int,
) -> list[Shard]:
    """The files that hold tensors of these names, shapes and types, in their order.

    A new one begins where the next tensor would exceed the size. A single one is called
    `model.safetensors` and needs no index.
    """
    groups: list[list[tuple[str, tuple[int, ...], np.dtype, int]]] = [[]]
    filled = 0
    for name, shape, dtype in tensors:
        nbytes = math.prod(shape) * dtype.itemsize
        if groups[-1] and filled + nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((name, shape, dtype, nbytes))
        filled += nbytes
    shards = []
    for number, group in enumerate(groups, 1):
        file = (
            "model.safetensors"
            if len(groups) == 1
            else f"model-{number:05}-of-{len(groups):05}.safetensors"
        )
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape, dtype, nbytes in group:
            start, end = end, end + nbytes
            code = _CODES[dtype]
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that tensors start aligned
        first = 8 + len(text)
        entries = {
            name: Entry(directory / file, shape, dtype, first + header[name]["data_offsets"][0])
            for name, shape, dtype, _ in group
        }
        shards.append(Shard(file, len(text).to_bytes(8, "little") + text, entries, first + end))
    return shards


def write_index(directory: pathlib.Path, shards: list[Shard]) -> None:
    """Writes the index of several shards; a single one has none."""
    if len(shards) > 1:
        weight_map = {name: shard.name for shard in shards for name in shard.entries}
        total = sum(shard.size - len(shard.header) for shard in shards)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write(
    directory: pathlib.Path, tensors: Iterable[Tensor], *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes tensors as shards and their index, one tensor in memory at a time.

    The directory must exist.
    """
    named = {tensor.name: tensor for tensor in tensors}
    shards = plan(
        directory, ((*tensor[:3],) for tensor in named.values()), max_shard_bytes=max_shard_bytes
    )
    for shard in shards:
        partial = directory / (shard.name + ".partial")
        with open(partial, "wb") as stream:
            stream.write(shard.header)
            for name in shard.entries:
                _, shape, dtype, make = named[name]
                value = np.asarray(make(), order="C")
                if value.shape != shape or value.dtype != dtype:
                    raise AssertionError(f"{name}: announced {shape, dtype}, got {value.shape}")
                stream.write(value.reshape(-1).view(np.uint8).data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, directory / shard.name)
    write_index(directory, shards)


def write_json(file: pathlib.Path, value: Any) -> None:
    """Writes `value` as readable JSON; the file appears whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    os.replace(partial, file)


def _entry(file: pathlib.Path, name: str, item: Any, base: int, size: int) -> Entry:
    """The checked entry of one tensor; `base` is where tensor bytes begin."""
    try:
        code, shape, (start, end) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        sound = all(isinstance(n, int) and n >= 0 for n in (*shape, start, end))
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"{file}: the header's entry for {name} is malformed: {item}")
    if code not in DTYPES:
        raise ValueError(f"{file}: {name} has unknown dtype {code!r}; known: {', '.join(DTYPES)}")
    if end - start != math.prod(shape) * DTYPES[code].itemsize:
        raise ValueError(f"{file}: {name} should take {shape} {code}, but has {end - start} bytes")
    if base + end > size:
        raise ValueError(f"{file}: truncated: {name} ends at byte {base + end}, the file at {size}")
    return Entry(file, shape, DTYPES[code], base + start)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys, which would hide a tensor."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return result
