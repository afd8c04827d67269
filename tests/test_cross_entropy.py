"""The head's losses in pieces are those of plain logits in float64, and hold few logits at once."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from l4jax import sharding
from l4jax.kernels import cross_entropy

M, D, V = 37, 16, 64
MESHES = [({}, False), ({"tensor": 4}, False), ({"fsdp": 2, "tensor": 4}, True)]
"""With tied heads, and without; one device, and the vocabulary in four parts of 16."""


@pytest.fixture(params=[8, 64], ids=["pieces", "whole"])
def pieces(request, monkeypatch):
    """37 tokens in five pieces, the last one short, or in one."""
    monkeypatch.setattr(cross_entropy, "PIECE_BYTES", 4 * V * request.param)


def inputs(seed=0):
    """Hidden states, the head, labels of which some are no ids, and their weights."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((M, D)).astype(np.float32)
    head = rng.standard_normal((D, V)).astype(np.float32)
    weights = np.where(rng.random(M) < 0.3, 0, rng.random(M)).astype(np.float32)
    labels = np.where(weights == 0, -1, rng.integers(0, V, M)).astype(np.int32)
    assert 5 < (weights == 0).sum() < 20
    return x, head, labels, weights


def softmax(x, head):
    """log-sum-exp [m 1] and probabilities [m v], float64."""
    logits = x.astype(np.float64) @ head.astype(np.float64)
    lse = np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits, lse, np.exp(logits - lse)


def on(axes):
    return sharding.use(sharding.make_mesh(**axes)) if axes else contextlib.nullcontext()


def by_parts(axes, tied, f):
    """`f(x, head, *arrays)` on the current mesh, each shard with its part of the vocabulary."""

    def part(x, table, *arrays):
        table = sharding.gather(table, 1 if tied else 0, "fsdp")
        return f(x, table.T if tied else table, *arrays)

    def run(x, head, *arrays):
        arrays = jax.tree.map(jnp.asarray, arrays)
        whole, cut = PartitionSpec(), PartitionSpec("fsdp", "tensor")
        if tied:
            head, cut = head.T, PartitionSpec("tensor", "fsdp")
        specs = (whole, cut if axes else whole, *(whole for _ in arrays))
        return sharding.per_shard(part, specs, whole)(x, head, *arrays)

    return run


