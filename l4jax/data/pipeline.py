"""Tokenized documents to shuffled, packed batches, by Grain.

A row of a batch holds pieces of documents back to back. Keys of a batch, each Int32[b t]:
tokens; segment_ids, which number a row's pieces from 1; positions, which restart with each piece.
Without `repeat` the last row of the epoch may end in padding, whose segment id is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import grain
import numpy as np
from grain import experimental

Batch = dict[str, np.ndarray]


def packed(
    documents: Sequence[Sequence[int]],
    *,
    length: int,
    batch_size: int,
    seed: int | None,
    repeat: bool = True,
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

    Raises:
        ValueError: a size is not positive, or the documents do not fill one batch.
    """
    if length < 1 or batch_size < 1:
        raise ValueError(f"length {length} and batch_size {batch_size} must be at least 1")
    tokens = sum(len(document) for document in documents)
    if tokens < length * batch_size:
        raise ValueError(
            f"the documents hold {tokens} tokens, fewer than one batch of {batch_size} × {length}"
        )
    pieces = [
        np.asarray(document[start : start + length], np.int32)
        for document in documents
        for start in range(0, len(document), length)
    ]
    dataset = grain.MapDataset.source(pieces)
    if seed is not None:
        dataset = dataset.seed(seed).shuffle()
    if repeat:
        dataset = dataset.repeat()
    rows = experimental.ConcatThenSplitIterDataset(
        dataset.map(lambda piece: {"tokens": piece}).to_iter_dataset(),
        length_struct={"tokens": length},
    )
    return rows.map(_rename).batch(batch_size, drop_remainder=True)


def _rename(row: dict[str, np.ndarray]) -> Batch:
    return {
        "tokens": row["tokens"].astype(np.int32),
        "segment_ids": row["tokens_segment_ids"].astype(np.int32),
        "positions": row["tokens_positions"].astype(np.int32),
    }
