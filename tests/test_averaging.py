"""The average of checkpoints is the mean of their numbers, and only of one architecture's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build
from flax import nnx

from l4jax import checkpoints, presets, sharding
from l4jax.training import averaging

CONFIG = dataclasses.replace(
    presets.tiny(presets.llama32_1b()), num_layers=2, embed_dim=32, vocab_size=40, mlp_dim=24
)
INT8 = checkpoints.Options(scheme="int8")
FACTORS = (1.0, 3.0, -7.0)


def changed(factor, dtype="float32", **execution):
    return jax.tree.map(lambda x: (factor * x).astype(dtype), build(CONFIG, **execution))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averaging")
    directories = [folder / str(i) for i in range(len(FACTORS))]
    for directory, factor in zip(directories, FACTORS, strict=True):
        checkpoints.save(changed(factor), directory, to="orbax")
    return directories


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0], [0.0, 1.0, 0.0]])
def test_it_is_the_weighted_mean_on_any_mesh(saved, weights):
    expected = changed(np.average(FACTORS, weights=weights))
    with sharding.use(sharding.make_mesh(fsdp=2, tensor=2)):
        found = averaging.average(saved, weights)
        wanted = sharding.shardings(nnx.split(expected)[1])
    assert found.config == CONFIG
    places = jax.tree.leaves(wanted)
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(expected), places, strict=True)
    for x, y, place in leaves:
        assert x.sharding.is_equivalent_to(place, x.ndim)
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


def test_bfloat16_is_summed_in_float32(tmp_path):
    """Three quarters of the way from 1 to its neighbour, which is 1 if rounded on the way."""
    for i, value in enumerate((1.0, 1.0 + 2**-7, 1.0 + 2**-7)):
        model = jax.tree.map(lambda x, v=value: jnp.full(x.shape, v, jnp.bfloat16), build(CONFIG))
        checkpoints.save(model, tmp_path / str(i), to="orbax")
    found = averaging.average([tmp_path / str(i) for i in range(3)], [1.0, 1.0, 2.0])
    for x in jax.tree.leaves(found):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_array_equal(x.astype(np.float32), 1 + 2**-7)


def test_another_architecture_is_refused(saved, tmp_path):
    other = build(dataclasses.replace(CONFIG, norm_eps=1e-6))
    checkpoints.save(other, tmp_path / "other", to="orbax")
    with pytest.raises(ValueError, match=r"other: another architecture than that of .*0"):
        averaging.average([saved[0], tmp_path / "other"])


def test_layers_that_are_stacked_otherwise_are_refused(saved, tmp_path):
    checkpoints.save(changed(1.0, scan=False), tmp_path / "flat", to="orbax")
    with pytest.raises(ValueError, match="flat: its layers are not stacked as in"):
        averaging.average([saved[0], tmp_path / "flat"])


def test_quantized_numbers_are_refused(tmp_path):
    deeper = build(dataclasses.replace(CONFIG, num_layers=4))
    checkpoints.save(deeper, tmp_path / "plain", to="orbax")
    checkpoints.convert(
        tmp_path / "plain", tmp_path / "q", to="orbax", options=INT8, licence="none"
    )
    with pytest.raises(ValueError, match=r"q: .* is int8; quantized numbers have no mean"):
        averaging.average([tmp_path / "q"])


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0]])
def test_weights_that_do_not_fit_are_refused(saved, weights):
    with pytest.raises(ValueError, match="must be one for each of 3 checkpoints"):
        averaging.average(saved, weights)


def test_nothing_has_no_average():
    with pytest.raises(ValueError, match="no checkpoint to average"):
        averaging.average([])
