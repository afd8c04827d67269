"""The arrays of our Orbax directories, read and written slice by slice.

Neither writing nor reading a slice touches the rest of an array that may be far larger than memory;
`stores` says how the arrays lie on the disk.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorstore
import xxhash

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
from l4jax.checkpoints.stores import TREE, Container, NewStore, Store, new_store, read_tree, reason
from l4jax.checkpoints.tables import Layout, Match
from l4jax.kernels.quantized import scheme_of


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
            raise ValueError(f"{self.file}: {self.key} cannot be read: {reason(error)}") from error
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
            raise OSError(f"{self.file}: {self.key} cannot be written: {reason(error)}") from error
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
    folder, tree = read_tree(directory / PARAMETERS)
    leaves = {
        ".".join(str(k["key"]) for k in x["key_metadata"]) for x in tree["tree_metadata"].values()
    }
    context = tensorstore.Context()
    stores = {leaf: Store(folder, leaf, tree, context) for leaf in leaves}
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
    files = (directory / MARKER, folder / TREE, *((data,) if data.exists() else ()))
    matches = _matches(arrays, cut)
    return Source("orbax", directory, model, arrays, matches, tensors, marker.described, files)


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
    leaves: dict[str, NewStore] = {}
    container = Container(directory, leaves)
    tensors: dict[str, Rows] = {}
    for name, slot in where.items():
        axis = cut.get(base(name))
        grain = _grain(wanted[name], axis)
        if slot.leaf not in leaves:
            leaves[slot.leaf] = new_store(
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


def _grain(spec: Spec, cut: int | None) -> int:
    """Rows along the cut in one chunk: a power of two, so that equal arrays of any type agree."""
    if cut is None:
        return 1
    rows = max(1, CHUNK_BYTES * spec.shape[cut] // max(1, spec.nbytes))
    return 1 << (rows.bit_length() - 1)
