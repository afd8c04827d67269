"""Arrays as Orbax keeps them: a zarr3 array for each leaf, all in one key-value store.

What is made here is what Orbax itself makes, with chunks of our choosing; Orbax writes the files
around the arrays itself.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from l4jax.checkpoints.formats import Spec
from l4jax.checkpoints.orbax import PARAMETERS
from l4jax.checkpoints.safetensors import write_json

_READ_BYTES = 8 << 20
"""Of the pieces inside a chunk that can be read by themselves."""
TREE = "_METADATA"
"""Orbax's description of a tree, in its folder."""
_SKELETON = "skeleton"


def read_tree(parameters: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """The folder in which Orbax keeps the arrays, and its description of them."""
    for folder in (parameters, *sorted(p for p in parameters.glob("*") if p.is_dir())):
        if (folder / TREE).exists():
            try:
                tree = json.loads((folder / TREE).read_text())
                list(tree["tree_metadata"].values())
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{folder / TREE}: not valid: {error!r}") from None
            return folder, tree
    raise ValueError(f"{parameters}: no Orbax checkpoint: {TREE} is missing")


class Store:
    """A stored array, opened when it is first needed."""

    def __init__(
        self, folder: pathlib.Path, leaf: str, tree: Mapping[str, Any], context: Any
    ) -> None:
        self.folder = folder / leaf
        driver = "zarr3" if tree.get("use_zarr3") else "zarr"
        if tree.get("use_ocdbt"):
            kvstore = _in_ocdbt(folder, leaf)
        else:
            kvstore = {"driver": "file", "path": f"{self.folder.absolute()}/"}
        try:
            spec = {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": False}
            self._store = tensorstore.open(spec, context=context, read=True).result()
        except ValueError as error:
            raise ValueError(f"{self.folder}: cannot be opened: {reason(error)}") from None
        self.shape = tuple(self._store.shape)
        self.dtype = np.dtype(self._store.dtype.numpy_dtype)
        self.chunk = tuple(n or 1 for n in self._store.chunk_layout.write_chunk.shape or ())

    def open(self) -> Any:
        """The store."""
        return self._store


class Container:
    """Orbax's files around the arrays, which Orbax itself makes by saving a skeleton."""

    def __init__(self, directory: pathlib.Path, stores: Mapping[str, NewStore]) -> None:
        self._directory, self._stores = directory, stores
        self._folder = directory / PARAMETERS
        self._synced: set[pathlib.Path] = set()
        # Written without waiting for the disk at each chunk; `sync` does that for many at once. One
        # context for all arrays, so that they are one store and do not vie for its manifest.
        self._context = tensorstore.Context({"file_io_sync": False})

    def intact(self) -> bool:
        """Whether all arrays are there."""
        try:
            inside, _ = read_tree(self._folder)
            for opening in self._open(inside, create=False).values():
                opening.result()
        except (OSError, ValueError):
            return False
        return True

    def create(self) -> None:
        """Makes the files and the arrays; what they hold already stays."""
        if not self._folder.exists():
            for leftover in self._directory.glob(f"{PARAMETERS}.*"):
                shutil.rmtree(leftover)
            ocp.save(self._folder.absolute(), {_SKELETON: np.zeros(1, np.float32)})
        inside, _ = read_tree(self._folder)
        for leaf, making in self._open(inside, create=True).items():
            try:
                making.result()
            except ValueError as error:
                raise OSError(f"{inside / leaf}: cannot be made: {reason(error)}") from error

    def sync(self) -> None:
        """Returns when all that was written so far is on the disk."""
        inside, _ = read_tree(self._folder)
        new = set((inside / "d").iterdir()) - self._synced
        for file in (*new, inside / "manifest.ocdbt"):
            with contextlib.suppress(FileNotFoundError):  # temporary names come and go
                _sync(file)
        _sync(inside / "d")
        self._synced |= new

    def _open(self, inside: pathlib.Path, *, create: bool) -> dict[str, Any]:
        return {
            leaf: store.open_in(inside, context=self._context, create=create)
            for leaf, store in self._stores.items()
        }

    def finish(self) -> None:
        """Puts the arrays' description in the place of the skeleton's."""
        inside, tree = read_tree(self._folder)
        first = next(iter(tree["tree_metadata"].values()))
        if first["key_metadata"][0]["key"] == _SKELETON:
            tree["tree_metadata"] = dict(
                _tree_entry(store, first) for store in self._stores.values()
            )
            write_json(inside / TREE, tree)
        skeleton = tensorstore.KvStore.open(_in_ocdbt(inside, _SKELETON)).result()
        skeleton.delete_range(tensorstore.KvStore.KeyRange()).result()
        for name in ("array_metadatas", "ocdbt.process_0"):
            shutil.rmtree(inside / name, ignore_errors=True)
        (inside / "_sharding").unlink(missing_ok=True)
        self.sync()


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _in_ocdbt(folder: pathlib.Path, leaf: str) -> dict[str, Any]:
    beneath = {"driver": "file", "path": f"{folder.absolute()}/"}
    return {"driver": "ocdbt", "base": beneath, "path": f"{leaf}/"}


def _tree_entry(store: NewStore, pattern: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Orbax's description of a leaf, after the one of the skeleton."""
    keys = store.leaf.split(".")
    (key,) = pattern["key_metadata"]
    value = dict(pattern["value_metadata"]) | {"value_type": "jax.Array"}
    if "write_shape" in value:
        value["write_shape"] = list(store.shape)
    entry = {"key_metadata": [key | {"key": k} for k in keys], "value_metadata": value}
    return str(tuple(keys)), entry


def new_store(
    folder: pathlib.Path, leaf: str, spec: Spec, *, stack: int | None, cut: int | None, grain: int
) -> NewStore:
    """A stored array of slices like `spec`, `stack` of them if they are stacked."""
    chunk = list(spec.shape)
    if cut is not None:
        chunk[cut] = min(grain, chunk[cut])
    shape = spec.shape
    if stack is not None:
        shape, chunk = (stack, *shape), [1, *chunk]
    return NewStore(folder, leaf, shape, tuple(chunk), spec.dtype)


def _pieces(chunk: tuple[int, ...], dtype: np.dtype) -> list[int]:
    """The shape of the pieces of a chunk that can be read by themselves.

    Leading dimensions are divided first, which keeps a piece together in memory; then the last two
    in turn, so that a host that needs a part of either reads little more.
    """
    shape = list(chunk)
    while math.prod(shape) * dtype.itemsize > _READ_BYTES:
        even = [axis for axis, n in enumerate(shape) if n % 2 == 0]
        if not even:
            break
        leading = [axis for axis in even if axis < len(shape) - 2]
        # The last dimension is halved only while it is the longer one: short runs are slow.
        axis = leading[0] if leading else max(even, key=lambda axis: shape[axis])
        shape[axis] //= 2
    return shape


class NewStore:
    """A stored array that conversion makes."""

    def __init__(
        self,
        parameters: pathlib.Path,
        leaf: str,
        shape: tuple[int, ...],
        chunk: tuple[int, ...],
        dtype: np.dtype,
    ) -> None:
        self.leaf, self.shape, self.file = leaf, shape, parameters / leaf
        plain = [{"name": "bytes", "configuration": {"endian": "little"}}]
        sharded = {
            "chunk_shape": _pieces(chunk, dtype),
            "codecs": plain,
            "index_codecs": [*plain, {"name": "crc32c"}],
        }
        self._metadata = {
            "shape": list(shape),
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharded}],
        }
        self._store: Any = None

    def open_in(self, folder: pathlib.Path, *, context: Any, create: bool) -> Any:
        """Begins to open the array that an earlier try has made, or to make it."""
        spec = {
            "driver": "zarr3",
            "kvstore": _in_ocdbt(folder, self.leaf),
            "metadata": self._metadata,
            "store_data_equal_to_fill_value": True,
        }
        self._store = tensorstore.open(spec, context=context, open=True, create=create)
        return self._store

    def open(self) -> Any:
        """The store."""
        return self._store.result()


def reason(error: Exception) -> str:
    """What the storage library says, the operating system's reason first if there is one."""
    text = " ".join(str(error).split())
    cause = re.search(r"\[OS error \d+: \w+ ([^\]]*)\]", text)
    return f"{cause[1]} ({text[:200]})" if cause else text[:300]
