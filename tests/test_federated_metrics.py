"""Weight divergence by hand; Proposition 3.1 holds wherever its assumptions do."""

import itertools

import numpy as np
import pytest

from l4jax.federated import metrics

CLASSES, FEATURES, EACH = 10, 23, 41


def test_divergence_by_hand():
    ours = {
        "conv1": {"k": np.array([3.0, 0.0])},
        "output": {"k": np.ones((2, 2)), "b": np.zeros(1)},
    }
    other = {
        "conv1": {"k": np.array([0.0, 4.0])},
        "output": {"k": np.ones((2, 2)), "b": np.ones(1)},
    }
    found = metrics.weight_divergence(ours, other)
    assert found.groups == pytest.approx({"conv1": 5 / 4, "output": 1 / 5**0.5})
    assert found.total == pytest.approx((26 / 21) ** 0.5)
    kinds = metrics.weight_divergence(ours, other, group=lambda name: name[-1])
    assert kinds.groups == pytest.approx({"k": (25 / 20) ** 0.5, "b": 1.0})
    assert metrics.weight_divergence({"a": np.zeros(2)}, {"a": np.zeros(2)}).groups == {"a": 0.0}
    # What is not a number shows, in its group and in all.
    found = metrics.weight_divergence(
        {"a": np.ones(2), "b": np.ones(1)}, {"a": np.ones(2) * np.nan, "b": np.ones(1)}
    )
    assert np.isnan([found.total, found.groups["a"]]).all()
    assert found.groups["b"] == 0


# --- Proposition 3.1 -----------------------------------------------------------------------------
def by_class():
    """Inputs of each class: sparse, in [0, 1], with a constant last feature."""
    rng = np.random.default_rng(0)
    centers = rng.random((CLASSES, FEATURES)) * (rng.random((CLASSES, FEATURES)) < 0.4)
    x = np.clip(centers[:, None] + 0.15 * rng.standard_normal((CLASSES, EACH, FEATURES)), 0, 1)
    x[..., -1] = 1
    return x


X = by_class()
LIPSCHITZ = np.array([0.5 * np.linalg.eigvalsh(x.T @ x / EACH)[-1] for x in X])
"""Of each class's gradient: the Hessian is E[(diag p − p pᵀ) ⊗ x xᵀ], and diag p − p pᵀ ≤ 1/2."""


def gradients(w):
    """Of softmax regression's loss on each class [classes features classes]."""
    z = X @ w
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    p[np.arange(CLASSES), :, np.arange(CLASSES)] -= 1
    return np.einsum("cnf,cnk->cfk", X, p) / EACH


def shares_of(kind):
    own, uniform = np.eye(CLASSES), np.full((CLASSES, CLASSES), 1 / CLASSES)
    if kind == "2 classes":
        return (own + np.roll(own, 1, 1)) / 2
    return kind * own + (1 - kind) * uniform


@pytest.mark.parametrize(("rate", "steps"), [(0.01, 1), (0.01, 5), (0.01, 20), (0.1, 5)])
@pytest.mark.parametrize("kind", [0.0, 0.25, 0.5, "2 classes", 0.9, 1.0])
def test_the_bound_holds_after_each_of_three_averagings(kind, rate, steps):
    shares, weights = shares_of(kind), np.full(CLASSES, 0.1)
    central = federated = np.zeros((FEATURES, CLASSES))
    before = 0.0
    for _ in range(3):
        norms, clients = [], [federated] * CLASSES
        for _ in range(steps):
            g = gradients(central)
            norms.append(np.sqrt((g**2).sum((1, 2))).max())
            central = central - rate * g.mean(0)
            clients = [
                w - rate * np.tensordot(s, gradients(w), 1)
                for w, s in zip(clients, shares, strict=True)
            ]
        federated = np.mean(clients, 0)
        found = np.linalg.norm(federated - central)
        bound = metrics.divergence_bound(
            before,
            rate=rate,
            shares=shares,
            weights=weights,
            lipschitz=LIPSCHITZ,
            gradients=norms,
        )
        assert found <= bound + 1e-12
        if steps == 1 or kind == 0:
            assert found < 1e-14
        elif kind == 1.0:
            assert found > 1e-4
        before = found


def test_the_bound_is_the_formula():
    """Two clients, three steps, everything by hand."""
    shares, lipschitz = np.array([[1, 0], [0.25, 0.75]]), np.array([2.0, 4.0])
    weights, rate, g = np.array([1, 3]), 0.1, [5.0, 6.0, 7.0]
    a = [1.2, 1 + 0.1 * 3.5]
    p = np.array([0.25 + 0.75 * 0.25, 0.75 * 0.75])
    emd = [abs(1 - p[0]) + p[1], abs(0.25 - p[0]) + abs(0.75 - p[1])]
    expected = sum(
        w * (x**3 * 0.7 + 0.1 * d * (x * g[1] + x**2 * g[0]))
        for w, x, d in zip((0.25, 0.75), a, emd, strict=True)
    )
    found = metrics.divergence_bound(
        0.7, rate=rate, shares=shares, weights=weights, lipschitz=lipschitz, gradients=g
    )
    assert found == pytest.approx(expected, rel=1e-12)


def test_more_skew_means_more_divergence_at_equal_steps():
    def divergence(kind):
        shares, central = shares_of(kind), np.zeros((FEATURES, CLASSES))
        clients = [central] * CLASSES
        for _ in range(8):
            central = central - 0.05 * gradients(central).mean(0)
            clients = [
                w - 0.05 * np.tensordot(s, gradients(w), 1)
                for w, s in zip(clients, shares, strict=True)
            ]
        return metrics.weight_divergence({"w": np.mean(clients, 0)}, {"w": central}).total

    found = [divergence(kind) for kind in (0.25, 0.5, 0.75, 1.0)]
    assert all(a < b for a, b in itertools.pairwise(found))
