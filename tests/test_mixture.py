"""Orders are permutations, epoch after epoch, and mixtures keep to their weights all the time."""

import itertools
from collections import Counter

import numpy as np
import pytest

from l4jax.data import mixture
from l4jax.data.mixture import Mixture, shuffled
from l4jax.data.store import MemoryStore


def store(count, size=3):
    return MemoryStore([[n] * size for n in range(count)])


def order_of(sizes, weights=None, seed=0, epochs=None, **options):
    stores = [store(n) for n in sizes]
    return Mixture(stores, weights, epochs=epochs, **options).order(sizes, seed)


def take(order, count, start=0):
    """Pairs of store and item."""
    picks = order.at(np.arange(start, start + count))
    return list(zip(picks.stores.tolist(), picks.items.tolist(), strict=True))


# --- Shuffling -----------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 2, 3, 7, 63, 64, 65, 1000, 4097])
def test_a_shuffle_is_a_permutation_and_another_in_each_epoch(size):
    seen = set()
    for epoch in range(4):
        found = shuffled(np.arange(size), size, (5, 0), np.full(size, epoch))
        assert sorted(found) == list(range(size))
        seen.add(tuple(found))
    assert len(seen) == 4 or size <= 3


def test_all_orders_of_a_few_items_are_about_as_frequent():
    """24 orders, 12,000 epochs: 500 each, give or take 5 standard deviations of 22."""
    epochs = np.repeat(np.arange(12_000), 4)
    found = shuffled(np.tile(np.arange(4), 12_000), 4, (1, 2), epochs).reshape(-1, 4)
    counts = Counter(map(tuple, found.tolist()))
    assert len(counts) == 24
    assert all(abs(n - 500) < 110 for n in counts.values())


def test_neighbours_are_torn_apart():
    found = shuffled(np.arange(10_000), 10_000, (0, 0), np.zeros(10_000, np.int64))
    steps = np.abs(np.diff(found))
    # Two random places of n are n / 3 apart on average.
    assert abs(steps.mean() - 3333) < 100
    assert abs(np.corrcoef(found, np.arange(10_000))[0, 1]) < 0.04


def test_a_shuffle_of_more_than_memory_holds_costs_nothing():
    found = shuffled(np.arange(1000), 10**15, (0, 0), np.zeros(1000, np.int64))
    assert len(set(found.tolist())) == 1000
    assert 0 <= found.min() < found.max() < 10**15


# --- Orders without weights ----------------------------------------------------------------------
def test_without_weights_every_example_comes_once_in_an_epoch():
    sizes = [5, 1, 12]
    every = sorted((s, i) for s, n in enumerate(sizes) for i in range(n))
    order = order_of(sizes, epochs=3)
    assert len(order) == 54
    epochs = [take(order, 18, 18 * e) for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [every] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_without_a_seed_examples_keep_their_order():
    order = order_of([2, 3], seed=None)
    assert take(order, 7) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (0, 0), (0, 1)]


# --- Weights -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "weights",
    [[1], [0.7, 0.3], [0.5, 0.3, 0.2], [3, 1, 1, 1], [1e-3, 1], [0.123, 4.5, 0.77, 1, 1, 1, 2.5]],
)
def test_every_prefix_has_its_weights_within_less_than_one_example(weights):
    count = 20_011
    picks = order_of([7] * len(weights), weights).at(np.arange(count))
    seen = np.cumsum(picks.stores[:, None] == np.arange(len(weights)), axis=0)
    share = np.array(weights) / sum(weights)
    off = seen - np.arange(1, count + 1)[:, None] * share
    # Tijdeman's bound; the sum of floats adds a little.
    assert np.abs(off).max() <= 1 - 1 / (2 * max(len(weights) - 1, 1)) + 1e-6


def test_weights_finer_than_a_pattern_are_rounded_and_small_ones_kept():
    shares = mixture._shares(mixture._checked([1, 1e-9, 0.3333333333], 3))
    assert shares[1] == 1
    assert abs(sum(shares) - mixture.FINEST) <= 2
    assert abs(shares[0] / sum(shares) - 0.75) < 1e-4


