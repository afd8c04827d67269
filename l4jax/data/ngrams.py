"""Unigram and bigram language models: what a trained model must beat to have learned anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np


class Ngrams:
    """Counts of tokens and of pairs of neighbours in documents.

    Args:
        documents: token ids of each; no pair crosses a document's end.
        vocab_size: number of possible ids.
    """

    def __init__(self, documents: Iterable[list[int]], vocab_size: int) -> None:
        self._unigrams = np.zeros(vocab_size, np.int64)
        self._pairs = np.zeros((vocab_size, vocab_size), np.int32)
        for document in documents:
            ids = np.asarray(document, np.int64)
            self._unigrams += np.bincount(ids, minlength=vocab_size)
            np.add.at(self._pairs, (ids[:-1], ids[1:]), 1)
        self._followers = (self._pairs > 0).sum(1)

    def losses(self, batches: Iterable[Mapping[str, np.ndarray]]) -> tuple[float, float]:
        """Mean cross-entropy in nats of the unigram and of the bigram model.

        Counted over the same targets as `training.objectives.next_token`. Unigrams have one added
        to each count; bigrams are mixed with them by Witten & Bell (1991): a context seen n times
        with k different followers gives them the weight n / (n + k).

        Raises:
            ValueError: no batch has a target.
        """
        total, unigram, bigram = 0, 0.0, 0.0
        smooth = (self._unigrams + 1) / (self._unigrams + 1).sum()
        for batch in batches:
            ids, segments = batch["tokens"], batch["segment_ids"]
            counted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
            before, after = ids[:, :-1][counted], ids[:, 1:][counted]
            seen, kinds = self._pairs[before].sum(1), self._followers[before]
            mixed = self._pairs[before, after] + kinds * smooth[after]
            known = np.where(seen > 0, mixed / np.maximum(seen + kinds, 1), smooth[after])
            unigram -= np.log(smooth[after]).sum()
            bigram -= np.log(known).sum()
            total += len(after)
        if not total:
            raise ValueError("nothing to count: no batch has two neighbours in one segment")
        return float(unigram / total), float(bigram / total)
