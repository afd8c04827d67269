"""Rows hold every example once, uncut where they must be, and waste next to nothing."""

import numpy as np
import pytest

from l4jax.data import packing
from l4jax.data.mixture import Mixture
from l4jax.data.packing import START, Split, Whole, best_fit, rows_of
from l4jax.data.store import MemoryStore

RNG = np.random.default_rng(0)
SIZES = RNG.integers(1, 30, 333)
STORE = MemoryStore([np.full(n, i) for i, n in enumerate(SIZES)])
PAIRS = MemoryStore([[[1] * a, [2] * b] for a, b in RNG.integers(1, 12, (101, 2))])


def packers(store=STORE, epochs=None, length=37, seed=3):
    mixture = Mixture([store], epochs=epochs)
    return {
        "split": Split(mixture, length=length, seed=seed),
        "best_fit": Whole(mixture, length=length, seed=seed),
        "none": Whole(mixture, length=length, seed=seed, fit=False),
    }


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 50)


KINDS = pytest.mark.parametrize("kind", ["split", "best_fit", "none"])


@KINDS
def test_an_epoch_has_every_token_once(kind):
    plan, _ = packers(epochs=1)[kind].take(START, 10_000)
    rows, stores, examples, starts, sizes = plan.pieces
    tokens = sorted(
        (e, t)
        for e, s, n in zip(examples.tolist(), starts.tolist(), sizes.tolist(), strict=True)
        for t in range(s, s + n)
    )
    assert tokens == [(e, t) for e, n in enumerate(SIZES) for t in range(n)]
    assert not stores.any()
    assert sorted(set(rows.tolist())) == list(range(plan.rows))
    assert (np.diff(rows) >= 0).all()
    assert np.bincount(rows, sizes).max() <= 37


@KINDS
@pytest.mark.parametrize("epochs", [None, 1])
def test_rows_are_the_same_in_whatever_portions_they_are_taken(kind, epochs):
    """And a cursor is all there is to it: each portion is made by a packer of its own."""
    whole, _ = packers(epochs=epochs)[kind].take(START, 400)
    for portions in ([1] * 40, [7, 64, 3, 100], [331, 5], [330, 1, 1]):
        cursor, row = START, 0
        for count in portions:
            plan, cursor = packers(epochs=epochs)[kind].take(cursor, count)
            assert all(isinstance(number, int) for number in cursor)
            assert plan.rows == max(0, min(count, whole.rows - row))
            plan.pieces[0] += row
            within = (whole.pieces[0] >= row) & (whole.pieces[0] < row + count)
            np.testing.assert_array_equal(plan.pieces, whole.pieces[:, within])
            row += count


@KINDS
def test_nothing_comes_after_the_end(kind):
    packer = packers(epochs=1)[kind]
    plan, cursor = packer.take(START, 10_000)
    assert 0 < plan.rows < 10_000
    for _ in range(2):
        plan, cursor = packer.take(cursor, 5)
        assert (plan.rows, plan.pieces.shape) == (0, (5, 0))


def test_split_rows_are_full():
    plan, _ = packers()["split"].take(START, 500)
    assert (np.bincount(plan.pieces[0], plan.pieces[4]) == 37).all()


def test_whole_examples_stay_whole():
    for kind in ("best_fit", "none"):
        plan, _ = packers()[kind].take(START, 500)
        np.testing.assert_array_equal(plan.pieces[4], SIZES[plan.pieces[2]])
        assert not plan.pieces[3].any()


def test_none_has_one_example_in_a_row():
    plan, _ = packers()["none"].take(START, 500)
    np.testing.assert_array_equal(plan.pieces[0], np.arange(500))


def test_rows_of_a_window_are_shuffled():
    """Or each window would begin with the longest examples."""
    plan, _ = packers()["best_fit"].take(START, 12)
    largest = [plan.pieces[4, plan.pieces[0] == row].max() for row in range(12)]
    assert largest != sorted(largest, reverse=True)
    plain = Whole(Mixture([STORE]), length=37, seed=None)
    plan, _ = plain.take(START, 12)
    largest = [plan.pieces[4, plan.pieces[0] == row].max() for row in range(12)]
    assert largest == sorted(largest, reverse=True)


