"""Tokenized documents to shuffled, packed batches, by Grain.

A row of a batch holds pieces of documents back to back. Keys of a batch, each Int32[b t]:
tokens; segment_ids, which number a row's pieces from 1; positions, which restart with each piece.
Without `repeat` the last row of the epoch may end in padding, whose segment id is 0.

Any row can be made by itself: of several processes each reads no more than its own rows, and an
iterator goes on after a restart without going through what was before.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

Batch = dict[str, np.ndarray]
KEYS = ("tokens", "segment_ids", "positions")


def packed(
    documents: Sequence[Sequence[int]],
    *,
    length: int,
    batch_size: int,
    seed: int | None,
    repeat: bool = True,
    skip: int = 0,
    rows: Sequence[int] | None = None,
) -> grain.IterDataset:
    """Batches of rows of `length` tokens, every token of the documents used.

    Documents are cut into pieces of at most `length` first, so that the shuffle mixes long ones
    too. A piece that does not fit a row's end goes on in the next row as a segment of its own.

    Args:
        documents: token ids of each.
        length: tokens per row.
        batch_size: rows per batch; a last incomplete batch is dropped.
        seed: order of the shuffle, another one in each epoch; None keeps the documents' order.
        repeat: go on for ever instead of stopping after one epoch.
        skip: batches to leave out at the beginning, at no cost: those that a run has seen.
        rows: those of each batch to yield; all by default. Processes that take different ones see
            together what one process sees alone.

    Raises:
        ValueError: a size is not positive, the documents do not fill one batch, or a row is not in
            the batch.
    """
    if length < 1 or batch_size < 1:
        raise ValueError(f"length {length} and batch_size {batch_size} must be at least 1")
    if skip < 0:
        raise ValueError(f"skip {skip} must not be negative")
    rows = range(batch_size) if rows is None else rows
    if not rows or not all(0 <= row < batch_size for row in rows):
        raise ValueError(f"rows {list(rows)} must be some of the {batch_size} of a batch")
    lengths = [len(document) for document in documents]
    if sum(lengths) < length * batch_size:
        raise ValueError(
            f"the documents hold {sum(lengths)} tokens, fewer than one batch of "
            f"{batch_size} × {length}"
        )
    stream = _Stream(documents, _cut(lengths, length), length, seed, repeat)
    source = _Rows(stream, batch_size, skip, rows)
    return grain.MapDataset.source(source).to_iter_dataset().batch(len(rows))


class _Pieces(NamedTuple):
    """Where every piece lies."""

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


def _cut(lengths: Sequence[int], length: int) -> _Pieces:
    """Documents of these lengths in pieces of at most `length`."""
    sizes = np.asarray(lengths, np.int64)
    counts = -(-sizes // length)
    documents = np.repeat(np.arange(len(sizes)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    starts = (np.arange(len(documents)) - first) * length
    return _Pieces(documents, starts, np.minimum(sizes[documents] - starts, length))


class _Stream:
    """The rows that the shuffled pieces make, epoch after epoch without a gap."""

    def __init__(
        self,
        documents: Sequence[Sequence[int]],
        pieces: _Pieces,
        length: int,
        seed: int | None,
        repeat: bool,
    ) -> None:
        self._documents, self._pieces, self._length = documents, pieces, length
        self._seed, self._repeat = seed, repeat
        self._tokens = int(pieces.lengths.sum())
        # A row lies in two epochs at most unless an epoch is shorter; neighbours share them.
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return sys.maxsize if self._repeat else -(-self._tokens // self._length)

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The pieces of an epoch in their order, and where each one ends."""
        count = len(self._pieces.lengths)
        if self._seed is None:
            order = np.arange(count)
        else:
            order = np.random.default_rng((self._seed, epoch)).permutation(count)
        return order, np.cumsum(self._pieces.lengths[order])

    def row(self, number: int) -> Batch:
        """One row."""
        made = {name: np.zeros(self._length, np.int32) for name in KEYS}
        filled = segment = 0
        while filled < self._length:
            epoch, offset = divmod(number * self._length + filled, self._tokens)
            if epoch > 0 and not self._repeat:
                break
            order, ends = self._epoch(epoch)
            place = int(np.searchsorted(ends, offset, side="right"))
            size = min(int(ends[place]) - offset, self._length - filled)
            piece = order[place]
            start = int(
                self._pieces.starts[piece] + self._pieces.lengths[piece] - ends[place] + offset
            )
            where, segment = slice(filled, filled + size), segment + 1
            document = self._documents[int(self._pieces.documents[piece])]
            made["tokens"][where] = document[start : start + size]
            made["segment_ids"][where] = segment
            made["positions"][where] = np.arange(size)
            filled += size
        return made


class _Rows:
    """Some rows of every batch, one after another."""

    def __init__(self, stream: _Stream, batch_size: int, skip: int, rows: Sequence[int]) -> None:
        self._stream, self._batch_size, self._skip, self._rows = stream, batch_size, skip, rows

    def __len__(self) -> int:
        batches = len(self._stream) // self._batch_size - self._skip
        return max(batches, 0) * len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        batch, place = divmod(index, len(self._rows))
        return self._stream.row((self._skip + batch) * self._batch_size + self._rows[place])
