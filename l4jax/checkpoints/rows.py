"""Tensors that lie in files, read and written by rows and hashed on the way.

A `Cell` is one stored tensor. What a name table calls a tensor may be spread over several cells
(the shards of a model-parallel checkpoint, experts stored one by one): a `Join` says how they make
it up. Rows go in increasing order, so that one pass gives the digest of every cell, and nothing
larger than the rows asked for is ever in memory.
"""

from __future__ import annotations

import math
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
import xxhash

from l4jax.checkpoints.safetensors import Entry

_STEP = 1 << 20
"""Elements looked at together: few enough to stay in a core's cache."""
_BLOCK = 1 << 20
"""Bytes read or written together, for the same reason."""
_TILE = 256
"""Side of the squares in which a matrix is turned; larger or smaller ones miss the cache more."""
_EXPONENTS = {
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(np.float16): 0x7C00,
    np.dtype(np.float32): 0x7F80_0000,
    np.dtype(np.float64): 0x7FF0_0000_0000_0000,
    np.dtype(ml_dtypes.float8_e5m2): 0x7C,
    np.dtype(ml_dtypes.float8_e4m3fn): 0x7F,
}
"""Bits that are all set in NaN and infinity, and in no other number."""


@runtime_checkable
class Rows(Protocol):
    """A tensor of a checkpoint, as the engine of conversions sees it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    length: int
    """Rows there are."""
    grain: int
    """Rows that must be read and written together, except the last ones."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows from `start` up to `stop`."""

    def write(self, start: int, rows: np.ndarray) -> None:
        """Puts rows in their place, from `start` on."""

    def sums(self) -> dict[str, Sum]:
        """What went through, by the name of each stored tensor."""

    def stored(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of each stored tensor, by name."""

    def sync(self) -> None:
        """Returns when what was written is on the disk."""


class Sum(NamedTuple):
    """The checksums of a stored tensor's bytes: XXH3 with 128 bits, and ZIP's CRC-32 if needed."""

    digest: str
    crc: int = 0


class Cell:
    """A stored tensor.

    Args:
        key: its name in manifests and messages.
        entry: where it lies.
        shape: to see it in, if not the stored one; same bytes in the same order.
        dtype: to see its bytes as, if not the stored one.
        crc: whether to work out the CRC-32 as well.
        expected_crc: the CRC-32 that the file states; another one is an error.
    """

    def __init__(
        self,
        key: str,
        entry: Entry,
        *,
        shape: tuple[int, ...] | None = None,
        dtype: np.dtype | None = None,
        crc: bool = False,
        expected_crc: int | None = None,
    ) -> None:
        self.key, self.entry = key, entry
        self.shape = entry.shape if shape is None else shape
        self.dtype = entry.dtype if dtype is None else dtype
        self._hash = xxhash.xxh3_128()
        self._crc = 0 if crc or expected_crc is not None else None
        self._expected_crc = expected_crc
        self._next = 0
        self._row = math.prod(self.shape[1:]) * self.dtype.itemsize

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows from `start` up to `stop`.

        Raises:
            ValueError: the file ended early or changed, a number is not finite, or the checksum
                that the file states is another one.
        """
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        data = rows.reshape(-1).view(np.uint8)
        self._begin(start, stop)
        # Block by block, so that a block is still in the core's cache when it is looked at.
        for first in range(0, data.size, _BLOCK):
            block = data[first : first + _BLOCK]
            self._fill(block, start * self._row + first)
            self._add(block)
            place = first_not_finite(block.view(self.dtype))
            if place is not None:
                place += first // self.dtype.itemsize
                index = tuple(map(int, np.unravel_index(place, rows.shape)))
                raise ValueError(
                    f"{self.entry.file}: {self.key} holds {rows[index]} at "
                    f"{(start + index[0], *index[1:])}; weights must be finite"
                )
        if stop == self.shape[0] and self._expected_crc not in (None, self._crc):
            raise ValueError(
                f"{self.entry.file}: {self.key} is damaged: its CRC-32 is {self._crc:#010x}, the "
                f"file says {self._expected_crc:#010x}"
            )
        return rows

    def write(self, start: int, rows: np.ndarray) -> None:
        """Puts rows in their place in the file, which must have its full size already."""
        assert rows.shape[1:] == self.shape[1:], (self.key, rows.shape, self.shape)
        assert rows.dtype == self.dtype, (self.key, rows.dtype, self.dtype)
        data = compact(rows).reshape(-1).view(np.uint8)
        self._begin(start, start + len(rows))
        for first in range(0, data.size, _BLOCK):
            block = data[first : first + _BLOCK]
            self._add(block)
            try:
                _write(self.entry.file, self.entry.offset + start * self._row + first, block)
            except OSError as error:
                why = f"{error.strerror}, while writing {self.key}"
                raise OSError(error.errno, why, os.fspath(self.entry.file)) from error

    def sum(self) -> Sum:
        """The checksums of what went through; all rows must have."""
        assert self._next == self.shape[0], (self.key, self._next, self.shape)
        return Sum(self._hash.hexdigest(), self._crc or 0)

    def _fill(self, block: np.ndarray, offset: int) -> None:
        """Reads bytes of the tensor from `offset` on."""
        try:
            done = _read(self.entry.file, self.entry.offset + offset, block)
        except OSError as error:
            why = f"{error.strerror}, while reading {self.key}"
            raise OSError(error.errno, why, os.fspath(self.entry.file)) from error
        if done != block.size:
            raise ValueError(
                f"{self.entry.file}: truncated: {self.key} should have {block.size} bytes at byte "
                f"{offset}, {done} are there"
            )

    def _begin(self, start: int, stop: int) -> None:
        if start == 0:
            self._hash.reset()
            self._crc, self._next = None if self._crc is None else 0, 0
        assert start == self._next, (self.key, start, self._next)
        self._next = stop

    def _add(self, block: np.ndarray) -> None:
        self._hash.update(block.data)
        if self._crc is not None:
            self._crc = zlib.crc32(block.data, self._crc)


class Join(NamedTuple):
    """How cells make up a tensor.

    axis: the dimension along which they lie next to each other; None if each is the whole.
    sections: for axis 0, the rows of the parts that are divided among the cells one by one, each
        cell holding its share of the first, then of the second, and so on; one part by default.
    holders: for axis 0, into how many shares a part can be divided at most; where there are more
        cells, neighbours hold the same.
    """

    axis: int | None = 0
    sections: tuple[int, ...] = ()
    holders: int | None = None

    def copies(self, cells: int) -> int:
        """How many neighbouring ones of this many cells hold the same."""
        return max(1, cells // self.holders) if self.holders else 1


class Joined:
    """A tensor made up of cells; implements `Rows`."""

    grain = 1

    def __init__(self, cells: Sequence[Cell], join: Join = Join()) -> None:
        self.cells, self.join = tuple(cells), join
        first = self.cells[0]
        self.dtype, shape = first.dtype, list(first.shape)
        if join.axis is not None:
            shape[join.axis] = sum(c.shape[join.axis] for c in self.cells)
            shape[join.axis] //= join.copies(len(self.cells))
        self.shape = tuple(shape)
        self.length = self.shape[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows from `start` up to `stop`.

        Raises:
            ValueError: as `Cell.read` does, or cells that should be equal differ.
        """
        if self.join.axis == 0:
            return self._read_spans(start, stop)
        parts = [cell.read(start, stop) for cell in self.cells]
        if self.join.axis is not None:
            return np.concatenate([plain(p) for p in parts], axis=self.join.axis).view(self.dtype)
        for cell, part in zip(self.cells, parts, strict=True):
            self._check_copy(cell, part, parts[0])
        return parts[0]

    def write(self, start: int, rows: np.ndarray) -> None:
        """Puts rows in their place in every cell."""
        axis = self.join.axis
        if axis == 0:
            for cell, inside, outside in self._spans(start, start + len(rows)):
                cell.write(inside.start, rows[outside.start - start : outside.stop - start])
        elif axis is None:
            for cell in self.cells:
                cell.write(start, rows)
        else:
            for cell, part in zip(self.cells, np.split(rows, len(self.cells), axis), strict=True):
                cell.write(start, part)

    def view(self, start: int, stop: int) -> np.ndarray:
        """Rows as they lie in the files, mapped where they lie together: for loading models."""
        if self.join.axis == 0:
            parts = [c.entry.read().reshape(c.shape)[at] for c, at, _ in self._spans(start, stop)]
            parts = parts[:: self.join.copies(len(self.cells))]
        else:
            parts = [c.entry.read().reshape(c.shape)[start:stop] for c in self.cells]
        parts = [part.view(self.dtype) for part in parts]
        if len(parts) == 1 or self.join.axis is None:
            return parts[0]
        return np.concatenate([plain(part) for part in parts], self.join.axis).view(self.dtype)

    def sums(self) -> dict[str, Sum]:
        """The checksums of every cell."""
        return {cell.key: cell.sum() for cell in self.cells}

    def stored(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of every cell, as the file has them."""
        return {cell.key: (cell.entry.shape, cell.entry.dtype.name) for cell in self.cells}

    def sync(self) -> None:
        """Returns when what was written is on the disk."""
        for file in {cell.entry.file for cell in self.cells}:
            with open(file, "rb", buffering=0) as stream:
                os.fsync(stream.fileno())

    def _read_spans(self, start: int, stop: int) -> np.ndarray:
        spans = list(self._spans(start, stop))
        if len(spans) == 1:
            return spans[0][0].read(spans[0][1].start, spans[0][1].stop)
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        previous: tuple[slice, np.ndarray] | None = None
        for cell, inside, outside in spans:
            part = cell.read(inside.start, inside.stop)
            if previous is not None and previous[0] == outside:
                self._check_copy(cell, part, previous[1])
            else:
                plain(rows)[outside.start - start : outside.stop - start] = plain(part)
                previous = outside, part
        return rows

    def _spans(self, start: int, stop: int) -> Iterator[tuple[Cell, slice, slice]]:
        """Of rows from `start` to `stop`: which cell has them, at its rows, and our rows."""
        copies = self.join.copies(len(self.cells))
        holders = len(self.cells) // copies
        begin, inside = 0, 0
        for size in self.join.sections or (self.shape[0],):
            share = size // holders
            for holder in range(holders):
                first = begin + holder * share
                low, high = max(start, first), min(stop, first + share)
                if low < high:
                    at = slice(inside + low - first, inside + high - first)
                    for cell in self.cells[holder * copies : (holder + 1) * copies]:
                        yield cell, at, slice(low, high)
            begin, inside = begin + size, inside + share

    def _check_copy(self, cell: Cell, part: np.ndarray, expected: np.ndarray) -> None:
        if part.tobytes() != expected.tobytes():
            raise ValueError(
                f"{cell.entry.file}: {cell.key} differs from {self.cells[0].key}, of which it "
                f"should be a copy: the shards belong to different checkpoints, or one is damaged"
            )


# --- Bytes ---------------------------------------------------------------------------------------
def compact(x: np.ndarray) -> np.ndarray:
    """`x` in C order; a turned matrix is copied square by square, several times as fast."""
    if x.flags.c_contiguous:
        return x
    y = np.empty(x.shape, x.dtype)
    source, target = plain(x), plain(y)
    if x.ndim < 2 or x.strides[-1] <= abs(x.strides[-2]):
        target[...] = source
        return y
    for index in np.ndindex(x.shape[:-2]):
        a, b = source[index], target[index]
        for i in range(0, a.shape[0], _TILE):
            for j in range(0, a.shape[1], _TILE):
                b[i : i + _TILE, j : j + _TILE] = a[i : i + _TILE, j : j + _TILE]
    return y


def cast(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`x` in another type; bfloat16 is widened by a shift, which NumPy does not know."""
    if x.dtype == dtype:
        return x
    if x.dtype == ml_dtypes.bfloat16 and dtype == np.float32:
        wide = compact(x).view(np.uint16).astype(np.uint32)
        return np.left_shift(wide, 16, out=wide).view(np.float32)
    with np.errstate(over="ignore"):  # whoever narrows a type looks at the result
        return x.astype(dtype)


def first_not_finite(x: np.ndarray) -> int | None:
    """Place of the first NaN or infinity in C order; None if all is finite or no float."""
    mask = _EXPONENTS.get(x.dtype)
    if mask is None:
        return None
    flat = plain(x.reshape(-1))
    bits = flat.dtype.type(mask)
    for start in range(0, flat.size, _STEP):
        wrong = (flat[start : start + _STEP] & bits) == bits
        if wrong.any():
            return start + int(wrong.argmax())
    return None


def plain(x: np.ndarray) -> np.ndarray:
    """`x` as integers of its size, which NumPy moves faster than the types it does not know."""
    return x.view(np.dtype(f"u{x.dtype.itemsize}"))


def _read(file: pathlib.Path, offset: int, data: np.ndarray) -> int:
    """Bytes read into `data`, fewer than it takes at the end of the file."""
    done, view = 0, data.data
    with open(file, "rb", buffering=0) as stream:
        while done < len(view) and (step := os.preadv(stream.fileno(), [view[done:]], offset)):
            done, offset = done + step, offset + step
    return done


def _write(file: pathlib.Path, offset: int, data: np.ndarray) -> None:
    done, view = 0, data.data
    with open(file, "r+b", buffering=0) as stream:
        while done < len(view):
            done += os.pwrite(stream.fileno(), view[done:], offset + done)
