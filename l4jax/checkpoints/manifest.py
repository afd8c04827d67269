"""The checksums that lie beside a checkpoint, and the check that it is whole.

`checksums.json` has, for every stored tensor, its shape, its type and the XXH3 (128 bits) of its
bytes in C order; for the arrays of our Orbax directories, of their chunks one after the other. It
also says what the tensors of the source were when they were read. XXH3 finds damage, not forgery.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import l4jax.checkpoints.meta as meta
from l4jax.checkpoints.directory import source as open_source
from l4jax.checkpoints.formats import Source
from l4jax.checkpoints.rows import Rows, Sum
from l4jax.checkpoints.safetensors import write_json

NAME = "checksums.json"
_FORMAT, _ALGORITHM = 1, "xxh3_128"
_STEP_BYTES = 64 << 20


def write(
    directory: pathlib.Path,
    *,
    kind: str,
    stored: Mapping[str, tuple[tuple[int, ...], str]],
    sums: Mapping[str, Sum],
    source: Mapping[str, Any],
) -> None:
    """Writes the checksums of what a conversion has written, and of what it read."""
    tensors = {
        name: {"shape": list(shape), "dtype": dtype, "digest": sums[name].digest}
        for name, (shape, dtype) in stored.items()
    }
    values = {"format": _FORMAT, "algorithm": _ALGORITHM, "kind": kind}
    write_json(directory / NAME, values | {"tensors": tensors, "source": dict(source)})


def read(source: Source) -> dict[str, dict[str, Any]] | None:
    """By name, what was written of every stored tensor; None if no checksums are there.

    Raises:
        ValueError: the file is damaged or of another kind, or names other tensors than there are.
    """
    file = source.directory / NAME
    if not file.exists():
        return None
    try:
        values = json.loads(file.read_text())
        found = (values["format"], values["algorithm"])
        tensors = dict(values["tensors"])
        complete = all({"shape", "dtype", "digest"} <= item.keys() for item in tensors.values())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: no valid checksums: {error!r}") from None
    if found != (_FORMAT, _ALGORITHM) or not complete:
        raise ValueError(
            f"{file}: format and algorithm {found}; this version of l4jax reads "
            f"{(_FORMAT, _ALGORITHM)}"
        )
    there = {key for tensor in source.tensors.values() for key in tensor.stored()}
    for key in sorted(there ^ tensors.keys()):
        if key in there:
            raise ValueError(f"{file}: lacks {key}, which is in the checkpoint")
        raise ValueError(f"{source.directory}: {NAME} has {key}, which is missing")
    return tensors


def check_written(
    source: Source, tensor: Rows, expected: Mapping[str, Mapping[str, Any]] | None
) -> None:
    """Raises ValueError if a tensor, now read, is not what was written once."""
    if expected is None:
        return
    for key, found in tensor.sums().items():
        known = expected[key]
        if known["digest"] != found.digest:
            raise ValueError(
                f"{_where(source, key)}: {key} is damaged or was exchanged: its XXH3 is "
                f"{found.digest}, {NAME} says {known['digest']}"
            )
    for key, (shape, dtype) in tensor.stored().items():
        known = expected[key]
        if (list(shape), dtype) != (known["shape"], known["dtype"]):
            raise ValueError(
                f"{_where(source, key)}: {key} is {dtype} of shape {shape}; {NAME} says "
                f"{known['dtype']} of shape {tuple(known['shape'])}"
            )


def _where(source: Source, key: str) -> str:
    """The file that holds a stored tensor, for messages."""
    for tensor in source.tensors.values():
        for cell in getattr(tensor, "cells", ()):
            if cell.key == key:
                return str(cell.entry.file)
    return str(source.directory)


def verify(
    path: str | os.PathLike[str],
    *,
    begin: Callable[[int, int], Callable[[int], None]] | None = None,
) -> dict[str, Any]:
    """Checks that a checkpoint is whole, reading all of it, and returns what was checked.

    Names, shapes and types against the configuration; every number for finiteness; checksums if
    there are any, ours (`checksums.json`) or Meta's (`checklist.chk`).

    Args:
        path: of a directory in any of the formats.
        begin: called with the bytes to read and 0; returns what is called with every number read.

    Raises:
        FileNotFoundError, ValueError: what is wrong first, naming file and tensor.
    """
    source = open_source(path)
    expected = read(source)
    seen: set[str] = set()
    size = 0
    total = sum(_nbytes(tensor) for tensor in source.tensors.values())
    progress = begin(total, 0) if begin else lambda size: None
    digests: dict[str, list[str]] = {}
    for match in source.matches:
        tensor = source.tensors[match.theirs]
        for start, stop in steps(tensor):
            size += (rows := tensor.read(start, stop)).nbytes
            progress(rows.nbytes)
        check_written(source, tensor, expected)
        seen |= tensor.stored().keys()
        # Only a tied head has its array in two tensors, laid out alike.
        found = [value.digest for value in tensor.sums().values()]
        for name in match.ours:
            if digests.setdefault(name, found) != found and len(match.ours) == 1:
                raise ValueError(
                    f"{source.directory}: {match.theirs} should repeat {name}, of which another "
                    f"tensor holds different numbers"
                )
    return {
        "checkpoint": str(source.directory),
        "format": source.kind,
        "whole": True,
        "tensors": len(seen),
        "bytes": size,
        "checksums": len(expected or ()),
        "md5_sums": _check_md5(source) if source.kind == "meta" else 0,
    }


def steps(tensor: Rows) -> Iterator[tuple[int, int]]:
    """Ranges of rows that together are the whole tensor, each of a moderate size."""
    count = max(1, tensor.length)
    size = max(1, int(_nbytes(tensor)) // count)
    rows = max(tensor.grain, _STEP_BYTES // size // tensor.grain * tensor.grain)
    for start in range(0, tensor.length, rows):
        yield start, min(start + rows, tensor.length)


def _nbytes(tensor: Rows) -> int:
    size = tensor.dtype.itemsize
    for n in tensor.shape:
        size *= n
    return size


def _check_md5(source: Source) -> int:
    """The number of files whose published MD5 is right.

    Raises:
        FileNotFoundError: a file with an MD5 is missing.
        ValueError: a file has another one.
    """
    sums = meta.checklist(source.directory)
    for name, expected in sums.items():
        file = source.directory / name
        if not file.exists():
            raise FileNotFoundError(f"{file}: missing, though checklist.chk names it")
        with open(file, "rb") as stream:
            found = hashlib.file_digest(stream, "md5").hexdigest()
        if found != expected:
            raise ValueError(
                f"{file}: damaged or exchanged: its MD5 is {found}, checklist.chk says {expected}"
            )
    return len(sums)