@pytest.mark.parametrize("segments", [2, 4, 6])
def test_no_row_has_more_segments_than_allowed(segments):
    packer = Whole(Mixture([PAIRS]), length=200, seed=1, segments=segments)
    plan, _ = packer.take(START, 60)
    counts = np.bincount(plan.pieces[0]) * 2
    assert counts.max() == segments


# --- Best fit ------------------------------------------------------------------------------------
def reference(sizes, room):
    """Best-fit decreasing, written naively."""
    rooms, chosen = [], [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = [b for b, left in enumerate(rooms) if left >= sizes[item]]
        if not fits:
            rooms.append(room)
            fits = [len(rooms) - 1]
        best = min(fits, key=lambda b: (rooms[b], b))
        rooms[best] -= sizes[item]
        chosen[item] = best
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_is_the_textbooks(seed):
    sizes = np.random.default_rng(seed).integers(1, 98, 500)
    np.testing.assert_array_equal(best_fit(sizes, 97), reference(sizes.tolist(), 97))


def test_best_fit_fills_bins_that_first_fit_leaves():
    assert best_fit(np.array([6, 5, 5, 4]), 10).tolist() == [0, 1, 1, 0]
    assert best_fit(np.array([10, 10, 1]), 10).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("counts", "bins"), [([2, 2, 2, 1], [0, 1, 2, 0]), ([3, 2, 2, 1], [0, 1, 2, 1])]
)
def test_a_bin_that_may_hold_no_more_is_passed_by(counts, bins):
    found = best_fit(np.array([4, 3, 2, 1]), 10, counts=np.array(counts), most=3)
    assert found.tolist() == bins


def test_padding_of_a_realistic_mix_is_far_below_grains(monkeypatch):
    """Log-normal lengths, median 300, rows of 4096."""
    grain = pytest.importorskip("grain")
    monkeypatch.undo()
    sizes = np.random.default_rng(1).lognormal(np.log(300), 1.0, 12_000).astype(int)
    sizes = np.clip(sizes, 1, 4096)
    examples = [np.ones(n, np.int32) for n in sizes]
    packer = Whole(Mixture([MemoryStore(examples)]), length=4096, seed=0)
    found = packing.efficiency(packer, 4096, rows=1300)
    data = grain.MapDataset.source(examples).map(lambda x: {"x": x}).to_iter_dataset()
    theirs = grain.experimental.BestFitPackIterDataset(
        data, length_struct={"x": 4096}, num_packing_bins=64
    )
    rows = np.array([(row["x_segment_ids"] == 0).mean() for row in theirs])
    assert found.padding < 0.002 < rows[:-64].mean()
    assert found.rows == 1300
    assert abs(found.examples_per_row - (1 - found.padding) * 4096 / sizes.mean()) < 0.2


def test_efficiency_of_preferences():
    packer = Whole(Mixture([PAIRS]), length=64, seed=0)
    assert packing.efficiency(packer, 64, rows=100).padding < 0.1


# --- Rows of a plan ------------------------------------------------------------------------------
def test_rows_of_a_plan_are_counted_anew():
    plan, _ = packers()["best_fit"].take(START, 9)
    mine = rows_of(plan, [7, 2])
    assert mine.rows == 2
    assert (np.diff(mine.pieces[0]) >= 0).all()
    for new, old in enumerate([7, 2]):
        np.testing.assert_array_equal(
            mine.pieces[1:, mine.pieces[0] == new], plan.pieces[1:, plan.pieces[0] == old]
        )


# --- Errors --------------------------------------------------------------------------------------
def test_examples_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"store 0 .* of 333 examples are longer than a row of 20"):
        Whole(Mixture([STORE]), length=20, seed=0)
    with pytest.raises(ValueError, match="example 1 has no tokens"):
        Whole(Mixture([MemoryStore([[1], []])]), length=20, seed=0)
    with pytest.raises(ValueError, match="has 2 segments, but segments=1 is the most"):
        Whole(Mixture([PAIRS]), length=64, seed=0, segments=1)


def test_pairs_cannot_be_split():
    with pytest.raises(ValueError, match="several segments, which may not be cut"):
        Split(Mixture([PAIRS]), length=20, seed=0)
