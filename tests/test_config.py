"""A section that cannot work is refused with its value, and every section survives JSON."""

import dataclasses
import json

import pytest

from l4jax import presets
from l4jax.checkpoints.orbax import from_json
from l4jax.config import (
    Attention,
    Layer,
    MoE,
    Rope,
    RopeScaling,
    Temperature,
    TextConfig,
)

GOOD = presets.tiny(presets.llama4_scout())
SCALING = GOOD.attention.rope.scaling
NAMES = [name for base in presets.PRESETS for name in (base, f"tiny-{base}")]


REALS = {"factor", "low_freq_factor", "high_freq_factor", "theta", "norm_eps"}


@pytest.mark.parametrize(
    ("section", "field"),
    [
        *((SCALING, field) for field in ("factor", "low_freq_factor", "high_freq_factor")),
        (SCALING, "original_context"),
        (Rope(), "theta"),
        (Temperature(), "floor"),
        *((GOOD.attention, f) for f in ("num_heads", "num_kv_heads", "head_dim", "chunk_size")),
        *((GOOD.moe, field) for field in ("num_experts", "mlp_dim", "experts_per_token")),
        *((GOOD, f) for f in ("num_layers", "embed_dim", "vocab_size", "mlp_dim", "max_context")),
        (GOOD, "norm_eps"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_a_size_must_be_positive(section, field):
    for value in (0.0, -0.5, float("nan")) if field in REALS else (0, -1):
        with pytest.raises(
            ValueError, match=f"{type(section).__name__}.{field} {value!r} must be greater than 0"
        ):
            dataclasses.replace(section, **{field: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RopeScaling(factor=8.0, low_freq_factor=4.1, high_freq_factor=4.0), "4.1 must no"),
        (lambda: Attention(num_heads=6, num_kv_heads=4, head_dim=8), "num_heads 6 must be a mult"),
        (lambda: Attention(num_heads=2, num_kv_heads=4, head_dim=8), "num_heads 2 must be a mult"),
        (lambda: Attention(num_heads=4, num_kv_heads=4, head_dim=7), "head_dim 7 must be even"),
        (lambda: MoE(num_experts=4, mlp_dim=8, shared_mlp_dim=-1), "shared_mlp_dim -1 must be 0"),
        (lambda: MoE(num_experts=4, mlp_dim=8, experts_per_token=5), "experts_per_token 5 exceeds"),
        (lambda: dataclasses.replace(GOOD, pattern=()), "pattern is empty"),
        (lambda: dataclasses.replace(GOOD, pattern=(Layer("local", "moe"),)), "kind 'local'"),
        (lambda: dataclasses.replace(GOOD, pattern=(Layer("global", "mlp"),)), "kind 'mlp'"),
        (lambda: dataclasses.replace(GOOD, moe=None), "moe layers, but moe is None"),
        (
            lambda: dataclasses.replace(
                GOOD, attention=dataclasses.replace(GOOD.attention, chunk_size=None)
            ),
            "chunked layers, but attention.chunk_size is None",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_no_layer_uses_may_be_missing():
    """A pattern may be longer than the model; only the layers in use need their sections."""
    pattern = (Layer("global", "dense"), Layer("chunked", "moe"))
    attention = dataclasses.replace(GOOD.attention, chunk_size=None)
    config = dataclasses.replace(GOOD, pattern=pattern, num_layers=1, moe=None, attention=attention)
    assert config.layers == (Layer("global", "dense"),)
    with pytest.raises(ValueError, match="is None"):
        dataclasses.replace(config, num_layers=2)


def test_layers_repeat_the_pattern_and_end_inside_it():
    config = dataclasses.replace(GOOD, num_layers=6)
    kinds = [layer.attention for layer in config.layers]
    assert kinds == ["chunked"] * 3 + ["global"] + ["chunked"] * 2


@pytest.mark.parametrize(
    ("kind", "context", "slots"),
    [("chunked", 15, 15), ("chunked", 16, 16), ("chunked", 99, 16), ("global", 99, 99)]
    + [("causal", 99, 99)],
)
def test_a_chunked_layer_keeps_at_most_its_chunk(kind, context, slots):
    assert GOOD.cache_slots(kind, context) == slots


def test_sections_are_frozen_hashable_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GOOD.num_layers = 3
    assert hash(GOOD) == hash(presets.tiny(presets.llama4_scout()))
    with pytest.raises(TypeError):
        Temperature(8192)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_survives_json(name):
    config = presets.get(name).make()
    plain = dataclasses.asdict(config)
    assert from_json(TextConfig, plain) == config
    again = from_json(TextConfig, json.loads(json.dumps(plain)))
    assert again == config
    assert hash(again) == hash(config)


def damaged(path, value):
    """The good config as JSON, with one value replaced, or removed when it is ..."""
    whole = json.loads(json.dumps(dataclasses.asdict(GOOD)))
    section = whole
    for key in path[:-1]:
        section = section[key]
    if value is ...:
        del section[path[-1]]
    else:
        section[path[-1]] = value
    return whole


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("colour",), 1, "TextConfig has no field 'colour'"),
        (("attention", "rope", "base"), 1, "Rope has no field 'base'"),
        (("moe", "top_k"), 1, "MoE has no field 'top_k'"),
        (("num_layers",), ..., "num_layers"),
        (("attention", "head_dim"), ..., "head_dim"),
        (("num_layers",), "eight", "TextConfig"),
        (("attention",), 3, "Attention"),
        (("attention",), None, "Attention"),
        (("attention", "rope", "scaling"), [1, 2], "RopeScaling"),
        (("pattern",), [["chunked"]], "TextConfig"),
        (("pattern",), 4, "TextConfig"),
        (("moe", "num_experts"), 0, "num_experts 0 must be greater than 0"),
    ],
)
def test_json_that_is_no_config_is_refused_by_name(path, value, message):
    with pytest.raises(ValueError, match=message):
        from_json(TextConfig, damaged(path, value))


@pytest.mark.parametrize("value", [None, 3, "text", [1, 2]])
def test_json_that_is_no_object_is_refused(value):
    with pytest.raises(ValueError, match="TextConfig"):
        from_json(TextConfig, value)
