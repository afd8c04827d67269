"""Every path of kernels.attention against a plain masked softmax in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

B, H = 2, 8


def naive(q, k, v, positions, segments, chunk):
    """Softmax over the visible keys, and its gradients for d_out = cos of the output's index."""
    b, t, n, h = q.shape
    group = n // k.shape[2]
    seen = (positions[:, None, :] <= positions[:, :, None]) & (positions >= 0)[:, None, :]
    seen &= segments[:, None, :] == segments[:, :, None]
    if chunk is not None:
        seen &= positions[:, None, :] // chunk == positions[:, :, None] // chunk
    wide = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scores = np.where(seen[:, None], np.einsum("btnh,bsnh->bnts", q, wide[0]), -np.inf)
    top = np.where(seen.any(-1), 0, 1)[:, None, :, None]
    weights = np.exp(scores - np.where(top, 0, scores.max(-1, keepdims=True)))
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bnts,bsnh->btnh", weights, wide[1])
    d_out = cotangent(out.shape) * seen.any(-1)[:, :, None, None]
    d_weights = np.einsum("btnh,bsnh->bnts", d_out, wide[1])
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    d_q = np.einsum("bnts,bsnh->btnh", d_scores, wide[0])
    d_k, d_v = (
        x.reshape(b, t, -1, group, h).sum(3)
        for x in (
            np.einsum("bnts,btnh->bsnh", d_scores, q),
            np.einsum("bnts,btnh->bsnh", weights, d_out),
        )
    )
    return out, d_q, d_k, d_v, seen.any(-1)


def cotangent(shape):
    return np.cos(np.arange(np.prod(shape))).reshape(shape)


def packed(t):
    """Two rows: segments of 5, 20 and the rest, and one started at position 37 after padding."""
    index = np.arange(t)
    starts = np.where(index >= 25, 25, np.where(index >= 5, 5, 0))
    positions = np.stack([index - starts, np.where(index >= 3, index + 34, -1 - index)])
    return positions.astype(np.int32), np.stack([starts, 0 * index]).astype(np.int32)


def check(t, chunk, heads, where, monkeypatch, *, dense=1024, block=512):
    from l4jax.kernels import attention

    monkeypatch.setattr(attention, "DENSE", dense)
    monkeypatch.setattr(attention, "BLOCK", block)
    n, kv = heads
    rng = np.random.default_rng(t)
    q, k, v = (2 * rng.standard_normal((B, t, m, H)) for m in (n, kv, kv))
    positions, segments = (
        packed(t) if where else (np.broadcast_to(np.arange(t), (B, t)), np.zeros((B, t), int))
    )
    given = attention.Where(jnp.asarray(positions), jnp.asarray(segments)) if where else None
    out, *gradients, real = naive(q, k, v, positions, segments, chunk)
    d_out = jnp.asarray(cotangent(out.shape) * real[:, :, None, None], jnp.float32)

    @jax.jit
    def run(q, k, v):
        found, vjp = jax.vjp(lambda *x: attention.self_attention(*x, given, chunk=chunk), q, k, v)
        return found, *vjp(d_out)

    found, *found_gradients = run(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[real], out[real], atol=1e-5)
    for one, two in zip(found_gradients, gradients, strict=True):
        np.testing.assert_allclose(one, two, atol=4e-5)


HEADS = [(4, 2), (5, 1)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("where", [False, True])
def test_scores_at_once_equal_the_definition(heads, chunk, where, monkeypatch):
    check(41, chunk, heads, where, monkeypatch)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("where", [False, True])
def test_blocks_equal_the_definition(heads, chunk, where, monkeypatch):
    """Sixteen-token chunks are no multiple of ten-token blocks, nor is the length."""
    check(41, chunk, heads, where, monkeypatch, dense=4, block=10)


@pytest.mark.parametrize(
    ("t", "chunk", "block"), [(48, 16, 8), (40, 8, 16), (30, 16, 16), (33, 1, 8), (20, 64, 8)]
)
@pytest.mark.parametrize("where", [False, True])
def test_any_ratio_of_length_chunk_and_block_equals_the_definition(
    t, chunk, block, where, monkeypatch
):
    check(t, chunk, (2, 1), where, monkeypatch, dense=4, block=block)


def test_folding_equals_the_definition_when_the_chunk_is_longer_than_the_sequence(monkeypatch):
    check(20, 64, (2, 2), False, monkeypatch)


def test_a_chunk_longer_than_dense_is_folded_and_then_computed_in_blocks(monkeypatch):
    check(70, 32, (2, 2), False, monkeypatch, dense=16, block=12)


def test_blocks_of_another_chunk_are_never_computed(monkeypatch):
    """Cost O(t · chunk): a NaN in a block out of reach would otherwise show."""
    from l4jax.kernels import attention

    monkeypatch.setattr(attention, "DENSE", 4)
    monkeypatch.setattr(attention, "BLOCK", 8)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 64, 1, H)), jnp.float32) for _ in range(3))
    where = attention.Where(jnp.arange(64, dtype=jnp.int32)[None])
    v = v.at[:, :8].set(jnp.nan)
    found = attention.self_attention(q, k, v, where, chunk=8)
    assert np.isfinite(found[:, 16:]).all()


def test_queries_without_any_visible_key_stay_finite():
    from l4jax.kernels import attention

    ones = jnp.ones((1, 3, 1, H))
    at = attention.Where(jnp.array([[0, 1, 2]]))
    nothing = attention.Where(jnp.array([[-1, -1, 5]]))
    assert np.isfinite(attention.cross_attention(ones, ones, ones, at, nothing)).all()


def test_keys_of_a_cache_may_come_in_any_order():
    from l4jax.kernels import attention

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, 20, 2, H)) for _ in range(3))
    positions = np.broadcast_to(np.arange(20), (B, 20))
    out = naive(q, k, v, positions, 0 * positions, 8)[0]
    order = np.random.default_rng(1).permutation(20)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k[:, order], v[:, order]))
    at, there = (attention.Where(jnp.asarray(x)) for x in (positions, positions[:, order]))
    found = attention.cross_attention(q, k, v, at, there, chunk=8)
    np.testing.assert_allclose(found, out, atol=1e-5)
