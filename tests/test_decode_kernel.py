"""kernels.decode, interpreted, against all scores at once; and compiled for TPUs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tests import tpu_aot

H = 16


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    """Several blocks in a short cache."""
    from l4jax.kernels.tpu import decode

    if "compiles" not in request.node.name and "loop" not in request.node.name:
        monkeypatch.setattr(decode, "ROWS", 128)


def inputs(b, s, n, kv, dtype=jnp.float32):
    rng = np.random.default_rng(s)
    shapes = (b, n, H), (b, s, kv, H), (b, s, kv, H)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def check(arrays, counts, atol=2e-6):
    from l4jax.kernels.attention import decode_reference
    from l4jax.kernels.tpu.decode import decode_attention

    counts = jnp.asarray(counts, jnp.int32)
    expected, expected_log = decode_reference(*arrays, counts)
    out, log_total = decode_attention(*arrays, counts, interpret=True)
    assert out.dtype == expected.dtype
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=atol
    )
    filled = np.asarray(counts) > 0
    np.testing.assert_allclose(log_total[filled], expected_log[filled], atol=1e-5)
    assert (log_total[~filled] <= -1e29).all()
    assert not out[~filled].any()


@pytest.mark.parametrize(
    ("s", "heads"),
    [(1, (4, 2)), (64, (5, 1)), (129, (5, 1)), (129, (24, 8)), (200, (6, 3)), (200, (3, 3))],
)
def test_each_context_sees_its_first_slots(s, heads):
    check(inputs(4, s, *heads), [0, 1, s // 2, s])


@pytest.mark.parametrize("counts", [[0], [1], [65], [200]])
def test_an_odd_batch_is_divided_in_two(counts):
    check(inputs(1, 200, 6, 3), counts)


def test_bfloat16_caches():
    check(inputs(2, 100, 10, 2, jnp.bfloat16), [37, 100], atol=2e-2)


def test_one_layer_of_several():
    from l4jax.kernels.tpu.decode import decode_attention

    q, *caches = inputs(2, 200, 4, 2)
    counts = jnp.array([150, 31], jnp.int32)
    stacked = [jnp.stack([jnp.full_like(x, jnp.nan), x, 0 * x]) for x in caches]
    found = jax.jit(lambda i: decode_attention(q, *stacked, counts, layer=i, interpret=True))(1)
    for one, two in zip(found, decode_attention(q, *caches, counts, interpret=True), strict=True):
        np.testing.assert_array_equal(one, two)


def test_slots_beyond_the_count_are_not_seen():
    """Neither in the last block that is read nor in those that are not."""
    from l4jax.kernels.tpu.decode import decode_attention

    q, k, v = inputs(3, 300, 4, 2)
    counts = jnp.array([0, 70, 128], jnp.int32)
    clean, _ = decode_attention(q, k, v, counts, interpret=True)
    beyond = (jnp.arange(300) >= counts[:, None])[..., None, None]
    k, v = (jnp.where(beyond, jnp.nan, x) for x in (k, v))
    found, _ = decode_attention(q, k, v, counts, interpret=True)
    np.testing.assert_array_equal(found, clean)


@pytest.mark.parametrize("kernel", [False, True], ids=["plain", "kernel"])
def test_parts_of_a_cache_merge_to_the_whole(kernel, monkeypatch):
    """Four devices hold 50 slots each; one context fills only the first's, one none."""
    from l4jax.kernels import attention
    from l4jax.kernels.tpu import decode

    if kernel:
        interpreted = functools.partial(decode.decode_attention, interpret=True)
        monkeypatch.setattr(decode, "decode_attention", interpreted)
        monkeypatch.setattr(attention.sharding, "platform", lambda: "tpu")
    q, k, v = inputs(3, 200, 4, 2)
    counts = jnp.array([0, 33, 187], jnp.int32)
    mesh = Mesh(np.array(jax.devices()[:4]), ("context",))

    def part(q, k, v):
        mine = (counts - 50 * jax.lax.axis_index("context")).clip(0, 50)
        return attention.cached_attention(q[:, None], k, v, mine, axes=("context",))[:, 0]

    slots = P(None, "context")
    sharded = jax.shard_map(
        part, mesh=mesh, in_specs=(P(), slots, slots), out_specs=P(), check_vma=False
    )
    expected, _ = attention.decode_reference(q, k, v, counts)
    np.testing.assert_allclose(jax.jit(sharded)(q, k, v), expected, atol=2e-6)


CASES = {
    "chunk": (16, 8192, 40, 8),
    "long": (1, 131072, 40, 8),
    "tensor-sharded": (2, 8192, 5, 1),
    "tensor-sharded and long": (1, 131072, 5, 1),
    "few heads, odd": (3, 1004, 4, 2),
}


@pytest.mark.parametrize(("generation", "name"), tpu_aot.each_generation(CASES))
def test_compiles_for(generation, name):
    """Without a copy of the cache in another layout."""
    from l4jax.kernels.tpu.decode import decode_attention

    b, s, n, kv = CASES[name]
    shapes = (b, n, 128), (b, s, kv, 128), (b, s, kv, 128)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    counts = jax.ShapeDtypeStruct((b,), jnp.int32)
    found = tpu_aot.compile_for(generation, decode_attention, *arrays, counts)
    assert found.memory_analysis().temp_size_in_bytes < 2e6


def test_layers_in_a_loop_update_and_read_their_caches_in_place():
    """As decoding does: neither a layer's cache nor all of them are copied."""
    from l4jax.kernels.tpu.decode import decode_attention

    generation, b, s, n, kv = "v5p", 8, 8192, 40, 8

    def layers(x, k, v, counts):
        def layer(i, carry):
            x, *caches = carry
            caches = [c.at[i, jnp.arange(b), counts].set(x[:, :kv]) for c in caches]
            return decode_attention(x, *caches, counts + 1, layer=i)[0], *caches

        return jax.lax.fori_loop(0, 4, layer, (x, k, v))

    shapes = (b, n, 128), (4, b, s, kv, 128), (4, b, s, kv, 128)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    counts = jax.ShapeDtypeStruct((b,), jnp.int32)
    found = tpu_aot.compile_for(generation, layers, *arrays, counts, donate=(1, 2))
    assert found.memory_analysis().temp_size_in_bytes < 5e6
