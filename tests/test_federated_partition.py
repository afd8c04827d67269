"""Partitions are whole, repeatable and as skewed as they say; the EMD and sharing's arithmetic."""

import numpy as np
import pytest

from l4jax.federated import clients, metrics, partition, sharing

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 140))
ODD = np.random.default_rng(0).choice(
    ["a", "b", "c", "d", "e", "f", "g"], 411, p=np.r_[7:0:-1] / 28
)
MAKERS = {
    "uniform": lambda y, seed: partition.uniform(len(y), 10, seed=seed),
    "1 class": lambda y, seed: partition.classes(y, 10, each=1, seed=seed),
    "3 classes": lambda y, seed: partition.classes(y, 13, each=3, seed=seed),
    "mixture": lambda y, seed: partition.mixture(y, 10, iid=0.3, seed=seed),
    "few in a mixture": lambda y, seed: partition.mixture(y, 4, iid=0.5, seed=seed),
    "dirichlet": lambda y, seed: partition.dirichlet(y, 9, concentration=0.5, seed=seed, least=3),
    "skewed": lambda y, seed: partition.skewed(len(y), 11, sigma=1.5, seed=seed),
}


@pytest.mark.parametrize("labels", [LABELS, ODD], ids=["equal classes", "odd classes"])
@pytest.mark.parametrize("name", MAKERS)
def test_every_row_is_with_one_client_and_the_seed_decides(name, labels):
    parts = MAKERS[name](labels, 5)
    partition.check(parts, len(labels))
    again, other = MAKERS[name](labels, 5), MAKERS[name](labels, 6)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


@pytest.mark.parametrize(("count", "each"), [(10, 1), (10, 2), (13, 3), (7, 6), (3, 10), (100, 4)])
@pytest.mark.parametrize("labels", [LABELS, ODD], ids=["equal classes", "odd classes"])
def test_a_client_has_exactly_so_many_classes(labels, count, each):
    each = min(each, len(np.unique(labels)))
    for seed in range(5):
        parts = partition.classes(labels, count, each=each, seed=seed)
        partition.check(parts, len(labels))
        assert {len(np.unique(labels[part])) for part in parts} == {each}


def test_the_emd_is_the_papers():
    """2 (1 − k/C) for k of C equal classes, 0 for equal shares, and 1.8 (1 − share IID)."""
    for each in (1, 2, 5, 10):
        parts = partition.classes(LABELS, 10, each=each, seed=1)
        found = metrics.emd(metrics.histograms(parts, LABELS))
        np.testing.assert_allclose(found, 2 * (1 - each / 10), atol=1e-12)
    for iid in (0.0, 0.1, 0.5, 1.0):
        parts = partition.mixture(LABELS, 10, iid=iid, seed=1)
        assert {len(part) for part in parts} == {140}
        found = metrics.mean_emd(metrics.histograms(parts, LABELS))
        assert found == pytest.approx(1.8 * (1 - iid), abs=1e-12)
    # By hand: clients (3, 1) and (1, 1) of a population (4, 2) / 6, weighted 4 and 2.
    counts = [[3, 1], [1, 1]]
    np.testing.assert_allclose(metrics.emd(counts), [1 / 6, 1 / 3], atol=1e-15)
    assert metrics.mean_emd(counts) == pytest.approx((4 / 6 + 2 / 3) / 6)
    np.testing.assert_allclose(metrics.emd(counts, [1, 1]), [0.5, 0])


