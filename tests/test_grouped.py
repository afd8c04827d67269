"""kernels.grouped, interpreted, against every expert on every row; and compiled for TPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tpu_aot

SIZES = {
    "even": ([7, 7, 7], 21),
    "one takes all": ([0, 300, 0, 0], 300),
    "gaps and a tail": ([0, 3, 0, 0, 200, 1, 0], 260),
    "whole tiles": ([128, 256, 0, 128], 512),
    "just past a tile, and a tail of several": ([129, 127, 1], 700),
    "one expert": ([5], 5),
    "no rows at all": ([0, 0], 130),
}


def case(sizes, m, d=12, f=10):
    """Rows past the sizes hold NaN."""
    rng = np.random.default_rng(m)
    e = len(sizes)
    shapes = (m, d), (e, d, f), (e, d, f), (e, f, d)
    x, *weights = (0.7 * rng.standard_normal(shape) for shape in shapes)
    x[sum(sizes) :] = np.nan
    return [jnp.asarray(a, jnp.float32) for a in (x, *weights)]


def with_gradients(function, arrays, weight):
    """The function's value, and the gradients of its sum times `weight`."""

    def loss(*arrays):
        y = function(*arrays)
        return jnp.sum(y * weight), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, tuple(range(len(arrays))), has_aux=True))(
        *arrays
    )
    return y, *gradients


def close(found, expected):
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5 * max(1, np.abs(two).max()))


def by_masks(sizes):
    """The definition: every expert on every row, the others' rows masked out."""
    expert = np.repeat(np.arange(len(sizes)), sizes)[:, None]

    def swiglu(x, *weights):
        each = [(jax.nn.silu(x @ g) * (x @ u)) @ d for g, u, d in zip(*weights, strict=True)]
        return sum(jnp.where(expert == e, y, 0) for e, y in enumerate(each))

    return swiglu


def cotangent(m, width):
    return jnp.cos(jnp.arange(m * width)).reshape(m, width)


@pytest.mark.parametrize("name", SIZES)
def test_swiglu_equals_every_expert_on_every_row(name):
    from l4jax.kernels.tpu.grouped import grouped_swiglu_tpu

    sizes, m = SIZES[name]
    x, *weights = case(sizes, m)
    groups, total = jnp.asarray(sizes, jnp.int32), sum(sizes)
    weight = cotangent(m, x.shape[1])
    y, d_x, *d_weights = with_gradients(
        lambda *a: grouped_swiglu_tpu(*a, groups, interpret=True), (x, *weights), weight
    )
    assert not y[total:].any()
    assert not d_x[total:].any()
    expected = with_gradients(by_masks(sizes), (x[:total], *weights), weight[:total])
    if total:
        close((y[:total], d_x[:total], *d_weights), expected)
    else:
        assert not any(d.any() for d in d_weights)


def test_matmul_and_its_gradients_equal_the_definition():
    from l4jax.kernels.tpu.grouped import grouped_matmul

    sizes, m = SIZES["gaps and a tail"]
    x, w, _, _ = case(sizes, m)
    groups, total = jnp.asarray(sizes, jnp.int32), sum(sizes)
    weight = cotangent(m, w.shape[2])
    expert = np.repeat(np.arange(len(sizes)), sizes)
    expected = with_gradients(
        lambda x, w: jnp.einsum("md,mdf->mf", x, w[expert]), (x[:total], w), weight[:total]
    )
    y, d_x, d_w = with_gradients(
        lambda *a: grouped_matmul(*a, groups, interpret=True), (x, w), weight
    )
    assert not y[total:].any()
    assert not d_x[total:].any()
    close((y[:total], d_x[:total], d_w), expected)


def test_widths_beyond_one_tile(monkeypatch):
    """Columns in several tiles that they do not fill, and a contraction in several parts."""
    from l4jax.kernels.tpu import grouped

    monkeypatch.setattr(grouped, "VMEM", {5: 5 * 2**19, 6: 5 * 2**19})
    sizes, m = [100, 30], 150
    x, *weights = case(sizes, m, d=300, f=1300)
    groups, total = jnp.asarray(sizes, jnp.int32), sum(sizes)
    weight = cotangent(m, x.shape[1])
    close(
        with_gradients(
            lambda *a: grouped.grouped_swiglu_tpu(*a, groups, interpret=True)[:total],
            (x[:total], *weights),
            weight[:total],
        ),
        with_gradients(by_masks(sizes), (x[:total], *weights), weight[:total]),
    )


CASES = {
    "one expert": (1, 10240, 5120, 8192),
    "two experts": (2, 8192, 5120, 8192),
    "all experts": (16, 8192, 5120, 8192),
    "odd": (3, 9000, 640, 1344),
}


@pytest.mark.parametrize(("generation", "name"), tpu_aot.each_generation(CASES))
def test_compiles_for(generation, name):
    """Without a second copy of the weights, nor a product of all rows with all experts."""
    from l4jax.kernels.tpu.grouped import grouped_swiglu_tpu

    e, m, d, f = CASES[name]
    shapes = (m, d), (e, d, f), (e, d, f), (e, f, d)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    sizes = jax.ShapeDtypeStruct((e,), jnp.int32)

    def loss(x, gate, up, down, sizes):
        return jnp.sum(grouped_swiglu_tpu(x, gate, up, down, sizes).astype(jnp.float32) ** 2)

    found = tpu_aot.compile_for(generation, jax.grad(loss, (0, 1, 2, 3)), *arrays, sizes)
    hidden = m * f * 2
    assert found.memory_analysis().temp_size_in_bytes < 7 * hidden
    assert found.cost_analysis()["flops"] < 1.1 * 9 * 2 * m * d * f
