"""Tokenized examples to shuffled, mixed, packed batches, as a Grain dataset.

Keys of a batch, each Int32[b t]: tokens; segment_ids, which number a row's segments from 1, 0 where
there is padding; positions, which restart with each segment. Where a store says which tokens are to
be predicted, loss_mask, Bool[b t]. With `segments`, each Int32[b s] with a column for each segment:
example, the number of its example, -1 where there is no such segment; and where examples have
several segments, groups, the number in its row of the example it belongs to, from 1, 0 for none,
and ranks, which count an example's segments down to 0 for the last and worst. With images, tiles,
Float32[m c y x], of all rows' images one after another, and places, Int32[b t]: which of the tiles'
features stands at a token, -1 where none does (`models.multimodal.Images`).

An iterator's state is where the next batch begins: two numbers of the packer's, and the number of
the batch. What comes next follows from them whatever the number of workers, and of processes, of
which each reads no more than its own rows.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import grain
import numpy as np

import l4jax.data.images as pictures
from l4jax.data.mixture import Mixture
from l4jax.data.packing import (
    PACKINGS,
    START,
    WINDOW,
    Cursor,
    Efficiency,
    Packer,
    Plan,
    efficiency,
    rows_of,
)
from l4jax.data.store import MemoryStore

Batch = dict[str, np.ndarray]
Sizes = int | Callable[[int], int] | Sequence[tuple[int, int]]
Rows = Sequence[int] | Callable[[int], Sequence[int]]
KEYS = ("tokens", "segment_ids", "positions")


def batches(
    mixture: Mixture,
    *,
    length: int,
    batch_size: Sizes,
    seed: int | None,
    packing: Literal["split", "best_fit", "none"] = "split",
    rows: Rows | None = None,
    segments: int | None = None,
    workers: int = 0,
) -> Batches:
    """Batches of a mixture's examples.

    Args:
        mixture: which stores, how often, how many epochs. The last batch of the last epoch is
            filled up with empty rows.
        length: tokens per row.
        batch_size: rows per batch; or a function of the batch's number; or a list of pairs (from
            which batch on, rows), the first from batch 0.
        seed: of the shuffle; None keeps the examples' order.
        packing: "split" cuts documents at rows' ends and leaves no padding; "best_fit" puts whole
            examples together; "none" has one example in a row.
        rows: those of each batch to make here, all by default: numbers, or a function of the batch
            size. Processes that take different ones see together what one process sees alone.
        segments: the most segments in a row; asks for the keys that tell of them. Not with "split",
            which takes what comes.
        workers: threads that read ahead. Reading is copying, during which Python lets others run.

    Raises:
        ValueError: an argument is out of range, or an example does not fit a row.
    """
    settings = _Settings(length, batch_size, seed, packing, rows, segments, workers)
    return Batches(mixture, settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """How the images of a batch come with it.

    Tiles are padded, by black ones that no token refers to, to a number of few: powers of two and
    one and a half times those, times `multiple`. So a step is compiled for few shapes.
    """

    settings: pictures.Settings
    """How they become tiles."""
    patch_id: int
    """The token that a feature stands in the place of."""
    multiple: int = 1
    """As many as a mesh has devices with different tokens."""
    pieces: int = 1
    """Into so many a batch is cut, as `trainer.Update(accumulate=…)` says: each has tiles of its
    own, which take turns, as rows do. Places are counted through those of a piece."""

    def room(self, count: int) -> int:
        """The number of tiles to pad `count` to."""
        units = -(-max(count, 1) // self.multiple)
        power = 1 << (units - 1).bit_length()
        return self.multiple * (power * 3 // 4 if units <= power * 3 // 4 else power)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The arguments of `batches`."""

    length: int
    batch_size: Sizes
    seed: int | None
    packing: str
    rows: Rows | None = None
    segments: int | None = None
    workers: int = 0
    images: Images | None = None
    skip: int = 0
    """Batches to leave out at the beginning; only where all have the same size."""
    whole: bool = False
    """Whether a last batch that is not full is left out."""

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, int) and (self.length < 1 or self.batch_size < 1):
            raise ValueError(
                f"length {self.length} and batch_size {self.batch_size} must be at least 1"
            )
        if self.length < 1 or self.workers < 0 or self.skip < 0:
            raise ValueError(
                f"length {self.length} must be at least 1, workers {self.workers} and skip "
                f"{self.skip} must not be negative"
            )
        if self.packing not in PACKINGS:
            known = ", ".join(PACKINGS)
            raise ValueError(f"unknown packing {self.packing!r}; use one of {known}")
        if self.segments is not None and (self.packing == "split" or self.segments < 1):
            raise ValueError(
                f"segments={self.segments} with packing={self.packing!r}: it must be at least 1, "
                "and rows of 'split' hold as many as come"
            )
        if self.images is not None and self.packing == "split":
            raise ValueError("packing 'split' would cut images; use 'best_fit' or 'none'")
        if isinstance(self.batch_size, Sequence):
            _check_ramp(self.batch_size)
        self.rows_of(self.size(0))

    def size(self, batch: int) -> int:
        """Rows of a batch."""
        if isinstance(self.batch_size, int):
            return self.batch_size
        if callable(self.batch_size):
            size = int(self.batch_size(batch))
            if size < 1:
                raise ValueError(f"batch {batch} has size {size}; it must be at least 1")
            return size
        return next(size for begin, size in reversed(self.batch_size) if begin <= batch)

    def rows_of(self, size: int) -> Sequence[int]:
        """The rows to make of a batch of `size` rows."""
        if self.rows is None:
            return range(size)
        rows = self.rows(size) if callable(self.rows) else self.rows
        if not len(rows) or not all(0 <= row < size for row in rows):
            raise ValueError(f"rows {list(rows)} must be some of the {size} of a batch")
        return rows

    def packer(self, mixture: Mixture) -> Packer:
        """What plans the rows."""
        limit = {} if self.packing == "split" else {"segments": self.segments}
        make = PACKINGS[self.packing]
        return make(mixture, length=self.length, seed=self.seed, **limit)


