"""The arrays of our Orbax directories, read and written slice by slice.

What is written is what Orbax itself writes (a zarr3 array for each leaf in one key-value store, and
a description of the tree), with chunks of our choosing, so that neither writing nor reading a slice
touches the rest of an array that may be far larger than memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorstore
import xxhash
from orbax.checkpoint import v1 as ocp

from l4jax.checkpoints.formats import (
    SCALE,
    Model,
    Source,
    Spec,
    Target,
    array_shapes,
    base,
    cuts,
    some,
    text_places,
    widest,
)
from l4jax.checkpoints.orbax import (
    CHUNK_BYTES,
    MARKER,
    PARAMETERS,
    SCALES,
    VALUES,
    Marker,
    read_marker,
    write_marker,
)
from l4jax.checkpoints.rows import Rows, Sum, compact, first_not_finite
from l4jax.checkpoints.safetensors import write_json
from l4jax.checkpoints.tables import Layout, Match
from l4jax.kernels.quantized import scheme_of

_READ_BYTES = 8 << 20
"""Of the pieces inside a chunk that can be read by themselves."""
_TREE = "_METADATA"
"""Orbax's description of a tree, in its folder."""
_SKELETON = "skeleton"


class Slot(NamedTuple):
    """Where a canonical array lies: in which leaf, and at which place if that is a stack."""

    leaf: str
    place: int | None


