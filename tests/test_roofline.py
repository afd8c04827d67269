"""The arithmetic equals what the model really has: parameters, cache bytes and visible keys."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from l4jax import presets, roofline
from l4jax.config import Execution, Layer, MoE
from l4jax.models.llama4 import Llama

NAMES = [name for base in presets.PRESETS for name in (base, f"tiny-{base}")]
TINY = [name for name in NAMES if name.startswith("tiny-")]
SCOUT = presets.tiny(presets.llama4_scout())
GUARD = presets.tiny(presets.llama_guard_4())
ODD = dataclasses.replace(
    SCOUT,
    num_layers=7,
    pattern=(Layer("chunked", "moe"), Layer("global", "dense"), Layer("causal", "moe")),
    moe=MoE(num_experts=5, mlp_dim=24, shared_mlp_dim=0, experts_per_token=2),
    tie_embeddings=True,
)
"""No shared expert, two experts per token, a tied head, and layers that the pattern cuts off."""


def abstract(config, **execution):
    return nnx.eval_shape(lambda: Llama(config, execution=Execution(**execution), rngs=nnx.Rngs(0)))


def sizes(config):
    """Parameters of the real model by name."""
    flat = nnx.to_flat_state(nnx.state(abstract(config), nnx.Param))
    return {path: param.get_raw_value().size for path, param in flat}


def visible(config, position):
    """How many keys all layers' queries at `position` see, one by one."""
    chunk = config.attention.chunk_size
    return sum(
        1
        for layer in config.layers
        for key in range(position + 1)
        if layer.attention != "chunked" or key // chunk == position // chunk
    )


@pytest.mark.parametrize("name", NAMES)
def test_totals_equal_the_parameters_of_the_model(name):
    config = presets.get(name).make()
    assert roofline.parameters(config).total == sum(sizes(config).values())


@pytest.mark.parametrize("config", [SCOUT, GUARD, ODD], ids=["scout", "guard", "odd"])
def test_each_part_is_counted_where_it_belongs(config):
    found, real = roofline.parameters(config), sizes(config)

    def of(wanted):
        return sum(size for path, size in real.items() if wanted(path))

    expert = ("gate", "up", "down")
    shared = of(lambda p: "shared" in p)
    routers = of(lambda p: p[-1] == "router")
    feed_forward = of(lambda p: p[-1] in expert and "shared" not in p)
    assert found.embedding == of(lambda p: p[-1] == "embed")
    assert found.head == of(lambda p: p[-1] == "head")
    assert found.attention == of(lambda p: "attention" in p)
    assert found.norms == of(lambda p: p[-1] == "scale")
    assert found.routers == routers
    assert found.dense + found.routed == feed_forward + shared
    if config.moe is None:
        assert (found.routed, found.routed_active) == (0, 0)
        return
    routed_layers = sum(layer.ffn == "moe" for layer in config.layers)
    one = 3 * config.embed_dim * config.moe.mlp_dim
    assert found.routed == routed_layers * config.moe.num_experts * one
    assert found.routed_active == routed_layers * config.moe.experts_per_token * one
    assert found.total - found.active == found.routed - found.routed_active
    assert found.multiplied == found.active - found.norms - (
        0 if config.tie_embeddings else found.embedding
    )


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("llama4-scout", 107.77e9, 17.17e9),
        ("llama4-maverick", 400.71e9, 17.18e9),
        ("llama4-behemoth", 2e12, 288e9),
        ("llama-guard-4", 12e9, 12e9),
        ("llama3-8b", 8.03e9, 8.03e9),
        ("llama3.1-70b", 70.55e9, 70.55e9),
        ("llama3.1-405b", 405.85e9, 405.85e9),
        ("llama3.2-1b", 1.2358e9, 1.2358e9),
        ("llama3.2-3b", 3.2127e9, 3.2127e9),
    ],
)
def test_published_sizes_are_met(name, total, active):
    """Text parts alone. Meta's own figures for the last three digits that it gives."""
    rough = name in {"llama4-behemoth", "llama-guard-4"}
    counts = roofline.parameters(presets.get(name).make())
    assert counts.total == pytest.approx(total, rel=0.08 if rough else 0.005)
    assert counts.active == pytest.approx(active, rel=0.08 if rough else 0.005)


@functools.cache
def tiny_model(name, dtype):
    return abstract(presets.get(name).make(), dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("context", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("name", TINY)
def test_cache_bytes_are_those_of_the_cache_that_is_made(name, context, dtype):
    """Contexts below, at and above a chunk of 16."""
    model = tiny_model(name, dtype)
    cache = jax.eval_shape(lambda: model.empty_cache(1, context))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.layers, cache.tail)))
    assert roofline.kv_bytes(model.config, context, dtype=dtype) == held


@pytest.mark.parametrize("name", TINY)
def test_bytes_per_token_are_the_growth_of_the_cache(name):
    config = presets.get(name).make()
    first, later = roofline.kv_bytes_per_token(config)
    kept = [roofline.kv_bytes(config, n) for n in range(1, 60)]
    growth = np.diff(kept)
    chunk = config.attention.chunk_size or 1
    assert kept[0] == first
    assert set(growth[: chunk - 1]) <= {first}
    assert set(growth[chunk - 1 :]) == {later}


def test_quantized_caches_shrink_in_proportion():
    whole = roofline.kv_bytes(SCOUT, 40, dtype="bfloat16")
    assert roofline.kv_bytes(SCOUT, 40, dtype="int8") == whole / 2
    assert roofline.kv_bytes(SCOUT, 40, dtype="int4") == whole / 4
    with pytest.raises(KeyError):
        roofline.kv_bytes(SCOUT, 40, dtype="int3")


def test_scout_keeps_a_quarter_of_a_full_cache_at_ten_million_tokens():
    config = presets.llama4_scout()
    full = dataclasses.replace(config, pattern=(Layer("global", "moe"),))
    share = roofline.kv_bytes(config, 10_000_000) / roofline.kv_bytes(full, 10_000_000)
    assert share == pytest.approx(0.25, abs=0.001)


@pytest.mark.parametrize("config", [SCOUT, GUARD, ODD], ids=["scout", "guard", "odd"])
@pytest.mark.parametrize("context", [1, 15, 16, 17, 32, 33, 75])
def test_forward_flops_count_every_visible_key(config, context):
    """A key costs a product with the query and one with the value: 2·2·h operations a head."""
    a = config.attention
    per_key = 4 * a.num_heads * a.head_dim
    weights = 2 * roofline.parameters(config).multiplied
    expected = weights + per_key * visible(config, context - 1)
    assert roofline.forward_flops(config, context) == expected


@pytest.mark.parametrize("config", [SCOUT, GUARD, ODD], ids=["scout", "guard", "odd"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 75])
def test_training_flops_are_three_forward_passes_averaged_over_positions(config, length):
    total = sum(roofline.forward_flops(config, n) for n in range(1, length + 1))
    assert roofline.training_flops(config, length) == 3 * total // length


def test_multiplied_weights_are_what_a_compiled_forward_pass_multiplies():
    """The compiler's own count for one token, which sees one key, agrees within 2 %."""
    config = dataclasses.replace(GUARD, num_layers=2, embed_dim=128, mlp_dim=256)
    model = abstract(config, scan=False)
    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    cost = jax.jit(lambda model, tokens: model(tokens)).lower(model, tokens).compile()
    assert cost.cost_analysis()["flops"] == pytest.approx(
        roofline.forward_flops(config, 1), rel=0.02
    )
