"""Behaviour of the decoder, of every family's tiny twin: definition, isolation, caches, meshes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import LENGTH, ROWS, build, forward, outputs
from flax import nnx
from jax.sharding import PartitionSpec

TOLERANCE = 2e-5
"""Of logits, relative to their standard deviation: float32 rounding over up to eight layers."""
CHUNK = 16
DISTINCT = ("llama4-scout", "llama4-maverick", "llama-guard-4", "llama3.2-1b")
"""Families that differ in more than RoPE's numbers, for tests that compile much."""


def assert_close(found, expected, tolerance=TOLERANCE):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    np.testing.assert_array_less(np.abs(found - expected).max(), tolerance * expected.std())


def altered(model, **changes):
    """A model with the same parameters that computes otherwise."""
    new = jax.tree.map(lambda x: x, model)
    new.execution = dataclasses.replace(model.execution, **changes)
    return new


@functools.cache
def scout_like(**changes):
    """Two kinds of Scout's layers, one routed, twice; `changes` to its configuration or its moe."""
    from l4jax import presets
    from l4jax.config import Layer

    config = presets.get("tiny-llama4-scout").make()
    moe = {k: changes.pop(k) for k in ("num_experts", "experts_per_token") if k in changes}
    pattern = Layer("chunked", "moe"), Layer("global", "dense")
    changes = {"pattern": pattern, "num_layers": 4} | changes
    return build(dataclasses.replace(config, moe=dataclasses.replace(config.moe, **moe), **changes))


# The definition


def test_logits_equal_the_definition(twin):
    tokens = twin.tokens()
    expected = reference.forward(reference.weights_of(twin.model), twin.config, tokens)
    assert expected.std() > 0.9
    assert_close(twin.forward(twin.model, tokens), expected)


def placed_rows():
    """Positions and segments: started late, padded on the left, packed, packed and started late."""
    index = np.arange(LENGTH, dtype=np.int32)
    second, third = index >= 7, index >= 37
    packed = np.where(third, index - 37, np.where(second, index - 7, index))
    late = np.where(third, index - 37 + 5, index + 37)
    positions = np.stack([index + 37, index - 10, packed, late])
    segments = np.stack([0 * index, 0 * index, 1 + second + third, 0 + third])
    return positions.astype(np.int32), segments.astype(np.int32)


def test_placed_rows_equal_the_definition(twin):
    """Explicit positions cross chunks elsewhere, and padding on the left changes no real token."""
    tokens, (positions, segments) = twin.tokens(), placed_rows()
    found = twin.forward(twin.model, tokens, positions, segments)
    weights = reference.weights_of(twin.model)
    expected = reference.forward(weights, twin.config, tokens, positions, segments)
    real = positions >= 0
    assert_close(found[real], expected[real])


def test_left_padding_leaves_a_row_as_it_is_alone(twin):
    tokens, (positions, segments) = twin.tokens(), placed_rows()
    padded = twin.forward(twin.model, tokens, positions, segments)[1, 10:]
    alone = np.pad(tokens[:, 10:], ((0, 0), (0, 10)))
    assert_close(padded, twin.forward(twin.model, alone)[1, : LENGTH - 10])


def test_packed_segments_equal_separate_rows(twin):
    tokens = twin.tokens()
    _, segments = placed_rows()
    packed = forward(twin.model, tokens, None, segments)
    borders = np.flatnonzero(np.diff(segments[2])) + 1
    assert len(borders) == 2
    for start, end in zip([0, *borders], [*borders, LENGTH], strict=True):
        alone = np.pad(tokens[:, start:end], ((0, 0), (0, LENGTH - end + start)))
        assert_close(packed[2, start:end], twin.forward(twin.model, alone)[2, : end - start])


@pytest.mark.parametrize("name", ["llama4-scout", "llama4-maverick"])
def test_ten_million_positions_away_logits_still_equal_the_definition(name, twin_of):
    """Angles are taken inside the chunk: absolute ones would be off by half a radian in float32."""
    twin = twin_of(name)
    tokens = twin.tokens()
    positions = np.broadcast_to(10_485_683 + np.arange(LENGTH, dtype=np.int32), tokens.shape)
    weights = reference.weights_of(twin.model)
    expected = reference.forward(weights, twin.config, tokens, positions)
    assert_close(twin.forward(twin.model, tokens, positions, 0 * tokens), expected)


