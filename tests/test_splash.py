"""kernels.splash, interpreted, against attention with all scores at once; and compiled for TPUs."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tests import tpu_aot

H = 16


def inputs(t, s, heads=(4, 2), b=1, h=H):
    rng = np.random.default_rng(t)
    n, kv = heads
    shapes = (b, t, n, h), (b, s, kv, h), (b, s, kv, h)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def definition(q, k, v, rows, *, chunk=None, back=None, groups=None):
    """Softmax over the visible keys; `rows` are those of the queries."""
    b, t, n, h = q.shape
    keys = np.arange(k.shape[1])
    seen = keys <= rows[:, None]
    if chunk is not None:
        seen &= keys // chunk == rows[:, None] // chunk
    if back is not None:
        seen &= rows[:, None] - keys <= back
    seen = jnp.asarray(seen)[None]
    if groups is not None:
        seen = seen & (groups[0][:, :, None] == groups[1][:, None])
    grouped = q.reshape(b, t, k.shape[2], -1, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k)
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30))
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)


def with_gradients(function, *arrays):
    """The function's value, and the gradients of its sum times cos(index)."""

    def loss(*arrays):
        out = function(*arrays)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays)
    return out, *gradients


def close(found, expected):
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in a short sequence."""
    from l4jax.kernels.tpu import splash

    monkeypatch.setattr(splash, "BLOCK", 256)
    monkeypatch.setattr(splash, "PRODUCT", 128)


def check(t, monkeypatch, *, fused=True, heads=(4, 2), b=1, **mask):
    from l4jax.kernels.tpu import splash

    monkeypatch.setattr(splash, "FUSED_SHARE", 0 if fused else 2)
    arrays = inputs(t, t, heads, b)
    close(
        with_gradients(lambda *a: splash.splash_attention(*a, interpret=True, **mask), *arrays),
        with_gradients(lambda *a: definition(*a, np.arange(t), **mask), *arrays),
    )


@pytest.mark.parametrize(
    ("mask", "fused"),
    [
        ({}, True),
        ({}, False),
        ({"chunk": 16}, False),
        ({"chunk": 100}, True),
        ({"chunk": 128}, False),
        ({"back": 130}, True),
        ({"back": 0}, False),
    ],
)
def test_visible_keys_are_those_of_the_definition(mask, fused, monkeypatch):
    check(700, monkeypatch, fused=fused, **mask)


@pytest.mark.parametrize("t", [1, 127, 128, 300])
def test_any_length(t, monkeypatch):
    check(t, monkeypatch, chunk=64)


@pytest.mark.parametrize("mask", [{"chunk": 128}, {"chunk": 128, "back": 50}])
def test_whole_chunks_are_folded_into_the_batch(mask, monkeypatch):
    check(384, monkeypatch, b=2, heads=(3, 1), **mask)


@pytest.mark.parametrize(
    ("mask", "same"),
    [({"back": 299}, True), ({"chunk": 300, "back": 500}, True), ({"back": 298}, False)],
)
def test_a_bound_that_nothing_meets_makes_no_other_kernel(mask, same):
    """Chunked and global layers are one program to compile where the sequence is one chunk."""
    from l4jax.kernels.tpu import splash

    def program(**mask):
        # Printed functions have addresses.
        call = functools.partial(splash.splash_attention, interpret=True, **mask)
        return re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(call)(*inputs(300, 300))))

    assert (program(**mask) == program()) == same


@pytest.mark.parametrize("heads", [(5, 1), (3, 3)])
@pytest.mark.parametrize("most", [0, 2**30])
def test_key_heads_may_be_computed_in_groups(heads, most, monkeypatch):
    from l4jax.kernels.tpu import splash

    plain = splash._divisor
    monkeypatch.setattr(splash, "_divisor", lambda number, _: plain(number, most))
    check(300, monkeypatch, heads=heads, b=2)


@pytest.mark.parametrize(("chunk", "fused"), [(None, True), (128, True), (100, False)])
def test_groups_do_not_see_each_other(chunk, fused, monkeypatch):
    t = 512
    ids = jnp.asarray(np.cumsum(np.random.default_rng(0).random((2, t)) < 0.01, axis=1), jnp.int32)
    check(t, monkeypatch, fused=fused, b=2, chunk=chunk, groups=(ids, ids))


def zigzag(c, s):
    """Shard i has pieces i and 2c-1-i of 2c, so that all see about as many keys."""
    pieces = np.arange(s).reshape(2 * c, -1)
    return np.stack([np.concatenate([pieces[i], pieces[2 * c - 1 - i]]) for i in range(c)])


@pytest.mark.parametrize(
    ("c", "fused", "mask"),
    [(2, True, {}), (2, False, {"back": 200}), (4, False, {}), (4, True, {"chunk": 96})],
)
def test_context_shards_together_equal_the_whole(c, fused, mask, monkeypatch):
    """One program on c devices, rematerialized as a model's layers are."""
    from l4jax.kernels.tpu import splash

    monkeypatch.setattr(splash, "FUSED_SHARE", 0 if fused else 2)
    s = 960
    arrays = inputs(s, s)
    groups = jnp.asarray(np.arange(s)[None] // 401, jnp.int32)
    layout = zigzag(c, s)
    order = layout.reshape(-1)

    @jax.checkpoint
    def shard(q, k, v, ids):
        rows = splash.Rows(layout, jax.lax.axis_index("context"))
        return splash.splash_attention(
            q, k, v, groups=(ids, groups), rows=rows, interpret=True, **mask
        )

    part = P(None, "context")
    mesh = Mesh(np.array(jax.devices()[:c]), ("context",))
    sharded = jax.shard_map(
        shard, mesh=mesh, in_specs=(part, P(), P(), part), out_specs=part, check_vma=False
    )
    close(
        with_gradients(
            lambda q, k, v: sharded(q[:, order], k, v, groups[:, order])[:, np.argsort(order)],
            *arrays,
        ),
        with_gradients(
            lambda *a: definition(*a, np.arange(s), groups=(groups, groups), **mask), *arrays
        ),
    )


def test_invisible_blocks_are_not_read(monkeypatch):
    """A NaN in a block out of reach would otherwise show."""
    from l4jax.kernels.tpu.splash import splash_attention

    q, k, v = inputs(1024, 1024)
    v = v.at[:, :256].set(jnp.nan)
    found = splash_attention(q, k, v, chunk=256 + 16, interpret=True)
    assert np.isfinite(found[:, 512 + 32 :]).all()


def test_rows_beyond_the_keys_are_refused():
    from l4jax.kernels.tpu.splash import Rows, splash_attention

    q, k, v = inputs(64, 128)
    with pytest.raises(ValueError, match="rows 100 to 163, the keys are rows 0 to 127"):
        splash_attention(q, k, v, rows=Rows(np.arange(100, 164)[None]), interpret=True)


def compiled(generation, t, s, heads, h=128, *, c=None, grouped=False, **mask):
    """Forward and backward in bfloat16."""
    from l4jax.kernels.tpu.splash import Rows, splash_attention

    n, kv = heads

    def loss(q, k, v, ids, key_ids, shard):
        out = splash_attention(
            q,
            k,
            v,
            groups=(ids, key_ids) if grouped else None,
            rows=Rows(zigzag(c, s), shard) if c else None,
            **mask,
        )
        return jnp.sum(out.astype(jnp.float32) ** 2)

    shapes = [(1, t, n, h), (1, s, kv, h), (1, s, kv, h)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    numbers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, t), (1, s), ())]
    return tpu_aot.compile_for(generation, jax.grad(loss, (0, 1, 2)), *arrays, *numbers)


@pytest.fixture
def real_blocks(monkeypatch):
    from l4jax.kernels.tpu import splash

    monkeypatch.setattr(splash, "BLOCK", 1024)
    monkeypatch.setattr(splash, "PRODUCT", 512)


CASES = {
    "a sequence": ({"t": 8192, "s": 8192, "heads": (40, 8)}, 1.0),
    "context shards": ({"t": 8192, "s": 131072, "heads": (40, 8), "c": 16, "grouped": True}, 3.0),
    "chunks": ({"t": 8192, "s": 131072, "heads": (40, 8), "c": 16, "chunk": 8192}, 1.8),
    "long": ({"t": 131072, "s": 131072, "heads": (5, 1)}, 0.8),
    "odd": ({"t": 4001, "s": 4001, "heads": (4, 2), "h": 80, "chunk": 1000, "grouped": True}, 0.1),
}


@pytest.mark.parametrize(("generation", "name"), tpu_aot.each_generation(CASES))
def test_compiles_for(generation, name, real_blocks):
    """Memory stays linear in the length: scores of 131072² would take 34 GB a head."""
    case, gigabytes = CASES[name]
    found = compiled(generation, **case).memory_analysis().temp_size_in_bytes
    assert found < gigabytes * 1e9