def assert_near(found, expected):
    """Within 64 roundings of float32, of the largest entry."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6 * np.abs(expected).max())


@pytest.mark.parametrize("z", [0.0, 0.02])
@pytest.mark.parametrize(("axes", "tied"), MESHES, ids=str)
def test_the_loss_and_its_gradients_are_those_of_plain_logits(axes, tied, z, pieces):
    x, head, labels, weights = inputs()
    logits, lse, p = softmax(x, head)
    one_hot = np.arange(V) == labels[:, None]
    penalty = z * (weights * lse[:, 0] ** 2).sum()
    expected = (weights * (lse[:, 0] - (one_hot * logits).sum(1))).sum() + penalty
    d_logits = weights[:, None] * (p * (1 + 2 * z * lse) - one_hot)

    def losses(x, head, labels, weights):
        return cross_entropy.linear_cross_entropy(x, head, labels, weights, z)

    run = by_parts(axes, tied, losses)

    def both(x, head):
        loss, more = run(x, head, labels, weights)
        return 3 * loss, more

    with on(axes):
        measure = jax.jit(jax.value_and_grad(both, argnums=(0, 1), has_aux=True))
        (loss, more), (d_x, d_head) = measure(x, head)
    assert float(loss) == pytest.approx(3 * expected, rel=4e-6)
    assert (more is None) == (z == 0)
    if z:
        assert float(more) == pytest.approx(penalty, rel=4e-6)
        assert penalty > 0.05 * expected
    assert_near(d_x, 3 * d_logits @ head.T)
    assert_near(d_head, 3 * x.T @ d_logits)


@pytest.mark.parametrize("k", [(), (3,)], ids=["one label", "three labels"])
@pytest.mark.parametrize(("axes", "tied"), MESHES, ids=str)
def test_log_probabilities_and_their_gradients_are_those_of_plain_logits(axes, tied, k, pieces):
    x, head, *_ = inputs()
    rng = np.random.default_rng(1)
    labels = rng.integers(0, V, (M, *k), np.int32)
    labels[4], labels[5] = V, -1
    if k:
        labels[9] = 7  # The same id three times.
    d_log_probs, d_lse = rng.standard_normal((M, *k)), rng.standard_normal(M)
    d_log_probs[4:6] = 0
    logits, lse, p = softmax(x, head)
    one_hot = np.arange(V) == labels[..., None]
    expected = (one_hot * (logits if not k else logits[:, None])).sum(-1) - lse.reshape(
        -1, *(1 for _ in k)
    )
    each = d_log_probs.reshape(M, -1)
    d_logits = p * (d_lse - each.sum(1))[:, None]
    d_logits += (one_hot.reshape(M, -1, V) * each[..., None]).sum(1)

    run = by_parts(axes, tied, cross_entropy.linear_log_probs)

    def both(x, head):
        log_probs, lse = run(x, head, labels)
        score = (d_log_probs * log_probs).sum() + (d_lse * lse).sum()
        return score, (log_probs, lse)

    with on(axes):
        measure = jax.jit(jax.value_and_grad(both, argnums=(0, 1), has_aux=True))
        (_, found), (d_x, d_head) = measure(x, head)
    assert_near(found[0], expected)
    assert_near(found[1], lse[:, 0])
    assert_near(d_x, d_logits @ head.T)
    assert_near(d_head, x.T @ d_logits)


@pytest.mark.parametrize("k", [1, 20, V])
@pytest.mark.parametrize(("axes", "tied"), MESHES, ids=str)
def test_the_likeliest_ids_come_in_order_whatever_part_they_lie_in(axes, tied, k, pieces):
    """20 are more than the 16 that a part has."""
    x, head, *_ = inputs(2)

    def f(x, head):
        return cross_entropy.linear_top_log_probs(x, head, k)

    with on(axes):
        ids, log_probs = jax.jit(by_parts(axes, tied, f))(x, head)
    logits, lse, _ = softmax(x, head)
    np.testing.assert_array_equal(ids, np.argsort(-logits, axis=1)[:, :k])
    assert_near(log_probs, -np.sort(-logits, axis=1)[:, :k] - lse)


@pytest.mark.parametrize("k", [0, V + 1])
def test_more_ids_than_there_are_is_refused(k):
    x, head, *_ = jax.tree.map(jnp.asarray, inputs())
    with pytest.raises(ValueError, match=f"top {k} must be .* at most the vocabulary, {V}"):
        cross_entropy.linear_top_log_probs(x, head, k)


def test_no_gradient_holds_all_logits(monkeypatch):
    """Three pieces' worth of memory is enough, beside the gradient of the head."""
    m, v, piece = 2048, 4096, 32 * 4096 * 4
    monkeypatch.setattr(cross_entropy, "PIECE_BYTES", piece)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((m, D), (D, v))]
    labels = jax.ShapeDtypeStruct((m,), jnp.int32)
    weights = jax.ShapeDtypeStruct((m,), jnp.float32)

    def weighted(x, head, labels, weights):
        return cross_entropy.linear_cross_entropy(x, head, labels, weights, 1e-4)[0]

    def not_known_before(x, head, labels, weights):
        log_probs, _ = cross_entropy.linear_log_probs(x, head, labels)
        return jnp.tanh(weights * log_probs).sum()

    for f in (weighted, not_known_before):
        gradient = jax.jit(jax.grad(f, (0, 1))).lower(*shapes, labels, weights).compile()
        used = gradient.memory_analysis().temp_size_in_bytes
        # Ids, hidden states and their gradients, in pieces and whole; the head's gradient twice.
        assert used < 4 * piece + 4 * m * D * 4 + 3 * D * v * 4 < 4 * m * v / 4, f.__name__
