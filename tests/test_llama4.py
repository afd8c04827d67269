"""What a call of the model does with arguments that are easily given wrong."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import forward
from test_models import assert_close, placed_rows


def test_restarting_positions_and_returning_segments_are_documents_of_their_own(twin_of):
    twin = twin_of("llama4-scout")
    tokens, (positions, segments) = twin.tokens(), placed_rows()
    packed = twin.forward(twin.model, tokens, positions, segments)[2]
    alone = twin.forward(twin.model, tokens, positions, 0 * segments)[2]
    assert_close(alone, packed)
    back = np.where(segments == 3, 1, segments)
    assert_close(forward(twin.model, tokens, None, back)[2], packed)


@pytest.mark.parametrize(("v", "shape"), [(11, (7,)), (11, (3, 1, 50)), (2**22, (3, 1, 401))])
def test_rows_on_tpu_and_their_gradients_are_those_of_plain_indexing(v, shape):
    """Many equal ids, rows that none asks for, ids past the end; sorted in one part or three."""
    from l4jax.kernels.tpu import embedding

    rng = np.random.default_rng(1)
    table = jnp.asarray(rng.standard_normal((v, 2)), jnp.float32)
    ids = jnp.asarray(rng.choice([0, 3, 3, v - 1, v, v + 9], shape), jnp.int32)
    d_rows = jnp.asarray(rng.standard_normal((*shape, 2)), jnp.float32)

    def plain(table, ids):
        return jnp.where((ids < v)[..., None], table[jnp.minimum(ids, v - 1)], 0)

    (rows, pull), (expected, pull_plain) = (
        jax.vjp(lambda table, take=take: take(table, ids), table)
        for take in (embedding.take_rows, plain)
    )
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(pull(d_rows)[0], pull_plain(d_rows)[0], atol=1e-5)


def test_ids_outside_the_vocabulary_give_no_number(twin_of):
    twin = twin_of("llama3.2-1b")
    tokens = twin.tokens()
    for wrong in (512, -1):
        spoilt = tokens.copy()
        spoilt[0, 9] = wrong
        found = np.asarray(twin.forward(twin.model, spoilt))
        assert np.isnan(found[0, 9:]).all()
        assert np.isfinite(found[1:]).all()
