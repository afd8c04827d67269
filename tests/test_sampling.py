"""Sampling keeps the right candidates and draws from them as often as it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l4jax.inference.sampling import Sampling, sample


def draws(probabilities, n=4000, **how):
    """How often each token comes up in n draws from one distribution."""
    logits = jnp.broadcast_to(jnp.log(jnp.float32(probabilities)), (n, len(probabilities)))
    tokens = sample(logits, jax.random.key(0), **how)
    return np.bincount(tokens, minlength=len(probabilities)) / n


def test_zero_temperature_takes_the_first_of_the_largest():
    logits = jnp.float32([[0, 3, 3, 1], [5, -1, 2, 5]])
    np.testing.assert_array_equal(sample(logits, jax.random.key(0)), [1, 0])


def test_plain_draws_follow_the_softmax():
    np.testing.assert_allclose(draws([0.5, 0.3, 0.2], temperature=1.0), [0.5, 0.3, 0.2], atol=0.03)


def test_temperature_sharpens():
    squared = np.square([0.5, 0.3, 0.2])
    found = draws([0.5, 0.3, 0.2], temperature=0.5)
    np.testing.assert_allclose(found, squared / squared.sum(), atol=0.03)


def test_top_k_keeps_exactly_k_even_among_ties():
    np.testing.assert_allclose(
        draws([0.2, 0.2, 0.4, 0.2], temperature=1.0, top_k=2), [1 / 3, 0, 2 / 3, 0], atol=0.03
    )


@pytest.mark.parametrize("top_k", [None, 0, 4, 1000])
def test_top_k_off_or_larger_than_the_vocabulary_keeps_everything(top_k):
    assert (draws([0.25] * 4, temperature=1.0, top_k=top_k) > 0.2).all()


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-6, 1), (0.5, 1), (0.51, 2), (0.79, 2), (0.98, 3), (1.0, 4)]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, kept):
    found = draws([0.015, 0.5, 0.3, 0.185], temperature=1.0, top_p=top_p)
    assert (found > 0).sum() == kept


def test_top_p_applies_to_what_top_k_left():
    # 0.4 and 0.2 become 2/3 and 1/3, so the first alone reaches 0.6.
    found = draws([0.4, 0.2, 0.2, 0.2], temperature=1.0, top_k=2, top_p=0.6)
    np.testing.assert_array_equal(found, [1, 0, 0, 0])


def test_a_rows_draw_does_not_depend_on_the_rows_beside_it():
    logits = jnp.float32(np.random.default_rng(0).normal(size=(6, 50)))
    for how in ({}, {"top_k": 7}, {"top_p": 0.8}):
        both = sample(logits, jax.random.key(2), temperature=1.0, **how)
        few = sample(logits[:3], jax.random.key(2), temperature=1.0, **how)
        np.testing.assert_array_equal(both[:3], few)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -0.5}, "temperature -0.5 must be"),
        ({"temperature": float("nan")}, "temperature nan must be"),
        ({"top_k": -1}, "top_k -1 must be"),
        ({"top_p": 0.0}, "top_p 0.0 must be"),
        ({"top_p": 1.5}, "top_p 1.5 must be"),
    ],
)
def test_values_out_of_range_are_named(how, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**how)
    with pytest.raises(ValueError, match=message):
        sample(jnp.zeros((1, 3)), jax.random.key(0), **how)