def test_each_store_is_shuffled_anew_in_each_of_its_epochs():
    """Whatever the other stores do: the small one goes round while the large one is begun."""
    order = order_of([4, 1, 100], [2, 1, 5])
    picks = take(order, 800)
    small = [item for s, item in picks if s == 0]
    rounds = [tuple(small[i : i + 4]) for i in range(0, 200, 4)]
    assert all(sorted(r) == [0, 1, 2, 3] for r in rounds)
    assert len(set(rounds)) > 15
    assert [item for s, item in picks if s == 1] == [0] * 100
    large = [item for s, item in picks if s == 2]
    assert [sorted(large[i : i + 100]) for i in range(0, 500, 100)] == [list(range(100))] * 5


@pytest.mark.parametrize("epochs", [1, 2, 5])
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.2, 0.3, 0.5], [5, 1, 1]])
def test_epochs_end_before_a_store_would_begin_another_one(epochs, weights):
    sizes = [3, 8, 11]
    order = order_of(sizes, weights, epochs=epochs)
    endless = order_of(sizes, weights)
    assert take(order, len(order)) == take(endless, len(order))
    counts = Counter(s for s, _ in take(order, len(order)))
    assert all(counts[s] <= epochs * n for s, n in enumerate(sizes))
    last, _ = endless[len(order)]
    assert counts[last] == epochs * sizes[last]
    with pytest.raises(IndexError, match=f"place {len(order)} is not in an order of {len(order)}"):
        order[len(order)]


def test_weights_by_tokens_are_shares_of_tokens():
    stores = [store(50, size=2), store(30, size=10), store(40, size=5)]
    weights = [0.5, 0.3, 0.2]
    order = Mixture(stores, weights, unit="tokens").order([50, 30, 40], 0)
    picks = order.at(np.arange(50_000))
    tokens = np.array([2, 10, 5])[picks.stores]
    share = [tokens[picks.stores == s].sum() / tokens.sum() for s in range(3)]
    np.testing.assert_allclose(share, weights, atol=1e-4)


def test_any_stretch_is_what_it_is_as_part_of_the_whole():
    for order in (order_of([5, 1, 9], [0.2, 0.3, 0.5]), order_of([5, 1, 9])):
        whole = take(order, 300)
        for start, count in itertools.product([0, 1, 14, 15, 16, 133], [1, 2, 31]):
            assert take(order, count, start) == whole[start : start + count]
        assert [order[i] for i in range(40)] == whole[:40]


def test_places_far_away_are_as_near_as_the_first():
    order = order_of([5, 1, 9], [0.2, 0.3, 0.5])
    assert Counter(s for s, _ in take(order, 1000, 10**15)) == {0: 200, 1: 300, 2: 500}


def test_seeds_differ_and_are_reproducible():
    assert take(order_of([99], seed=3), 50) == take(order_of([99], seed=3), 50)
    assert take(order_of([99], seed=3), 50) != take(order_of([99], seed=4), 50)


# --- Errors --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([], None, "at least one store"),
        ([3, 0], None, r"store 1 of the mixture \(MemoryStore of 0\) is empty"),
        ([3, 2], [1], "1 weights for 2 stores"),
        ([3, 2], [1, 0], "weight 0 must be a positive number"),
        ([3, 2], [1, float("nan")], "weight nan must be"),
        ([3, 2], [1, -0.5], "weight -0.5 must be"),
    ],
)
def test_what_cannot_be_mixed_is_refused(sizes, weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture([store(n) for n in sizes], weights)


def test_odd_arguments_are_refused():
    with pytest.raises(ValueError, match="epochs 0 must be at least 1"):
        Mixture([store(1)], epochs=0)
    with pytest.raises(ValueError, match="store 0 .* is empty"):
        Mixture([MemoryStore([[], []])])
    with pytest.raises(ValueError, match="seed -1 must be from 0"):
        order_of([3], seed=-1)