@pytest.mark.parametrize("layers", [1, 5])
def test_a_depth_that_the_period_does_not_divide_equals_the_definition(layers):
    model = scout_like(num_layers=layers)
    tokens = np.random.default_rng(1).integers(0, 512, (2, 40))
    assert (model.periods, len(model.tail)) == divmod(layers, 2)
    expected = reference.forward(reference.weights_of(model), model.config, tokens)
    assert_close(forward(model, tokens), expected)
    assert outputs(model, tokens).routing.load.shape == ((layers + 1) // 2, 4)


def test_two_experts_per_token_equal_the_definition():
    model = scout_like(num_experts=5, experts_per_token=2)
    tokens = np.random.default_rng(1).integers(0, 512, (2, 40))
    expected = reference.forward(reference.weights_of(model), model.config, tokens)
    assert_close(forward(model, tokens), expected)


def test_one_token_is_enough(twin):
    tokens = twin.tokens()
    expected = twin.forward(twin.model, tokens)[:1, :1]
    assert_close(twin.forward(twin.model, tokens[:1, :1]), expected)


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (0, 1.0),
        (8190, 1.0),
        (8191, 1.0693),
        (16382, 1.0693),
        (16383, 1.1099),
        (65535, 1.2197),
        (131071, 1.2833),
        (262143, 1.3497),
        (1048575, 1.4860),
        (10485759, 1.7155),
        (-5000, 1.0),
    ],
)
def test_temperature_steps_where_the_published_values_do(position, expected):
    from l4jax.config import Temperature
    from l4jax.models.attention import temperature

    found = temperature(Temperature(), jnp.array([[position]]))[0, 0]
    assert found == 1.0 if expected == 1.0 else abs(found - expected) < 5e-5


@pytest.mark.parametrize(
    ("preset", "kept", "blended", "factor"),
    [("llama4-scout", 35, 0, 16), ("llama3.1-8b", 29, 6, 8), ("llama3-8b", 64, 0, 1)],
)
def test_rope_frequencies_are_kept_blended_and_stretched(preset, kept, blended, factor):
    from l4jax import presets
    from l4jax.models.layers import rope_frequencies

    attention = presets.get(preset).make().attention
    found = rope_frequencies(attention.rope, attention.head_dim)
    np.testing.assert_allclose(
        found, reference.frequencies(attention.rope, attention.head_dim), rtol=1e-6
    )
    ratio = attention.rope.theta ** (-np.arange(64) / 64) / found
    np.testing.assert_allclose(ratio[:kept], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[kept + blended :], factor, rtol=1e-6)
    assert np.all(np.diff(ratio[kept - 1 : kept + blended]) > 0)


# Who sees whom


def test_no_token_changes_what_comes_before_it(twin):
    base = np.broadcast_to(twin.tokens()[:1], (ROWS, LENGTH))
    expected = twin.forward(twin.model, base)
    for places in ((0, 1, CHUNK - 1, CHUNK), (CHUNK + 1, 40, 2 * CHUNK, LENGTH - 1)):
        changed = base.copy()
        for row, place in enumerate(places):
            changed[row, place] = (changed[row, place] + 1) % twin.config.vocab_size
        found = twin.forward(twin.model, changed)
        for row, place in enumerate(places):
            np.testing.assert_allclose(found[row, :place], expected[row, :place], atol=1e-5)
            assert np.abs(found[row, place] - expected[row, place]).max() > 0.1


