"""All implementations of kernels.experts against a loop over rows in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

D, F = 12, 10
SIZES = {
    "even": [7, 7, 7],
    "one takes all": [0, 300, 0, 0],
    "gaps": [0, 3, 0, 0, 200, 1, 0],
    "multiples of a block": [128, 256, 0, 128],
    "just past a block": [129, 127, 1],
    "one row": [0, 0, 1],
    "one expert": [5],
}
IMPLEMENTATIONS = ("auto", "ragged", "blocks")


def case(sizes):
    rng = np.random.default_rng(len(sizes))
    e, m = len(sizes), sum(sizes)
    shapes = (m, D), (e, D, F), (e, D, F), (e, F, D)
    return [0.7 * rng.standard_normal(shape) for shape in shapes]


def definition(x, gate, up, down, sizes):
    """Output, and the gradients of the sum of output · cos(index)."""
    y, gradients = np.zeros_like(x), [np.zeros_like(a) for a in (x, gate, up, down)]
    d_y = cotangent(x.shape)
    for row, e in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        a, b = x[row] @ gate[e], x[row] @ up[e]
        s = 1 / (1 + np.exp(-a))
        y[row] = (a * s * b) @ down[e]
        d_hidden = down[e] @ d_y[row]
        d_a, d_b = d_hidden * b * s * (1 + a * (1 - s)), d_hidden * a * s
        gradients[0][row] = gate[e] @ d_a + up[e] @ d_b
        gradients[1][e] += np.outer(x[row], d_a)
        gradients[2][e] += np.outer(x[row], d_b)
        gradients[3][e] += np.outer(a * s * b, d_y[row])
    return y, gradients


def cotangent(shape):
    return np.cos(np.arange(np.prod(shape))).reshape(shape)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_go_through_their_own_expert(name, implementation):
    from l4jax.kernels.experts import grouped_swiglu

    sizes = SIZES[name]
    arrays = case(sizes)
    expected, expected_gradients = definition(*arrays, sizes)

    @functools.partial(jax.jit)
    def run(*arrays):
        def loss(*arrays):
            y = grouped_swiglu(*arrays, jnp.array(sizes), implementation=implementation)
            return jnp.sum(y * cotangent(y.shape)), y

        (_, y), gradients = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(*arrays)
        return y, gradients

    y, gradients = run(*(jnp.asarray(a, jnp.float32) for a in arrays))
    np.testing.assert_allclose(y, expected, atol=1e-4)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_rows_give_bfloat16_rows(implementation):
    from l4jax.kernels.experts import grouped_swiglu

    sizes = [3, 0, 6]
    arrays = case(sizes)
    expected, _ = definition(*arrays, sizes)
    half = [jnp.asarray(a, jnp.bfloat16) for a in arrays]
    y = grouped_swiglu(*half, jnp.array(sizes), implementation=implementation)
    assert y.dtype == jnp.bfloat16
    assert np.abs(np.asarray(y, np.float64) - expected).max() < 0.05 * np.abs(expected).max()