def _check_ramp(sizes: Sequence[tuple[int, int]]) -> None:
    begins = [begin for begin, _ in sizes]
    if not begins or begins[0] != 0 or begins != sorted(set(begins)) or min(sizes)[1] < 1:
        raise ValueError(
            f"batch sizes {list(sizes)} must be pairs (from which batch on, rows), the first from "
            "batch 0, later ones from later batches"
        )
    for begin, size in sizes:
        if size < 1:
            raise ValueError(f"batch size {size} from batch {begin} on must be at least 1")


class Position(NamedTuple):
    """Where a batch begins."""

    cursor: Cursor
    batch: int


class Batches(grain.IterDataset):
    """What `batches` returns."""

    def __init__(self, mixture: Mixture, settings: _Settings) -> None:
        super().__init__()
        self._mixture, self.settings = mixture, settings
        self._packer = settings.packer(mixture)
        self.has_mask = any(store.has_mask for store in mixture.stores)
        self._grouped = any(store.most_segments > 1 for store in mixture.stores)
        if settings.segments is not None and mixture.first[-1] > 2**31:
            raise ValueError(f"{mixture.first[-1]:,} examples are too many to number in 32 bits")

    def with_images(self, images: Images) -> Batches:
        """The same batches with tiles and places.

        Raises:
            ValueError: rows are cut, and so would images be.
        """
        return Batches(self._mixture, dataclasses.replace(self.settings, images=images))

    def __iter__(self) -> BatchIterator:
        if self.settings.images is None and any(map(_has_images, self._mixture.stores)):
            raise ValueError("the examples have images: say how they become tiles (with_images)")
        return BatchIterator(self)

    def __str__(self) -> str:
        return f"Batches({self.settings.packing}, {self.settings.length} tokens)"

    def efficiency(self, *, rows: int = 10_000) -> Efficiency:
        """How well the first rows are filled; made of lengths, nothing is read."""
        return efficiency(self._packer, self.settings.length, rows=rows)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the data and of all that decides which rows come when: what a position counts.

        Batches may grow or shrink on the way: the next one begins with the row that comes next.
        """
        settings, mixture = self.settings, self._mixture
        parts = [
            [store.meta["content"] for store in mixture.stores],
            [str(weight) for weight in mixture.weights or ()],
            [mixture.unit, mixture.epochs, WINDOW],
            [settings.length, settings.seed, settings.packing, settings.segments],
        ]
        if settings.images is not None:
            parts.append([repr(settings.images.settings), settings.images.patch_id])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def start(self) -> Position:
        """Where the first batch begins."""
        cursor, size = START, self.settings.size(0)
        left = self.settings.skip * size
        while left:
            plan, cursor = self._packer.take(cursor, min(left, 4096))
            left = left - plan.rows if plan.rows else 0
        return Position(cursor, self.settings.skip)

    def plan(self, position: Position) -> tuple[Plan, Position]:
        """The rows of a batch, no rows at the end, and where the next batch begins."""
        size = self.settings.size(position.batch)
        plan, cursor = self._packer.take(position.cursor, size)
        if plan.rows < size:
            whole = self.settings.whole
            plan = plan._replace(rows=0 if whole or not plan.rows else size)
        return plan, Position(cursor, position.batch + 1)

    def read(self, plan: Plan) -> Batch:
        """The batch that a plan describes: of its rows, those to make here."""
        whole, plan = plan, rows_of(plan, self.settings.rows_of(plan.rows))
        rows, stores, examples, _, sizes = plan.pieces
        used = np.bincount(rows, sizes, minlength=plan.rows)
        filled = np.arange(self.settings.length) < used[:, None]
        # A batch of empty rows only has no part to join.
        tokens, masks = [np.zeros(0, np.int32)], [np.zeros(0, np.bool_)]
        for number, example, start, size in plan.pieces[1:].T.tolist():
            store = self._mixture.stores[number]
            tokens.append(store.tokens(example, start, start + size))
            if self.has_mask:
                mask = store.loss_mask(example, start, start + size)
                masks.append(np.ones(size, np.bool_) if mask is None else mask)
        counts, lengths = self._segments(plan)
        piece = np.repeat(np.arange(len(rows)), counts)
        number = np.arange(len(piece)) - np.searchsorted(rows[piece], rows[piece])
        begins = np.repeat(np.cumsum(lengths) - lengths, lengths)
        made: Batch = {
            "tokens": _spread(filled, np.concatenate(tokens)),
            "segment_ids": _spread(filled, np.repeat(number + 1, lengths)),
            "positions": _spread(filled, np.arange(len(begins)) - begins),
        }
        if self.has_mask:
            made["loss_mask"] = _spread(filled, np.concatenate(masks), np.bool_)
        if self.settings.images is not None:
            made |= self._images(whole, made["tokens"], self.settings.images)
        if self.settings.segments is None:
            return made
        place = np.arange(len(piece)) - np.repeat(np.cumsum(counts) - counts, counts)
        told = {"example": (self._mixture.first[stores] + examples)[piece]}
        if self._grouped:
            told["groups"] = piece - np.searchsorted(rows, rows[piece]) + 1
            told["ranks"] = counts[piece] - 1 - place
        for name, value in told.items():
            none = -1 if name == "example" else 0
            made[name] = np.full((plan.rows, self.settings.segments), none, np.int32)
            made[name][rows[piece], number] = value
        return made

    def _images(self, plan: Plan, tokens: np.ndarray, how: Images) -> Batch:
        """Tiles and places of a whole batch: those to make here, for `tokens`, the rows made here.

        Every process knows how many tiles each row has, and makes its share of all tiles, whichever
        rows they are for. What an example shows twice, as both answers do, has tiles once.
        """
        stores = self._mixture.stores
        names = list(zip(*plan.pieces[:3].tolist(), strict=True))
        tiles = np.array([stores[store].tiles[example] for _, store, example in names], np.int64)
        of_row = np.bincount(plan.pieces[0], tiles, minlength=plan.rows).astype(np.int64)
        by_piece = of_row.reshape(-1, how.pieces)
        room = how.room(int(by_piece.sum(axis=0).max()))
        first = (np.cumsum(by_piece, axis=0) - by_piece).reshape(-1)
        own = np.array(self.settings.rows_of(plan.rows))
        asked: dict[int, list[np.ndarray]] = {row: [] for row in own.tolist()}
        # Where each tile to be made here stands among those of this process.
        wanted = {n: i for i, n in enumerate(self.settings.rows_of(room * how.pieces))}
        side = how.settings.tile_size
        made = np.full((len(wanted), 3, side, side), -1, np.float32)
        within = np.zeros(plan.rows, np.int64)
        for (row, store, example), count in zip(names, tiles.tolist(), strict=True):
            start = first[row] + within[row]
            numbers = (start + np.arange(count)) * how.pieces + row % how.pieces
            within[row] += count
            if row in asked:
                asked[row].append(start + stores[store].asked(example))
            if not wanted.keys().isdisjoint(numbers.tolist()):
                found = stores[store].pictures(example)
                cut = np.concatenate([_tiles(picture, how.settings) for picture in found])
                for number, tile in zip(numbers.tolist(), cut, strict=True):
                    if number in wanted:
                        made[wanted[number]] = tile
        return {"tiles": made, "places": _places(tokens == how.patch_id, asked.values(), how)}

    def _segments(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """How many segments each piece has, and the length of each segment."""
        _, stores, examples, _, sizes = plan.pieces
        if not self._grouped:
            return np.ones_like(sizes), sizes
        ends = [
            self._mixture.stores[number].ends(example)
            for number, example in zip(stores.tolist(), examples.tolist(), strict=True)
        ]
        counts = np.array([len(x) for x in ends], np.int64)
        lengths = [np.diff(x, prepend=0) for x in ends]
        return counts, np.concatenate([np.zeros(0, np.int64), *lengths])


def _places(patches: np.ndarray, asked: Iterable[Sequence[np.ndarray]], how: Images) -> np.ndarray:
    """Int32[b t]: the feature at each token of images, of the tiles that each row asks for."""
    each = how.settings.tokens_per_tile
    tiles = [np.concatenate([np.zeros(0, np.int64), *parts]) for parts in asked]
    found, wanted = patches.sum(axis=1).tolist(), [len(row) for row in tiles]
    if found != [each * count for count in wanted]:
        raise ValueError(
            f"rows have {found} tokens of id {how.patch_id} for {wanted} tiles of {each} features: "
            "tokenize again, with the settings of this model's images"
        )
    places = np.full(patches.shape, -1, np.int32)
    places[patches] = (np.concatenate(tiles)[:, None] * each + np.arange(each)).reshape(-1)
    return places


def _has_images(store: Any) -> bool:
    """Stores of texts may leave out how many tiles their examples have."""
    return bool(np.any(getattr(store, "tiles", 0)))


def _tiles(picture: pictures.Picture, settings: pictures.Settings) -> np.ndarray:
    cut = pictures.tile(pictures.read(picture.content), settings)
    if cut.grid != picture.grid:
        raise ValueError(
            f"an image has {cut.grid} tiles and had {picture.grid} when it was tokenized: tokenize "
            "again, with the settings of this model's images"
        )
    return cut.tiles


def _spread(filled: np.ndarray, values: np.ndarray, dtype: type = np.int32) -> np.ndarray:
    """Values on the filled places of rows, row by row, and zeros on the others."""
    made: np.ndarray = np.zeros(filled.shape, dtype)
    made[filled] = values
    return made


class BatchIterator(grain.DatasetIterator):
    """Batches one after another; its state is that of the batch that comes next.

    Plans are made here, in turn; workers read what they say. A batch that was read ahead but not
    yet taken is not part of the state, and is read again after a restart.
    """

    def __init__(self, data: Batches) -> None:
        super().__init__()
        self._data = data
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._ahead: collections.deque[tuple[Any, Position]] = collections.deque()
        self._place(data.start())

    def _place(self, position: Position) -> None:
        """Goes on from a position."""
        while self._ahead:
            self._ahead.pop()[0].cancel()
        self._next = self._planned = position
        self._ended = False

    def __next__(self) -> Batch:
        self._assert_not_closed()
        workers = self._data.settings.workers
        if not workers:
            plan, after = self._data.plan(self._next)
            if not plan.rows:
                raise StopIteration
            batch, self._next = self._data.read(plan), after
            return batch
        self._read_ahead(2 * workers)
        if not self._ahead:
            raise StopIteration
        waiting, self._next = self._ahead.popleft()
        return waiting.result()

    def _read_ahead(self, count: int) -> None:
        """Has `count` batches under way, if there are so many."""
        if self._pool is None:
            workers = self._data.settings.workers
            self._pool = concurrent.futures.ThreadPoolExecutor(workers, "l4jax-data")
        while len(self._ahead) < count and not self._ended:
            plan, after = self._data.plan(self._planned)
            self._ended = not plan.rows
            if plan.rows:
                self._ahead.append((self._pool.submit(self._data.read, plan), after))
                self._planned = after

    def get_state(self) -> dict[str, Any]:
        """Where the next batch begins, for JSON."""
        return {
            "cursor": list(self._next.cursor),
            "batch": self._next.batch,
            "data": self._data.fingerprint,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where an iterator of the same data stood.

        Raises:
            ValueError: the state is of other data or other settings.
        """
        if state["data"] != self._data.fingerprint:
            raise ValueError(
                f"the state is of other data ({state['data']}, not {self._data.fingerprint}): "
                "the examples, weights, epochs, packing, length, segments or seed changed"
            )
        first, second = state["cursor"]
        self._place(Position((first, second), state["batch"]))

    def close(self) -> None:
        """Has the workers end with what they are reading."""
        super().close()
        self._place(self._next)
        self._pool = None


def packed(
    documents: Sequence[Sequence[int]],
    *,
    length: int,
    batch_size: int,
    seed: int | None,
    repeat: bool = True,
    skip: int = 0,
    rows: Sequence[int] | None = None,
) -> Batches:
    """Batches of documents in memory, back to back: `batches` with "split", of one store.

    Args:
        documents: token ids of each.
        length: tokens per row.
        batch_size: rows per batch; a last incomplete batch is dropped.
        seed: order of the shuffle, another one in each epoch; None keeps the documents' order.
        repeat: go on for ever instead of stopping after one epoch.
        skip: batches to leave out at the beginning, without reading them: those that a run has
            seen.
        rows: those of each batch to make; all by default.

    Raises:
        ValueError: a size is not positive, the documents do not fill one batch, or a row is not in
            the batch.
    """
    settings = _Settings(length, batch_size, seed, "split", rows, skip=skip, whole=True)
    tokens = sum(map(len, documents))
    if tokens < length * batch_size:
        raise ValueError(
            f"the documents hold {tokens} tokens, fewer than one batch of {batch_size} × {length}"
        )
    return Batches(Mixture([MemoryStore(documents)], epochs=None if repeat else 1), settings)