def test_chunked_layers_keep_chunks_apart_and_global_layers_join_them(twin_of):
    from l4jax.config import Layer

    chunked = scout_like(num_layers=2, pattern=(Layer("chunked", "dense"),))
    tokens = twin_of("llama4-scout").tokens(shape=(2, LENGTH))
    tokens[1] = tokens[0]
    tokens[1, CHUNK + 3] += 1
    apart = forward(chunked, tokens)
    other = np.r_[0 : CHUNK + 3, 2 * CHUNK : LENGTH]
    np.testing.assert_allclose(apart[0, other], apart[1, other], atol=1e-6)
    assert np.abs(apart[0] - apart[1])[CHUNK + 3 : 2 * CHUNK].max(-1).min() > 1e-3
    joined = forward(twin_of("llama4-scout").model, tokens)
    assert np.abs(joined[0] - joined[1])[2 * CHUNK :].max(-1).min() > 1e-3


# Experts


def test_the_order_of_experts_changes_nothing():
    model = scout_like(num_experts=5, experts_per_token=2)
    tokens = np.random.default_rng(1).integers(0, 512, (2, 40))
    order = jnp.array([3, 0, 4, 2, 1])
    shuffled = jax.tree.map(lambda x: x, model)
    for block in shuffled.layers[:1]:
        block.ffn.router = nnx.Param(block.ffn.router[...][:, :, order], axes=("embed", "router"))
        for name in ("gate", "up", "down"):
            weight = getattr(block.ffn, name)
            weight[...] = weight[...][:, order]
    found, expected = (outputs(m, tokens) for m in (shuffled, model))
    assert_close(found.logits, expected.logits)
    np.testing.assert_array_equal(found.routing.load, expected.routing.load[:, order])
    assert_close(found.routing.entropy, expected.routing.entropy)


def test_an_expert_without_tokens_is_harmless():
    """A tie goes to the expert that comes first, so a copied router column is never chosen."""
    model = jax.tree.map(lambda x: x, scout_like())
    for block in model.layers[:1]:
        router = block.ffn.router
        router[...] = router[...].at[:, :, 2].set(router[...][:, :, 0])
    tokens = np.random.default_rng(1).integers(0, 512, (2, 40))
    found = outputs(model, tokens)
    assert np.all(np.asarray(found.routing.load)[:, 2] == 0)
    assert np.all(np.asarray(found.routing.load).sum(1) == 80)
    expected = reference.forward(reference.weights_of(model), model.config, tokens)
    assert_close(found.logits, expected)
    _, gradients = value_and_gradients(model, tokens)
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all()
    assert not np.any(gradients["layers"][0]["ffn"]["gate"][:, 2])


# Gradients and ways of computing


@functools.partial(jax.jit, static_argnums=0)
def _gradients(graph, state, tokens):
    def loss(state):
        outputs = nnx.merge(graph, state).outputs(tokens)
        logs = jax.nn.log_softmax(outputs.logits[:, :-1])
        balance = 0 if outputs.routing is None else outputs.routing.balance.mean()
        picked = jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1)
        return -picked.mean() + 0.01 * balance

    return jax.value_and_grad(loss)(state)


def value_and_gradients(model, tokens):
    graph, state = nnx.split(model)
    value, gradients = _gradients(graph, state, tokens)
    return float(value), jax.tree.map(np.asarray, nnx.to_pure_dict(gradients))


@pytest.mark.parametrize("name", DISTINCT)
def test_every_parameter_of_every_layer_learns(name, twin_of):
    twin = twin_of(name)
    tokens = twin.tokens()
    loss, gradients = value_and_gradients(twin.model, tokens)
    assert np.isfinite(loss)
    assert loss > 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
        layers = leaf if "layers" in str(path[0]) else leaf[None]
        assert all(np.abs(layer).max() > 1e-7 for layer in layers), path
    used = np.unique(tokens[:, :-1])
    assert np.all(np.abs(gradients["embed"][used]).max(1) > 0)


