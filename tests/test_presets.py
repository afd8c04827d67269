"""Presets against published sizes and golden listings; what a configuration refuses."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from flax import nnx

from l4jax import presets


def parameters(config):
    """Path, parameter, for every parameter of a model that is never made."""
    from l4jax.models.llama4 import Llama

    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    return sorted(
        (".".join(map(str, path)), param)
        for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))
    )


def total(config) -> int:
    return sum(math.prod(param.shape) for _, param in parameters(config))


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_parameters_and_configuration_are_as_recorded(name, golden):
    from l4jax import sharding

    config = presets.get(name).make()
    lines = [json.dumps(dataclasses.asdict(config), indent=1), ""]
    for path, param in parameters(config):
        axes = ", ".join(sharding.param_axes(param))
        lines.append(f"{path} {param.dtype} {list(param.shape)} ({axes})")
    golden(f"{name}.txt", "\n".join([*lines, f"total {total(config)}", ""]))


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_every_parameter_has_a_layout_that_uses_no_mesh_axis_twice(name):
    from l4jax import sharding

    for path, param in parameters(presets.get(name).make()):
        axes = sharding.param_axes(param)
        assert len(axes) == len(param.shape), path
        sharding.spec(*axes)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama4-scout", 107.770),
        ("llama4-maverick", 400.712),
        ("llama-guard-4", 11.130),
        ("llama3-8b", 8.030),
        ("llama3.1-70b", 70.554),
        ("llama3.1-405b", 405.853),
        ("llama3.2-1b", 1.236),
        ("llama3.2-3b", 3.213),
    ],
)
def test_totals_equal_the_published_ones(name, billions):
    assert abs(total(presets.get(name).make()) / 1e9 - billions) < 0.001


def test_behemoth_is_of_the_announced_size():
    config = presets.get("llama4-behemoth").make()
    routed = 3 * config.num_layers * 16 * config.embed_dim * config.moe.mlp_dim
    everything = total(config)
    assert 1.9e12 < everything < 2.1e12
    assert 280e9 < everything - routed * 15 / 16 < 296e9
    assert presets.get("llama4-behemoth").assumed


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_a_tiny_twin_has_its_models_structure_and_crosses_every_boundary(name):
    large, small = presets.get(name).make(), presets.get(f"tiny-{name}").make()
    assert small.pattern == large.pattern
    assert small.num_layers == 2 * len(small.pattern)
    assert (small.moe is None) == (large.moe is None)
    assert small.tie_embeddings == large.tie_embeddings
    assert small.attention.qk_norm == large.attention.qk_norm
    assert (small.attention.chunk_size is None) == (large.attention.chunk_size is None)
    assert (small.attention.rope.scaling is None) == (large.attention.rope.scaling is None)
    if small.attention.temperature:
        assert small.attention.temperature.floor < 64
    if small.attention.chunk_size:
        assert 3 * small.attention.chunk_size < 64
    assert total(small) < 3_000_000


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_a_configuration_survives_json(name):
    from l4jax.checkpoints.orbax import from_json
    from l4jax.config import TextConfig

    config = presets.get(name).make()
    assert from_json(TextConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("llama4-scot", "llama4-scout"),
        ("tiny-llama4-maverik", "llama4-maverick"),
        ("llama3.1-8B", "llama3.1-8b"),
        ("zzz", "llama-guard-4"),
    ],
)
def test_an_unknown_name_is_answered_with_near_ones(name, near):
    with pytest.raises(ValueError, match=near) as error:
        presets.get(name)
    assert repr(name) in str(error.value)


def replaced(section: str, **changes):
    config = presets.get("llama4-scout").make()
    if section:
        changes = {section: dataclasses.replace(getattr(config, section), **changes)}
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("", {"num_layers": 0}, "num_layers 0"),
        ("", {"vocab_size": -1}, "vocab_size -1"),
        ("", {"norm_eps": 0.0}, "norm_eps"),
        ("", {"pattern": ()}, "pattern is empty"),
        ("", {"moe": None}, "moe is None"),
        ("attention", {"num_kv_heads": 7}, "num_heads 40 must be a multiple of num_kv_heads 7"),
        ("attention", {"head_dim": 127}, "head_dim 127 must be even"),
        ("attention", {"chunk_size": 0}, "chunk_size 0"),
        ("attention", {"chunk_size": None}, "chunk_size is None"),
        ("moe", {"experts_per_token": 17}, "experts_per_token 17 exceeds num_experts 16"),
        ("moe", {"shared_mlp_dim": -1}, "shared_mlp_dim -1"),
        ("moe", {"mlp_dim": 0}, "mlp_dim 0"),
    ],
)
def test_impossible_values_are_refused_by_name(section, changes, message):
    with pytest.raises(ValueError, match=message):
        replaced(section, **changes)


@pytest.mark.parametrize("layer", [("sliding", "moe"), ("chunked", "sparse")])
def test_unknown_layer_kinds_are_refused(layer):
    from l4jax.checkpoints.orbax import from_json
    from l4jax.config import TextConfig

    values = dataclasses.asdict(presets.get("llama4-scout").make()) | {"pattern": [layer]}
    with pytest.raises(ValueError, match="sliding|sparse"):
        from_json(TextConfig, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"factor": 0.0}, "factor"),
        ({"low_freq_factor": 5.0}, "low_freq_factor 5.0 must not exceed"),
        ({"original_context": 0}, "original_context 0"),
    ],
)
def test_impossible_rope_scaling_is_refused(values, message):
    from l4jax.config import RopeScaling

    given = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | values
    with pytest.raises(ValueError, match=message):
        RopeScaling(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(width=1), "TextConfig has no field 'width'"),
        (lambda v: v["moe"].update(top=1), "MoE has no field 'top'"),
        (lambda v: v.pop("num_layers"), "num_layers"),
        (lambda v: v.update(num_layers="4"), "TextConfig"),
        (lambda v: v.update(pattern=[["chunked"]]), "TextConfig"),
    ],
)
def test_json_that_is_no_configuration_is_refused(change, message):
    from l4jax.checkpoints.orbax import from_json
    from l4jax.config import TextConfig

    values = dataclasses.asdict(presets.get("llama4-scout").make())
    change(values)
    with pytest.raises(ValueError, match=message):
        from_json(TextConfig, values)


@pytest.mark.parametrize("kind", ["mesh axis", "too many", "logical axis", "twice"])
def test_sharding_refuses_what_it_does_not_know(kind):
    from l4jax import sharding

    call = {
        "mesh axis": (lambda: sharding.make_mesh(model=2), "'model' is unknown"),
        "too many": (lambda: sharding.make_mesh(fsdp=16), "needs 16 devices, but there are 8"),
        "logical axis": (lambda: sharding.spec("embed", "depth"), "depth"),
        "twice": (lambda: sharding.spec("heads", "mlp"), "twice"),
    }[kind]
    with pytest.raises(ValueError, match=call[1]):
        call[0]()