def test_dirichlet_goes_from_one_class_to_iid():
    def emd(concentration):
        parts = partition.dirichlet(LABELS, 10, concentration=concentration, seed=2)
        return metrics.mean_emd(metrics.histograms(parts, LABELS))

    found = [emd(c) for c in (0.05, 0.5, 5.0, 1e7)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 1.3
    assert found[-1] < 0.03


def test_sizes_and_keys():
    assert {len(x) for x in partition.skewed(110, 11, sigma=0.0, seed=0)} == {10}
    sizes = [len(x) for x in partition.skewed(411, 11, sigma=2.0, seed=0)]
    assert max(sizes) > 5 * np.median(sizes)
    partition.check(partition.skewed(100, 10, sigma=1000.0, seed=0), 100)
    parts = partition.by_key(ODD)
    partition.check(parts, len(ODD))
    assert [set(ODD[part]) for part in parts] == [{x} for x in "abcdefg"]


def arrays(rows):
    return [np.array(x, int) for x in rows]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: partition.uniform(3, 4, seed=0), "clients 4 must be from 1 to the 3"),
        (lambda: partition.classes(LABELS, 7, each=1, seed=0), "at least 10 clients or 2 classes"),
        (lambda: partition.classes(LABELS, 7, each=11, seed=0), "each 11"),
        (lambda: partition.classes([0, 0, 0, 1], 3, each=1, seed=0), None),
        (
            lambda: partition.classes([0] * 50 + [1], 6, each=2, seed=0),
            "6 shards of a class with 1",
        ),
        (lambda: partition.mixture(LABELS, 10, iid=1.1, seed=0), "iid 1.1 must be from 0"),
        (lambda: partition.mixture([0, 0, 1], 3, iid=0.0, seed=0), None),
        (lambda: partition.mixture([0, 1, 1, 1], 4, iid=0.0, seed=0), "client 2 has no data"),
        (lambda: partition.dirichlet(LABELS, 10, concentration=0.0, seed=0), "concentration 0"),
        (
            lambda: partition.dirichlet(LABELS, 10, concentration=0.1, seed=0, least=140),
            "none of 1000 draws",
        ),
        (lambda: partition.skewed(30, 3, sigma=-1.0, seed=0), "sigma -1.0"),
        (lambda: partition.by_key([]), "one for each example"),
        (lambda: partition.check(arrays([[0, 1], [1]]), 2), "row 1 is with 2 clients"),
        (lambda: partition.check(arrays([[0], [2]]), 3), "row 1 is with 0 clients"),
        (lambda: partition.check(arrays([[0], [3]]), 2), "row 3 is not one of 2"),
        (lambda: partition.check(arrays([[0], []]), 1), "client 1 has no data"),
        (lambda: clients.gather({"x": np.zeros(3)}, [[0], [3]]), "client 1 has rows beyond"),
        (lambda: clients.gather({"x": np.zeros(3)}, [[0], []]), "client 1 has no data"),
        (lambda: clients.gather({"x": np.zeros(3), "y": np.zeros(2)}, [[0]]), "lengths"),
        (lambda: clients.gather({"mask": np.zeros(3)}, [[0]]), "called mask"),
    ],
)
def test_what_does_not_go_is_refused_by_name(make, message):
    if message is None:
        make()
        return
    with pytest.raises(ValueError, match=message):
        make()


# --- Sharing -------------------------------------------------------------------------------------
def setting(each=1):
    """100 of each class with ten clients, 40 spare."""
    by_class = [np.flatnonzero(c == LABELS) for c in range(10)]
    own = np.concatenate([rows[:100] for rows in by_class])
    spare = np.concatenate([rows[100:] for rows in by_class])
    return [own[part] for part in partition.classes(LABELS[own], 10, each=each, seed=0)], spare


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("each", [1, 2])
def test_sharing_lowers_the_emd_as_the_formula_says(each, alpha, beta):
    parts, spare = setting(each)
    shared = sharing.draw(LABELS, spare, size=sharing.size_of(beta, parts), seed=3)
    after, report = sharing.share(parts, shared, labels=LABELS, alpha=alpha, seed=3)
    rho = 10 * alpha * beta / (1 + 10 * alpha * beta)
    np.testing.assert_allclose(report.rho, rho, atol=1e-12)
    assert report.beta == pytest.approx(beta, abs=1e-12)
    assert report.emd_before == pytest.approx(2 * (1 - each / 10), abs=1e-12)
    assert report.emd_after == pytest.approx(report.emd_before / (1 + 10 * alpha * beta), abs=1e-12)
    for part, before in zip(after, parts, strict=True):
        assert np.array_equal(part[:100], before)
        assert set(part[100:]) <= set(shared)
        assert len(set(part)) == len(part)


def test_shares_differ_between_clients_and_are_refused_where_they_cannot_be():
    parts, spare = setting()
    shared = sharing.draw(LABELS, spare, size=104, seed=3)
    assert np.array_equal(np.bincount(LABELS[shared]), np.full(10, 10))
    after, _ = sharing.share(parts, shared, labels=LABELS, alpha=0.3, seed=3)
    assert {len(part) for part in after} == {130}
    assert len({tuple(np.sort(part[100:])) for part in after}) == 10
    for call, message in (
        (lambda: sharing.share(parts, shared, labels=LABELS, alpha=1.2, seed=0), "alpha 1.2"),
        (lambda: sharing.share(parts, parts[3], labels=LABELS, alpha=1.0, seed=0), "client 3 has"),
        (lambda: sharing.draw(LABELS, spare, size=4, seed=0), "size 4 is less than one"),
        (lambda: sharing.draw(LABELS, spare, size=410, seed=0), "41 examples of class 0"),
        (lambda: sharing.size_of(0.0, parts), "beta 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