@pytest.mark.slow
def test_gradients_equal_finite_differences():
    """Along one random direction of all parameters; with one expert, so that no choice can jump."""
    model = scout_like(num_experts=1)
    tokens = np.random.default_rng(1).integers(0, 512, (2, 40))
    graph, state = nnx.split(model)
    _, gradients = _gradients(graph, state, tokens)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    steps = [jax.random.normal(k, x.shape) * x.std() for k, x in zip(keys, leaves, strict=True)]
    slope = sum(
        float(jnp.vdot(g, s)) for g, s in zip(jax.tree.leaves(gradients), steps, strict=True)
    )

    def at(size):
        moved = [x + size * s for x, s in zip(leaves, steps, strict=True)]
        return float(_gradients(graph, jax.tree.unflatten(tree, moved), tokens)[0])

    size = 3e-4
    assert abs((at(size) - at(-size)) / (2 * size) - slope) < 0.02 * abs(slope) + 0.01


@pytest.mark.parametrize("name", DISTINCT)
def test_bfloat16_gives_nearly_the_same_distribution(name, twin_of):
    """By divergence, not by maximum: rounding may send a token to another expert."""
    twin = twin_of(name)
    tokens = twin.tokens()
    exact = jax.nn.log_softmax(twin.forward(twin.model, tokens))
    half = twin.forward(altered(twin.model, dtype="bfloat16"), tokens)
    assert half.dtype == np.float32
    divergence = (np.exp(exact) * (exact - jax.nn.log_softmax(half))).sum(-1)
    assert 0 < divergence.mean() < 2e-2


@pytest.mark.parametrize("name", ["llama4-scout", "llama4-maverick", "llama3.2-1b"])
def test_unrolled_layers_compute_the_same(name, twin_of):
    from l4jax.config import Execution
    from l4jax.inference.decoding import unrolled
    from l4jax.models.llama4 import Llama

    twin = twin_of(name)
    tokens = twin.tokens()
    flat = unrolled(twin.model)
    assert_close(twin.forward(flat, tokens), twin.forward(twin.model, tokens))
    made = nnx.eval_shape(
        lambda: Llama(twin.config, execution=Execution(scan=False), rngs=nnx.Rngs(0))
    )
    assert jax.tree.structure(nnx.state(made)) == jax.tree.structure(nnx.state(flat))


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialization_changes_no_gradient(remat):
    model = scout_like()
    tokens = np.random.default_rng(1).integers(0, 512, (2, 40))
    loss, expected = value_and_gradients(model, tokens)
    again, found = value_and_gradients(altered(model, remat=remat), tokens)
    assert abs(again - loss) < 1e-6
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), found, expected)


# Caches


@functools.partial(jax.jit, static_argnames="context")
def _prefill(model, tokens, counts, context):
    hidden, cache = model.prefill(tokens, counts, context=context)
    return model.logits(hidden), cache


@jax.jit
def _extend(model, tokens, cache, counts):
    hidden, cache = model.extend(tokens, cache, counts)
    return model.logits(hidden), cache


def run_pieces(model, tokens, widths, counts, context):
    """Yields each call's logits, the rows' lengths before it, its counts, and the new cache."""
    lengths, cache = np.zeros(len(tokens), np.int64), None
    for width, count in zip(widths, counts, strict=True):
        piece = np.full((len(tokens), width), 11, np.int32)
        for row, n in enumerate(count):
            piece[row, :n] = tokens[row, lengths[row] : lengths[row] + n]
        count = np.asarray(count, np.int32)
        if cache is None:
            logits, cache = _prefill(model, piece, count, context)
        else:
            logits, cache = _extend(model, piece, cache, count)
        yield np.asarray(logits), lengths.copy(), count, cache
        lengths += count
        np.testing.assert_array_equal(cache.lengths, lengths)


def check_pieces(model, tokens, expected, widths, counts, context=80):
    for logits, lengths, count, _ in run_pieces(model, tokens, widths, counts, context):
        for row, n in enumerate(count):
            if n:
                assert_close(logits[row, :n], expected[row, lengths[row] : lengths[row] + n])


@pytest.mark.parametrize("name", DISTINCT)
def test_prompt_then_single_tokens_equal_the_whole(name, twin_of):
    twin = twin_of(name)
    tokens = twin.tokens()
    counts = [(21, 5, 16, 15)] + [(1, 1, 1, 1)] * 40
    expected = twin.forward(twin.model, tokens)
    check_pieces(twin.model, tokens, expected, [21] + [1] * 40, counts)


