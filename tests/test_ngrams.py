"""The baselines equal a count done slowly, by hand, over the same targets."""

import collections
import math

import numpy as np
import pytest

from l4jax.data.ngrams import Ngrams

VOCABULARY = 11


@pytest.fixture
def documents(rng):
    """Ids 9 and 10 never occur; 8 only ends documents, so that nothing was seen to follow it."""
    bodies = [rng.integers(0, 8, rng.integers(0, 40)).tolist() for _ in range(20)]
    return [*(body + [8] for body in bodies), [], [3]]


@pytest.fixture
def batches(rng):
    """Rows with several segments and padding at their ends; every id occurs."""
    tokens = rng.integers(0, VOCABULARY, (3, 2, 30))
    segments = np.sort(rng.integers(1, 5, (3, 2, 30)), axis=-1)
    segments[:, 1, 25:] = 0
    return [
        {"tokens": t.astype(np.int32), "segment_ids": s.astype(np.int32)}
        for t, s in zip(tokens, segments, strict=True)
    ]


class Slow:
    """Witten & Bell's estimate from dictionaries."""

    def __init__(self, documents):
        self.counts = collections.Counter(token for doc in documents for token in doc)
        self.followers = collections.defaultdict(collections.Counter)
        for doc in documents:
            for first, second in zip(doc[:-1], doc[1:], strict=True):
                self.followers[first][second] += 1

    def unigram(self, token):
        return (self.counts[token] + 1) / (sum(self.counts.values()) + VOCABULARY)

    def bigram(self, before, token):
        seen = self.followers[before]
        n, k = sum(seen.values()), len(seen)
        if n == 0:
            return self.unigram(token)
        trust = n / (n + k)
        return trust * seen[token] / n + (1 - trust) * self.unigram(token)

    def losses(self, batches):
        unigram, bigram = [], []
        for batch in batches:
            for ids, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
                for i in range(1, len(ids)):
                    if segments[i] == segments[i - 1] != 0:
                        unigram.append(-math.log(self.unigram(int(ids[i]))))
                        bigram.append(-math.log(self.bigram(int(ids[i - 1]), int(ids[i]))))
        return sum(unigram) / len(unigram), sum(bigram) / len(bigram)


def one_pair(before, after):
    """A batch with a single target."""
    return [{"tokens": np.array([[before, after]]), "segment_ids": np.array([[1, 1]])}]


def test_losses_equal_a_slow_count(documents, batches):
    found = Ngrams(documents, VOCABULARY).losses(batches)
    assert found == pytest.approx(Slow(documents).losses(batches), rel=1e-12)


@pytest.mark.parametrize("before", [0, 3, 8, 10])
def test_probabilities_sum_to_one(documents, before):
    """In a common context, in one that only ended documents, and in one never seen."""
    model = Ngrams(documents, VOCABULARY)
    losses = [model.losses(one_pair(before, after)) for after in range(VOCABULARY)]
    assert np.exp(-np.array(losses)).sum(0) == pytest.approx([1, 1], rel=1e-12)


def test_a_context_without_followers_falls_back_to_unigrams(documents):
    unigram, bigram = Ngrams(documents, VOCABULARY).losses(one_pair(8, 2))
    assert unigram == bigram


def test_no_pair_crosses_documents():
    together = Ngrams([[1, 2]], VOCABULARY).losses(one_pair(1, 2))
    apart = Ngrams([[1], [2]], VOCABULARY).losses(one_pair(1, 2))
    assert together[0] == apart[0]
    assert together[1] < apart[1] == apart[0]


def test_targets_behind_a_border_or_in_padding_do_not_count(documents):
    model = Ngrams(documents, VOCABULARY)
    plain = one_pair(1, 2)
    longer = [{"tokens": np.array([[1, 2, 9, 9, 9]]), "segment_ids": np.array([[1, 1, 2, 0, 0]])}]
    assert model.losses(longer) == model.losses(plain)


def test_batches_weigh_by_their_targets(documents):
    """Not by their number: three targets in one batch, one in the other."""
    model = Ngrams(documents, VOCABULARY)
    long = [{"tokens": np.array([[1, 2, 3, 4]]), "segment_ids": np.ones((1, 4), int)}]
    parts = np.array([model.losses(long), model.losses(one_pair(5, 6))])
    found = model.losses(long + one_pair(5, 6))
    assert found == pytest.approx((parts * [[3], [1]]).sum(0) / 4)


@pytest.mark.parametrize(
    "batches", [[], [{"tokens": np.array([[1, 2]]), "segment_ids": np.array([[1, 2]])}]]
)
def test_nothing_to_predict_is_an_error(batches):
    with pytest.raises(ValueError, match="no batch has two neighbours"):
        Ngrams([[1, 2]], VOCABULARY).losses(batches)
