"""What goes into which row: plans made of lengths alone, before a token is read.

A packer gives the next rows after a cursor, and the cursor after them. It keeps nothing in between,
so the cursor, two numbers, is all there is to save; and since it is made of lengths only, every
process plans all rows and reads those it needs.

    cursor = START
    plan, cursor = packer.take(cursor, 32)
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from l4jax.data.mixture import Mixture, Order

WINDOW = 8192
"""Examples that are packed together. 1,024 already leave under 1 % of the rows' room unused."""

Cursor = tuple[int, int]
START: Cursor = (0, 0)


class Plan(NamedTuple):
    """What rows are made of.

    Attributes:
        pieces: Int64[5 n], row by row in the order of the tokens: the row, counted from the plan's
            first; the number of the store; the number of the example in it; the first of its tokens
            that the row has; and how many of them.
        rows: number of rows, the last ones maybe empty.
    """

    pieces: np.ndarray
    rows: int


class Split:
    """Documents back to back, cut at the ends of rows: no room is left unused.

    Documents longer than a row are cut into pieces of one first, so that the shuffle mixes them
    too. A cursor is the piece that comes next and how many of its tokens are in rows already.

    Args:
        mixture: what to pack; examples of one segment.
        length: tokens per row.
        seed: of the order.
    """

    def __init__(self, mixture: Mixture, *, length: int, seed: int | None) -> None:
        for number, store in enumerate(mixture.stores):
            if store.most_segments > 1:
                raise ValueError(
                    f"store {number} ({store!r}) has examples of several segments, which may not "
                    "be cut; use packing='best_fit' or 'none'"
                )
        self._pieces = [_Pieces(store.lengths, length) for store in mixture.stores]
        self._order = mixture.order([len(pieces) for pieces in self._pieces], seed)
        self._length = length
        tokens = sum(int(store.lengths.sum()) for store in mixture.stores)
        self._mean = tokens / sum(map(len, self._pieces))

    def take(self, cursor: Cursor, count: int) -> tuple[Plan, Cursor]:
        """The `count` rows after a cursor, fewer at the order's end, and the cursor after them."""
        piece, done = cursor
        wanted = count * self._length
        ahead = int(wanted / self._mean) + 16
        while True:
            last = min(piece + ahead, len(self._order))
            stores, examples, starts, sizes = self._read(np.arange(piece, last))
            if done:
                starts[0] += done
                sizes[0] -= done
            ends = np.cumsum(sizes)
            total = int(ends[-1]) if len(ends) else 0
            if total >= wanted or last == len(self._order):
                break
            ahead *= 2
        total = min(total, wanted)
        rows = -(-total // self._length)
        # Segments begin where a piece or a row does.
        cuts = np.union1d(np.minimum(ends, total), np.arange(0, total, self._length))
        cuts = np.union1d(cuts, [0, total])
        begins = cuts[:-1]
        which = np.searchsorted(ends, begins, side="right")
        into = begins - (ends - sizes)[which]
        fields = begins // self._length, stores[which], examples[which], starts[which] + into
        plan = Plan(np.stack([*fields, np.diff(cuts)]), rows)
        used = int(np.searchsorted(ends, total, side="right"))
        if used == len(ends):
            return plan, (last, 0)
        into = total - int(ends[used] - sizes[used])
        return plan, (piece + used, into + (done if used == 0 else 0))

    def _read(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Store, example, start and size of the pieces at places of the order."""
        stores, items = self._order.at(places)
        found = np.empty((3, len(places)), np.int64)
        for number, pieces in enumerate(self._pieces):
            mine = stores == number
            found[:, mine] = pieces.at(items[mine])
        return stores, *found


class _Pieces:
    """The pieces of at most `length` tokens of one store's documents."""

    def __init__(self, lengths: np.ndarray, length: int) -> None:
        self._lengths, self._length = lengths, length
        self._ends = np.cumsum(-(-lengths // length))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def at(self, items: np.ndarray) -> np.ndarray:
        """Example, start and size of pieces, Int64[3 n]."""
        examples = np.searchsorted(self._ends, items, side="right")
        lengths = self._lengths[examples]
        before = self._ends[examples] - -(-lengths // self._length)
        starts = (items - before) * self._length
        return np.stack([examples, starts, np.minimum(lengths - starts, self._length)])


class Whole:
    """Examples uncut: several to a row by best fit, or one.

    Best fit packs windows of the order, each by itself, and shuffles the rows of each, as the
    longest examples share rows with the shortest. A cursor is a window and a row in it.

    Args:
        mixture: what to pack.
        length: tokens per row.
        seed: of the order, and of the rows in a window; None leaves rows as they are packed.
        fit: whether to put several examples into a row.
        segments: the most of them in a row; None sets no limit.

    Raises:
        ValueError: an example does not fit a row, or is empty.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        length: int,
        seed: int | None,
        fit: bool = True,
        segments: int | None = None,
    ) -> None:
        for number, store in enumerate(mixture.stores):
            _check_fit(f"store {number} ({store!r})", store, length, segments)
        self._stores = mixture.stores
        self._order: Order = mixture.order([len(store) for store in mixture.stores], seed)
        self._length, self._segments, self._fit, self._seed = length, segments, fit, seed
        # A batch ends in one window, where the next one begins.
        self._window = functools.lru_cache(maxsize=2)(self._packed)

    def take(self, cursor: Cursor, count: int) -> tuple[Plan, Cursor]:
        """See `Split.take`."""
        window, row = cursor
        parts = []
        made = 0
        while made < count and window * WINDOW < len(self._order):
            plan = self._window(window)
            size = min(count - made, plan.rows - row)
            first, last = np.searchsorted(plan.pieces[0], [row, row + size])
            part = plan.pieces[:, first:last].copy()
            part[0] += made - row
            parts.append(part)
            made, row = made + size, row + size
            if row == plan.rows:
                window, row = window + 1, 0
        return Plan(np.concatenate([np.zeros((5, 0), np.int64), *parts], 1), made), (window, row)

    def _packed(self, window: int) -> Plan:
        """The rows of a window."""
        last = min((window + 1) * WINDOW, len(self._order))
        stores, examples = self._order.at(np.arange(window * WINDOW, last))
        sizes, segments = np.empty_like(examples), np.empty_like(examples)
        for number, store in enumerate(self._stores):
            mine = stores == number
            sizes[mine] = store.lengths[examples[mine]]
            segments[mine] = store.segments[examples[mine]]
        rows = np.arange(len(sizes))
        if self._fit:
            rows = best_fit(sizes, self._length, counts=segments, most=self._segments)
            if self._seed is not None:
                rng = np.random.default_rng((self._seed, window))
                rows = rng.permutation(int(rows.max()) + 1)[rows]
        pieces = np.stack([rows, stores, examples, np.zeros_like(sizes), sizes])
        return Plan(pieces[:, np.argsort(rows, kind="stable")], int(rows.max()) + 1)


Packer = Split | Whole


def best_fit(
    sizes: np.ndarray, room: int, *, counts: np.ndarray | None = None, most: int | None = None
) -> np.ndarray:
    """The bin of each item, Int64[n]: largest first, each into the fullest bin that takes it.

    Best-fit decreasing needs at most 11/9 of the fewest bins possible, and 4 more (Johnson,
    Near-optimal bin packing algorithms, 1973). Bins are numbered from 0.

    Args:
        sizes: Int64[n], none above `room`.
        room: size of a bin.
        counts: Int64[n], what each item adds to its bin's count; 1 by default.
        most: the most that a bin may count; None sets no limit.
    """
    weigh = [1] * len(sizes) if counts is None else counts.tolist()
    limit = sum(weigh) if most is None else most
    bins = np.empty(len(sizes), np.int64)
    rooms: list[tuple[int, int, int]] = []  # room left, bin, and its count; fullest first
    made = 0
    order = np.argsort(-sizes, kind="stable").tolist()
    for item, size in zip(order, sizes[order].tolist(), strict=True):
        place = bisect.bisect_left(rooms, (size, 0, 0))
        while place < len(rooms) and rooms[place][2] + weigh[item] > limit:
            place += 1
        if place < len(rooms):
            left, chosen, count = rooms.pop(place)
        else:
            left, chosen, count, made = room, made, 0, made + 1
        bins[item] = chosen
        if left > size and count + weigh[item] < limit:
            bisect.insort(rooms, (left - size, chosen, count + weigh[item]))
    return bins


class Efficiency(NamedTuple):
    """How well rows are filled.

    Attributes:
        rows: number of rows looked at.
        padding: share of their tokens that is padding.
        examples_per_row: mean number of examples, or pieces of them, in a row.
    """

    rows: int
    padding: float
    examples_per_row: float


def efficiency(packer: Packer, length: int, *, rows: int = 10_000) -> Efficiency:
    """How well the first rows are filled.

    Args:
        packer: makes the rows.
        length: tokens per row.
        rows: how many to look at.
    """
    plan, _ = packer.take(START, rows)
    filled = int(plan.pieces[4].sum()) / (plan.rows * length)
    return Efficiency(plan.rows, 1 - filled, plan.pieces.shape[1] / plan.rows)


def _check_fit(name: str, store: Any, length: int, segments: int | None) -> None:
    lengths = store.lengths
    if int(lengths.max()) > length:
        where = int(lengths.argmax())
        raise ValueError(
            f"{name}: {int((lengths > length).sum())} of {len(lengths)} examples are longer than "
            f"a row of {length} tokens, example {where} the longest with {int(lengths.max())}; "
            f"tokenize with max_length={length}, or use longer rows"
        )
    if int(lengths.min()) == 0:
        raise ValueError(f"{name}: example {int(lengths.argmin())} has no tokens")
    if segments is not None and store.most_segments > segments:
        raise ValueError(
            f"{name}: an example has {store.most_segments} segments, but segments={segments} is "
            "the most that a row may hold"
        )


PACKINGS: dict[str, Callable[..., Packer]] = {
    "split": Split,
    "best_fit": Whole,
    "none": functools.partial(Whole, fit=False),
}
"""By the name that `pipeline.batches` calls them."""


def rows_of(plan: Plan, rows: Sequence[int]) -> Plan:
    """The part of a plan in some of its rows, which are counted anew in the order given."""
    number = np.full(max(plan.rows, *rows, 0) + 1, -1)
    number[list(rows)] = np.arange(len(rows))
    pieces = plan.pieces[:, number[plan.pieces[0]] >= 0]
    pieces[0] = number[pieces[0]]
    return Plan(pieces[:, np.argsort(pieces[0], kind="stable")], len(rows))
