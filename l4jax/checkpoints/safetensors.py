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
    return {name: _entry(file, name, item, 8 + length, size) for name, item in header.items()}


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

    @property
    def nbytes(self) -> int:
        """Size of the tensor's bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    directory: pathlib.Path, tensors: Iterable[Tensor], *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes tensors as shards and their index, one tensor in memory at a time.

    A single shard is called `model.safetensors` and has no index. The directory must exist.
    """
    shards = _plan(tensors, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        _write_shard(directory / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(file: pathlib.Path, value: Any) -> None:
    """Writes `value` as readable JSON; the file appears whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    os.replace(partial, file)


def _plan(tensors: Iterable[Tensor], max_bytes: int) -> list[list[Tensor]]:
    """Tensors in order, a new shard where the next one would exceed the size."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _write_shard(file: pathlib.Path, tensors: list[Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that tensors start aligned
    partial = file.with_name(file.name + ".partial")
    with open(partial, "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            value = np.asarray(tensor.make(), order="C")
            if value.shape != tensor.shape or value.dtype != tensor.dtype:
                raise AssertionError(f"{tensor.name}: announced {tensor[1:3]}, got {value.shape}")
            stream.write(value.reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
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
