"""Models that see in checkpoints, and what changes of a model leave of its encoder."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import convert, same, vision_of, write_hf
from conftest import build
from flax import nnx
from vision_toys import TEXT, assert_equal, model_of, state_of

from l4jax import checkpoints, info, lora, quantization, roofline, sharding, weights
from l4jax.checkpoints import vision as table
from l4jax.config import Execution
from l4jax.inference.decoding import unrolled
from l4jax.models.multimodal import Multimodal


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A model that Hugging Face's format can describe, and its directory there."""
    model = model_of(vision=vision_of("llama4-scout"))
    path = tmp_path_factory.mktemp("stored") / "hf"
    checkpoints.save(model, path, to="hf", max_shard_bytes=300_000)
    return model, path


def test_our_arrays_are_those_of_the_table():
    """Names and shapes; and their number is what `info` says of the encoder."""
    config = vision_of("llama4-scout")
    state = nnx.state(model_of(vision=config).vision)
    found = {}
    for path, param in nnx.to_flat_state(state):
        layers = range(config.num_layers) if path[0] == "layers" else [None]
        for number in layers:
            inner = path if number is None else ("layers", number, *path[1:])
            name = ".".join(map(str, ("vision", *inner)))
            found[name] = param.shape if number is None else param.shape[1:]
    assert found == {x.ours: x.shape for x in table.arrays(config, TEXT.embed_dim)}
    size = sum(math.prod(shape) for shape in found.values())
    assert size == roofline.vision_parameters(config, TEXT.embed_dim)
    assert info.describe("tiny-llama4-scout")["vision"]["parameters"] == size


def test_every_format_gives_the_model_back(stored, tmp_path):
    model, hf = stored
    assert_equal(checkpoints.load(hf), model)
    checkpoints.save(checkpoints.load(hf), tmp_path / "orbax", to="orbax")
    again = checkpoints.load(tmp_path / "orbax")
    assert isinstance(again, Multimodal)
    assert again.vision.config == model.vision.config
    assert_equal(again, model)
    meta = convert(tmp_path / "orbax", tmp_path / "meta", "meta", shards=2)
    assert_equal(checkpoints.load(meta), model)
    checkpoints.save(checkpoints.load(meta), tmp_path / "hf", to="hf")
    same(tmp_path / "hf", hf)


def test_a_converted_directory_is_the_saved_one(stored, tmp_path):
    model, hf = stored
    assert_equal(checkpoints.load(convert(hf, tmp_path / "orbax", "orbax")), model)


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_the_text_part_alone_is_loaded_on_request(to, stored, tmp_path):
    model, path = stored
    if to == "orbax":
        path = tmp_path / "orbax"
        checkpoints.save(model, path, to="orbax")
    text = checkpoints.load(path, vision=False)
    assert type(text).__name__ == "Llama"
    assert_equal(text, build(TEXT))


@pytest.mark.parametrize("to", ["hf", pytest.param("orbax", marks=pytest.mark.slow)])
def test_a_model_is_loaded_onto_a_mesh_and_saved_from_it(to, stored, tmp_path):
    model, path = stored
    if to == "orbax":
        path = tmp_path / "orbax"
        checkpoints.save(model, path, to="orbax")
    with sharding.use(sharding.make_mesh(fsdp=2, context=2, tensor=2)):
        placed = checkpoints.load(path, dtype="bfloat16")
        q = placed.vision.layers.attention.q[...]
        assert q.dtype == jnp.bfloat16
        assert q.addressable_shards[0].data.shape == (3, 8, 2, 8)
        placed = checkpoints.load(path)
        assert_equal(placed, model)
        checkpoints.save(placed, tmp_path / "again", to=to)
    assert_equal(checkpoints.load(tmp_path / "again"), model)


def test_layers_that_are_unrolled_leave_the_encoder_stacked(stored):
    model, path = stored
    flat = checkpoints.load(path, execution=Execution(scan=False))
    assert flat.periods == 0
    assert_equal(flat, unrolled(model))


def test_files_of_another_writer_are_read(tmp_path):
    """With the numbers of `write_hf`, which the tables' tests check name by name."""
    vision = vision_of("llama4-scout")
    write_hf(tmp_path / "hf", build(TEXT), vision=vision)
    model = checkpoints.load(tmp_path / "hf")
    rng = np.random.default_rng(3)
    state = state_of(model)["vision"]
    for array in table.arrays(vision, TEXT.embed_dim):
        expected, keys = rng.standard_normal(array.shape), array.ours.split(".")[1:]
        number = int(keys.pop(1)) if keys[0] == "layers" else None
        leaf = functools.reduce(lambda tree, key: tree[key], keys, state)
        np.testing.assert_array_equal(
            leaf if number is None else leaf[number], expected.astype(np.float32), array.ours
        )


# --- Model to model ------------------------------------------------------------------------------
def test_adapters_and_few_bits_leave_the_encoder_alone(stored, tmp_path):
    model, _ = stored
    assert not any(x.name.startswith("vision") for x in weights.matrices(model, weights.EVERY))
    small = quantization.quantize(model, weights.EVERY, "int8")
    adapted = lora.apply(small, ("*.attention.*",), rank=2, alpha=4, key=jax.random.key(0))
    for changed in (small, adapted):
        assert isinstance(changed, Multimodal)
        assert_equal(changed.vision, model.vision)
    assert all(not name.startswith("vision") for name in lora.state(adapted))
    checkpoints.save(small, tmp_path / "int8", to="orbax")
    assert_equal(checkpoints.load(tmp_path / "int8"), small)