@pytest.mark.parametrize("name", ["llama4-scout", "llama4-maverick", "llama3.1-8b"])
def test_pieces_of_any_size_and_rows_of_any_length_equal_the_whole(name, twin_of):
    """Pieces longer than a chunk, over two borders, with rows that pause or have not begun."""
    twin, tokens = twin_of(name), twin_of(name).tokens()
    counts = [
        (21, 5, 16, 0),
        (1, 1, 0, 1),
        (37, 20, 0, 37),
        (1, 0, 1, 1),
        (14, 3, 37, 16),
        (1, 1, 1, 1),
    ]
    expected = twin.forward(twin.model, tokens)
    check_pieces(twin.model, tokens, expected, (21, 1, 37, 1, 37, 1), counts)


def test_a_tail_and_unrolled_layers_have_caches_too():
    from l4jax.inference.decoding import unrolled

    model = scout_like(num_layers=5)
    tokens = np.random.default_rng(1).integers(0, 512, (2, 40))
    expected = forward(model, tokens)
    for one in (model, unrolled(model)):
        check_pieces(one, tokens, expected, (21, 1, 1, 17), [(21, 9), (1, 1), (1, 0), (17, 9)], 40)


def test_a_row_that_adds_nothing_keeps_its_cache_bit_for_bit(twin_of):
    twin = twin_of("llama4-scout")
    tokens = twin.tokens()
    counts = [(21, 5, 16, 0), (1, 0, 0, 1), (37, 0, 3, 0)]
    caches = [x[-1] for x in run_pieces(twin.model, tokens, (21, 1, 37), counts, 80)]
    for number in (1, 2):
        old, new = (jax.tree.leaves(caches[i].layers) for i in (number - 1, number))
        for row, n in enumerate(counts[number]):
            same = [np.array_equal(x[:, row], y[:, row]) for x, y in zip(old, new, strict=True)]
            assert set(same) == {n == 0}


def test_chunked_layers_cache_one_chunk_and_global_layers_the_context(twin_of):
    cache = twin_of("llama4-scout").model.empty_cache(3, 200)
    assert [layer.k.shape for layer in cache.layers] == [(2, 3, 16, 2, 16)] * 3 + [
        (2, 3, 200, 2, 16)
    ]
    short = twin_of("llama4-scout").model.empty_cache(3, 10)
    assert {layer.k.shape[2] for layer in short.layers} == {10}
    causal = twin_of("llama-guard-4").model.empty_cache(3, 200)
    assert {layer.v.shape[2] for layer in causal.layers} == {200}


# Meshes


def test_created_parameters_lie_where_the_rules_say():
    """And their values do not depend on the mesh."""
    from l4jax import sharding
    from l4jax.models.llama4 import Llama

    config = scout_like().config
    with sharding.use(sharding.make_mesh(fsdp=2, expert=2, tensor=2)):
        model = sharding.create(lambda: Llama(config, rngs=nnx.Rngs(7)))
    moe, attention = model.layers[0].ffn, model.layers[0].attention
    dense, routed = ("fsdp", "expert", "context"), ("fsdp", "context")
    for param, expected in [
        (model.embed, PartitionSpec("tensor", dense)),
        (model.head, PartitionSpec(dense, "tensor")),
        (model.norm.scale, PartitionSpec(None)),
        (moe.router, PartitionSpec(None, dense, None)),
        (moe.gate, PartitionSpec(None, "expert", routed, "tensor")),
        (moe.down, PartitionSpec(None, "expert", "tensor", routed)),
        (attention.q, PartitionSpec(None, dense, "tensor", None)),
        (attention.o, PartitionSpec(None, "tensor", None, dense)),
    ]:
        assert param[...].sharding.spec == expected
    assert moe.gate[...].addressable_shards[0].data.shape == (2, 2, 32, 48)
    plain = sharding.create(lambda: Llama(config, rngs=nnx.Rngs(7)))
    for one, two in zip(
        jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(plain)), strict=True
    ):
        np.testing.assert_allclose(one, two, rtol=1e-6)
