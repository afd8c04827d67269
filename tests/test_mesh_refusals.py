"""Meshes that cannot be are refused, with the reason and what would do."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from conftest import build
from jax.sharding import PartitionSpec

from l4jax import presets, sharding
from l4jax.training import trainer


@pytest.mark.parametrize(
    ("name", "axes", "message"),
    [
        ("llama4-scout", {"tensor": 8}, r"tensor=8 .* 4 heads; near 8, \[1, 2, 4\] would"),
        ("llama4-scout", {"tensor": 4}, r"tensor=4 .* 2 kv heads; near 4, \[1, 2\] would"),
        ("llama4-scout", {"expert": 8}, r"expert=8 .* 4 experts; near 8, \[1, 2, 4\] would"),
        ("llama4-maverick", {"fsdp": 3}, r"fsdp=3 · .* 64 embed; near 3, \[1, 2, 4\] would"),
        ("llama3-8b", {"tensor": 3}, r"tensor=3 .* 512 vocab; near 3, \[1, 2, 4\] would"),
    ],
)
def test_a_mesh_that_a_model_does_not_fit_is_refused(name, axes, message):
    with pytest.raises(ValueError, match=message):
        sharding.check(presets.get(f"tiny-{name}").make(), axes)


def test_every_width_of_feed_forward_layers_must_be_divided():
    """Dense ones', routed experts' and the shared expert's, if the model has such layers."""
    config = presets.get("tiny-llama4-maverick").make()
    routed = config.moe
    for mlp_dim, moe in (
        (90, routed),
        (160, dataclasses.replace(routed, mlp_dim=90)),
        (160, dataclasses.replace(routed, shared_mlp_dim=90)),
    ):
        heads = dataclasses.replace(config.attention, num_kv_heads=4)
        wide = dataclasses.replace(config, mlp_dim=mlp_dim, moe=moe, attention=heads)
        sharding.check(wide, {"tensor": 2, "fsdp": 64})
        with pytest.raises(ValueError, match=r"tensor=4 .* 90 mlp; near 4, \[2, 3, 5\] would"):
            sharding.check(wide, {"tensor": 4})


def test_serving_rules_cut_embeddings_over_fsdp_only():
    config, sizes = presets.get("tiny-llama4-scout").make(), {"fsdp": 64, "context": 3}
    sharding.check(config, sizes, sharding.SERVING)
    with pytest.raises(ValueError, match=r"fsdp=64 · expert=1 · context=3 .* 64 embed"):
        sharding.check(config, sizes, sharding.TRAINING)


def test_a_model_refuses_a_mesh_before_it_computes():
    model = build(presets.get("tiny-llama4-scout").make())
    with (
        sharding.use(sharding.make_mesh(expert=8)),
        pytest.raises(ValueError, match=r"expert=8 .* 4 experts"),
    ):
        jax.eval_shape(model, np.zeros((8, 16), np.int32))


@pytest.mark.parametrize(
    ("rows", "length", "message"),
    [
        (6, 32, "data=2 · fsdp=2 does not divide the 6 rows of a training batch"),
        (8, 33, "context=2 does not divide the 33 tokens in a row of a training batch"),
    ],
)
def test_a_batch_that_a_mesh_does_not_divide_is_refused(rows, length, message):
    with sharding.use(sharding.make_mesh(data=2, fsdp=2, context=2)):
        place = trainer.batch_sharding(8, 32)
        assert place.spec == PartitionSpec(("data", "fsdp"), "context")
        with pytest.raises(ValueError, match=message):
            trainer.batch_sharding(rows, length)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"model": 2}, "mesh axis 'model' is unknown; the axes are data, fsdp, expert, context, t"),
        ({"fsdp": 0}, "mesh axis fsdp=0 must be at least 1"),
        ({"fsdp": 4, "tensor": 3}, "fsdp=4 × .* tensor=3 needs 12 devices, but there are 8"),
    ],
)
def test_a_mesh_that_cannot_be_made_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**sizes)