class Slice:
    """One canonical array inside a stored one; implements `Rows` along its cut.

    Args:
        key: its canonical name.
        open_store: gives the stored array.
        file: for messages.
        place: of the slice in the stored array, None if it is all of it.
        spec: shape and type of the slice.
        cut: the dimension along which it is read and written; None for all at once.
        grain: how many rows along the cut lie in one stored chunk.
        sync: returns when what was written to the store is on the disk.
    """

    def __init__(
        self,
        key: str,
        open_store: Any,
        file: pathlib.Path,
        *,
        place: int | None,
        spec: Spec,
        cut: int | None,
        grain: int,
        sync: Callable[[], None] = lambda: None,
    ) -> None:
        self.key, self.file, self._sync = key, file, sync
        self.shape, self.dtype = spec
        self.cut, self.grain, self._place = cut, grain, place
        self.length = 1 if cut is None else spec.shape[cut]
        self._open, self._hash, self._next = open_store, xxhash.xxh3_128(), 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows from `start` up to `stop`, as a slice along the cut.

        Raises:
            ValueError: the store cannot read them, or a number is not finite.
        """
        try:
            x = np.asarray(self._part(start, stop).read().result())
        except ValueError as error:
            raise ValueError(f"{self.file}: {self.key} cannot be read: {_reason(error)}") from error
        place = first_not_finite(compact(x))
        if place is not None:
            index = tuple(map(int, np.unravel_index(place, x.shape)))
            raise ValueError(
                f"{self.file}: {self.key} holds {x[index]} near {index}; weights must be finite"
            )
        self._add(start, stop, x)
        return x

    def write(self, start: int, rows: np.ndarray) -> None:
        """Puts rows in their place, from `start` on along the cut."""
        rows = compact(rows)
        stop = start + (1 if self.cut is None else rows.shape[self.cut])
        try:
            # Nobody changes the rows before the write is done, so they need not be copied.
            part = self._part(start, stop)
            part.write(rows, can_reference_source_data_indefinitely=True).result()
        except ValueError as error:
            raise OSError(f"{self.file}: {self.key} cannot be written: {_reason(error)}") from error
        self._add(start, stop, rows)

    def sums(self) -> dict[str, Sum]:
        """The digest over the array's chunks, each in C order, one after the other."""
        assert self._next == self.length, (self.key, self._next, self.shape)
        return {self.key: Sum(self._hash.hexdigest())}

    def stored(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of the array."""
        return {self.key: (self.shape, self.dtype.name)}

    def sync(self) -> None:
        """Returns when what was written is on the disk."""
        self._sync()

    def _part(self, start: int, stop: int) -> Any:
        store = self._open()
        if self._place is not None:
            store = store[self._place]
        return (
            store if self.cut is None else store[(slice(None),) * self.cut + (slice(start, stop),)]
        )

    def _add(self, start: int, stop: int, x: np.ndarray) -> None:
        if start == 0:
            self._hash.reset()
            self._next = 0
        assert start == self._next, (self.key, start, self._next)
        self._next = stop
        for first in range(0, stop - start, self.grain):
            chunk = x
            if self.cut is not None:
                at = (slice(None),) * self.cut
                chunk = x[(*at, slice(first, first + self.grain))]
            self._hash.update(compact(chunk).reshape(-1).view(np.uint8).data)


def _reason(error: Exception) -> str:
    """What the storage library says, the operating system's reason first if there is one."""
    text = " ".join(str(error).split())
    cause = re.search(r"\[OS error \d+: \w+ ([^\]]*)\]", text)
    return f"{cause[1]} ({text[:200]})" if cause else text[:300]


# --- Where arrays lie ----------------------------------------------------------------------------
def slots(model: Model, names: Collection[str], *, scanned: bool) -> dict[str, Slot]:
    """The place of every canonical array, with layers stacked or each by itself."""
    known = text_places(model.text, scanned=scanned)
    found = {}
    for name in names:
        stem = base(name)
        if stem.startswith("vision.layers."):
            _, _, number, rest = stem.split(".", 3)
            place: int | None
            leaf, place = f"vision.layers.{rest}", int(number)
        elif stem in known:
            leaf, place = ".".join(map(str, known[stem][0].path)), known[stem][0].period
        else:
            leaf, place = stem, None
        if name.endswith(SCALE):
            leaf = f"{leaf}.{SCALES}"
        elif name + SCALE in names:
            leaf = f"{leaf}.{VALUES}"
        found[name] = Slot(leaf, place)
    return found


def stackable(model: Model, wanted: Mapping[str, Spec]) -> tuple[bool, dict[str, Spec]]:
    """Whether layers can be stacked, and the arrays with the types that they then have.

    Layers of which only some are quantized cannot; of floating-point types the widest is taken.
    """
    widened = dict(wanted)
    groups: dict[str, list[str]] = {}
    for name, slot in slots(model, wanted, scanned=True).items():
        groups.setdefault(slot.leaf.removesuffix(f".{VALUES}"), []).append(name)
    for members in groups.values():
        specs = {wanted[name] for name in members}
        if len(specs) == 1:
            continue
        if len({spec.shape for spec in specs}) > 1 or any(scheme_of(s.dtype) for s in specs):
            return False, dict(wanted)
        wide = widest(spec.dtype for spec in specs)
        widened |= {name: wanted[name]._replace(dtype=wide) for name in members}
    return True, widened


def _layout(cut: int | None) -> Layout:
    return Layout(lambda x: (x,), lambda parts: parts[0], cut)


def _matches(names: Mapping[str, Spec], cut: Mapping[str, int | None]) -> list[Match]:
    return [Match(name, (name,), _layout(cut.get(base(name)))) for name in names]


# --- Reading -------------------------------------------------------------------------------------
def source(directory: pathlib.Path) -> Source:
    """What is in a directory of ours, checked: every array is there, with the right shape.

    Raises:
        ValueError: the marker or Orbax's description is not valid, or an array is missing, unknown
            or of another shape.
    """
    marker = read_marker(directory)
    folder, tree = _tree(directory / PARAMETERS)
    leaves = {
        ".".join(str(k["key"]) for k in x["key_metadata"]) for x in tree["tree_metadata"].values()
    }
    context = tensorstore.Context()
    stores = {leaf: _Store(folder, leaf, tree, context) for leaf in leaves}
    model = marker.model
    if not any(leaf.startswith("vision.") for leaf in leaves):
        model = model._replace(vision=None)
    shapes = array_shapes(model)
    scanned = any(leaf.startswith("layers.") for leaf in leaves)
    names = list(shapes)
    for name, slot in slots(model, shapes, scanned=scanned).items():
        if f"{slot.leaf}.{SCALES}" in leaves:
            names.append(name + SCALE)
    where = slots(model, names, scanned=scanned)
    wrong = sorted({slot.leaf for slot in where.values()} ^ leaves)
    if wrong:
        raise ValueError(
            f"{directory}: the configuration in {MARKER} and the arrays in {PARAMETERS} differ in "
            f"{some(wrong)}"
        )
    cut = cuts(model)
    tensors: dict[str, Rows] = {}
    arrays: dict[str, Spec] = {}
    for name, slot in where.items():
        store, stacked = stores[slot.leaf], slot.place is not None
        arrays[name] = spec = Spec(store.shape[stacked:], store.dtype)
        if spec.shape != shapes.get(name, spec.shape):
            raise ValueError(
                f"{store.folder}: {name} has shape {spec.shape}; the configuration in {MARKER} "
                f"calls for {shapes[name]}"
            )
        axis = cut.get(base(name))
        grain = 1 if axis is None else store.chunk[axis + stacked]
        tensors[name] = Slice(
            name, store.open, store.folder, place=slot.place, spec=spec, cut=axis, grain=grain
        )
    data = folder / "manifest.ocdbt"
    files = (directory / MARKER, folder / _TREE, *((data,) if data.exists() else ()))
    matches = _matches(arrays, cut)
    return Source("orbax", directory, model, arrays, matches, tensors, marker.described, files)


def _tree(parameters: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """The folder in which Orbax keeps the arrays, and its description of them."""
    for folder in (parameters, *sorted(p for p in parameters.glob("*") if p.is_dir())):
        if (folder / _TREE).exists():
            try:
                tree = json.loads((folder / _TREE).read_text())
                list(tree["tree_metadata"].values())
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{folder / _TREE}: not valid: {error!r}") from None
            return folder, tree
    raise ValueError(f"{parameters}: no Orbax checkpoint: {_TREE} is missing")


class _Store:
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
            raise ValueError(f"{self.folder}: cannot be opened: {_reason(error)}") from None
        self.shape = tuple(self._store.shape)
        self.dtype = np.dtype(self._store.dtype.numpy_dtype)
        self.chunk = tuple(n or 1 for n in self._store.chunk_layout.write_chunk.shape or ())

    def open(self) -> Any:
        """The store."""
        return self._store


# --- Writing -------------------------------------------------------------------------------------
def target(
    model: Model,
    wanted: Mapping[str, Spec],
    directory: pathlib.Path,
    *,
    described: Mapping[str, Any],
) -> Target:
    """A directory to be written, with these arrays, which `stackable` has looked at.

    Raises:
        ValueError: layers differ in what is quantized, and can neither be stacked nor left apart.
    """
    scanned, _ = stackable(model, wanted)
    where, cut = slots(model, wanted, scanned=scanned), cuts(model)
    sizes: dict[str, int | None] = {}
    for slot in where.values():
        top = None if slot.place is None else slot.place + 1
        sizes[slot.leaf] = top if top is None else max(sizes.get(slot.leaf) or 1, top)
    folder = directory / PARAMETERS
    leaves: dict[str, _NewStore] = {}
    container = _Container(directory, leaves)
    tensors: dict[str, Rows] = {}
    for name, slot in where.items():
        axis = cut.get(base(name))
        grain = _grain(wanted[name], axis)
        if slot.leaf not in leaves:
            leaves[slot.leaf] = _new_store(
                folder, slot.leaf, wanted[name], stack=sizes[slot.leaf], cut=axis, grain=grain
            )
        store = leaves[slot.leaf]
        tensors[name] = Slice(
            name,
            store.open,
            store.file,
            place=slot.place,
            spec=wanted[name],
            cut=axis,
            grain=grain,
            sync=container.sync,
        )

    def finish(sums: Mapping[str, Sum]) -> None:
        container.finish()
        write_marker(directory, Marker(model, dict(described)))

    size = sum(spec.nbytes for spec in wanted.values())
    return Target(_matches(wanted, cut), tensors, size, container.intact, container.create, finish)


class _Container:
    """Orbax's files around the arrays, which Orbax itself makes by saving a skeleton."""

    def __init__(self, directory: pathlib.Path, stores: Mapping[str, _NewStore]) -> None:
        self._directory, self._stores = directory, stores
        self._folder = directory / PARAMETERS
        self._synced: set[pathlib.Path] = set()
        # Written without waiting for the disk at each chunk; `sync` does that for many at once. One
        # context for all arrays, so that they are one store and do not vie for its manifest.
        self._context = tensorstore.Context({"file_io_sync": False})

    def intact(self) -> bool:
        """Whether all arrays are there."""
        try:
            inside, _ = _tree(self._folder)
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
        inside, _ = _tree(self._folder)
        for leaf, making in self._open(inside, create=True).items():
            try:
                making.result()
            except ValueError as error:
                raise OSError(f"{inside / leaf}: cannot be made: {_reason(error)}") from error

    def sync(self) -> None:
        """Returns when all that was written so far is on the disk."""
        inside, _ = _tree(self._folder)
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
        inside, tree = _tree(self._folder)
        first = next(iter(tree["tree_metadata"].values()))
        if first["key_metadata"][0]["key"] == _SKELETON:
            tree["tree_metadata"] = dict(
                _tree_entry(store, first) for store in self._stores.values()
            )
            write_json(inside / _TREE, tree)
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


def _tree_entry(store: _NewStore, pattern: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Orbax's description of a leaf, after the one of the skeleton."""
    keys = store.leaf.split(".")
    (key,) = pattern["key_metadata"]
    value = dict(pattern["value_metadata"]) | {"value_type": "jax.Array"}
    if "write_shape" in value:
        value["write_shape"] = list(store.shape)
    entry = {"key_metadata": [key | {"key": k} for k in keys], "value_metadata": value}
    return str(tuple(keys)), entry


def _grain(spec: Spec, cut: int | None) -> int:
    """Rows along the cut in one chunk: a power of two, so that equal arrays of any type agree."""
    if cut is None:
        return 1
    rows = max(1, CHUNK_BYTES * spec.shape[cut] // max(1, spec.nbytes))
    return 1 << (rows.bit_length() - 1)


def _new_store(
    folder: pathlib.Path, leaf: str, spec: Spec, *, stack: int | None, cut: int | None, grain: int
) -> _NewStore:
    """A stored array of slices like `spec`, `stack` of them if they are stacked."""
    chunk = list(spec.shape)
    if cut is not None:
        chunk[cut] = min(grain, chunk[cut])
    shape = spec.shape
    if stack is not None:
        shape, chunk = (stack, *shape), [1, *chunk]
    return _NewStore(folder, leaf, shape, tuple(chunk), spec.dtype)


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


class _NewStore:
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
