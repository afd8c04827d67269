"""On a mesh, models that see are what they are on one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from vision_toys import (
    BOUND,
    QUICK,
    batch_of,
    close,
    encode,
    extended,
    gradients_of,
    images_of,
    model_of,
    on_mesh,
    prefilled,
    run,
    seen,
    state_of,
    tiles_of,
    tokens_of,
)

from l4jax import presets, sharding
from l4jax.models.vision import VisionEncoder

MESHES = [
    {"data": 2, "context": 2, "tensor": 2},
    pytest.param({"expert": 2, "context": 2, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param({"data": 2, "fsdp": 2, "expert": 2}, marks=pytest.mark.slow),
    pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
    pytest.param({"context": 4, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param({"data": 2, "fsdp": 2, "context": 2}, marks=pytest.mark.slow),
    pytest.param({"expert": 4, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param({"data": 4, "tensor": 2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("axes", MESHES)
def test_meshes_change_neither_loss_nor_gradients(axes):
    """The encoder's 20 numbers, 5 heads and 30 hidden ones are cut on some, and whole on others."""

    def loss(model, batch):
        return seen(model, batch)[0]

    value, expected = gradients_of()
    with sharding.use(sharding.make_mesh(**axes)):
        run = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
        found, gradients = run(on_mesh(model_of()), batch_of())
    assert abs(float(found) - value) < BOUND * value
    jax.tree.map(close, jax.device_get(state_of(gradients)), expected)


def test_tiles_that_a_mesh_does_not_divide_are_computed_as_copies():
    tokens = tokens_of()
    expected = np.asarray(run(model_of(), tokens, images_of(tokens)))
    with sharding.use(sharding.make_mesh(fsdp=2, context=2)):
        found = run(on_mesh(model_of()), tokens, images_of(tokens, multiple=1))
    close(np.asarray(found), expected)


@pytest.mark.parametrize("rules", [sharding.TRAINING, sharding.SERVING])
def test_features_lie_as_the_embedding_table_does(rules):
    """Of published sizes' axes, and with tiles on every axis that tokens lie on."""
    mesh = sharding.make_mesh(fsdp=2, expert=2, context=2)
    expected = np.asarray(encode(model_of(), tiles_of(8)))
    with sharding.use(mesh, rules):
        model = on_mesh(model_of())
        table, found = model.embed[...], encode(model, tiles_of(8))
        assert found.sharding.spec[2] == table.sharding.spec[1]
    assert found.addressable_shards[0].data.shape[2] == table.addressable_shards[0].data.shape[1]
    close(np.asarray(found), expected)


@pytest.mark.slow
def test_decoding_on_a_mesh_after_images():
    tokens = tokens_of()
    images = images_of(tokens)
    expected = np.asarray(run(model_of(), tokens, images))
    with sharding.use(sharding.make_mesh(expert=2, context=2)):
        model = on_mesh(model_of())
        first = images._replace(places=images.places[:, :32])
        logits, cache = prefilled(model, tokens[:, :32], None, 48, first)
        second = images._replace(places=images.places[:, 32:])
        rest, _ = extended(model, tokens[:, 32:], cache, second)
    close(np.concatenate([logits, rest], axis=1), expected)


def test_a_model_of_another_mesh_is_refused():
    model = model_of()
    with (
        sharding.use(sharding.make_mesh(tensor=2)),
        pytest.raises(ValueError, match=r"tensor of 2 .* the 5 of vision parameter layers\.att"),
    ):
        model(jnp.asarray(tokens_of()), images=images_of(tokens_of()))


def test_a_published_encoder_is_cut_as_far_as_it_can_be():
    """1408 is no multiple of 256: there the finer cut is left out, and never the rest."""
    for axes, wide, heads in (
        ({"fsdp": 8, "expert": 16}, "embed", "heads"),
        ({"fsdp": 16, "expert": 16, "tensor": 32}, "expert_embed", "norm"),
        ({"fsdp": 256, "tensor": 16}, "norm", "heads"),
    ):
        mesh = jax.sharding.AbstractMesh(
            tuple(axes.get(name, 1) for name in sharding.AXES), sharding.AXES
        )
        with jax.sharding.use_abstract_mesh(mesh):
            model = nnx.eval_shape(
                lambda: VisionEncoder(presets.llama4_vision(), 5120, rngs=nnx.Rngs(0))
            )
        assert sharding.param_axes(model.layers.attention.q) == ("layers", wide, heads, "head_dim")
