"""Every mesh computes what one device does: losses, gradients, steps, routing, caches, tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from conftest import build
from flax import nnx
from jax.sharding import PartitionSpec

from l4jax import presets, sharding
from l4jax.config import Execution, MoE
from l4jax.inference import generate
from l4jax.kernels import cross_entropy
from l4jax.models import exchange
from l4jax.models.moe import Experts, Tiling
from l4jax.models.sequence import split
from l4jax.training import objectives, trainer
from l4jax.training.optimizers import adamw

ROWS, CHUNK, RATE = 8, 16, 0.01
BOUND = 4e-6
"""Of a difference, relative to the largest entry: 64 roundings of float32 (2^-24). Meshes only sum
in another order; of all gradients here the worst has been off by 26, where a layer's keys gather a
thousand tokens' parts, each of which has come through the layers above."""
# Nearly all of this file's time is compilation, and without these it takes a third less. Later
# versions no longer know the option.
QUICK = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else None
ALL = objectives.next_token(balance=0.5)
PLAIN = objectives.next_token()


@functools.cache
def config_of(name, kinds=2):
    """The tiny twin with two layers; the last two of Llama 4's period are of both its kinds."""
    config = presets.get(f"tiny-{name}").make()
    return dataclasses.replace(config, num_layers=2, pattern=config.pattern[-kinds:])


@functools.cache
def host(config):
    graph, state = nnx.split(build(config))
    return graph, jax.tree.map(np.asarray, state)


def placed(config, **execution):
    """A new model on the current mesh; new, as training uses its arrays up."""
    graph, state = host(config)
    state = jax.device_put(jax.tree.map(np.array, state), sharding.shardings(state))
    model = nnx.merge(graph, state)
    model.execution = Execution(**execution)
    return model


def on(axes, rules=sharding.TRAINING):
    """The mesh of these axes; one device without any."""
    return sharding.use(sharding.make_mesh(**axes), rules) if axes else contextlib.nullcontext()


@functools.partial(jax.jit, compiler_options=QUICK)
def outputs(model, tokens):
    return model.outputs(tokens)


def label(value):
    return "".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else None


def batch_of(length, packed, vocab=512):
    """Packed rows begin their segments anywhere, the first one late; most rows end in padding."""
    rng = np.random.default_rng(length)
    tokens = rng.integers(0, vocab, (ROWS, length), np.int32)
    if not packed:
        return {"tokens": tokens}
    segments = np.sort(rng.integers(1, 4, (ROWS, length)), axis=1)
    for row, end in enumerate(rng.integers(length // 3, length + 1, ROWS)):
        segments[row, end:] = 0
    changed = np.diff(segments, axis=1, prepend=-1) != 0
    index = np.arange(length)
    positions = index - np.maximum.accumulate(np.where(changed, index, 0), axis=1)
    positions[:3] += np.where(segments[:3] == 1, [[5], [37], [16]], 0)
    return {
        "tokens": tokens,
        "segment_ids": segments.astype(np.int32),
        "positions": positions.astype(np.int32),
    }


# --- Steps ---------------------------------------------------------------------------------------
class Step(NamedTuple):
    """What one update reports, its gradients, and the parameters after it."""

    metrics: dict
    gradients: Any
    params: Any


def step(config, batch, objective=ALL, accumulate=1, **execution):
    """One update with AdamW, whose first moment is then a tenth of the clipped gradient."""
    model, rule = placed(config, **execution), adamw(lambda _: RATE)
    update = trainer.Update(model, objective, rule, accumulate=accumulate)
    state = update.first(nnx.to_pure_dict(nnx.state(model)))
    if not jax.sharding.get_mesh().empty:
        batch = jax.device_put(batch, trainer.batch_sharding(*batch["tokens"].shape))
    state, metrics = jax.jit(update.__call__, compiler_options=QUICK)(state, batch)
    moment = optax.tree.get(state.optimizer, "mu")
    gradients = jax.tree.map(lambda x: 10 * np.asarray(x, np.float64), moment)
    return Step(jax.device_get(metrics), gradients, jax.tree.map(np.asarray, state.params))


@functools.cache
def alone(name, length, packed):
    return step(config_of(name), batch_of(length, packed))


def assert_same(found, expected):
    for name, value in expected.metrics.items():
        np.testing.assert_allclose(found.metrics[name], value, rtol=BOUND, err_msg=name)
    paths = jax.tree_util.tree_flatten_with_path(expected.gradients)[0]
    others = (jax.tree.leaves(t) for t in (found.gradients, found.params, expected.params))
    for (path, g), g2, p2, p in zip(paths, *others, strict=True):
        error = BOUND * np.abs(g).max()
        assert error > 0, path
        assert np.abs(g2 - g).max() <= error, (path, np.abs(g2 - g).max() / np.abs(g).max())
        # Adam's first step is g / (|g| + eps), which grows with g: the true one's neighbours bound
        # it, where g is mere rounding as well. Parameters of size 1 are rounded too.
        low, middle, high = (x / (np.abs(x) + 1e-8) for x in (g - error, g, g + error))
        room = RATE * np.maximum(high - middle, middle - low) + 1e-6
        assert np.all(np.abs(p2 - p) <= room), path


STEPS = [
    ("llama4-scout", {"expert": 4, "context": 2}, 64, False, "balanced whole"),
    ("llama4-scout", {"fsdp": 2, "context": 4}, 64, False, "contiguous whole"),
    ("llama4-scout", {"data": 2, "fsdp": 2, "tensor": 2}, 72, True, ""),
    ("llama4-scout", {"context": 4, "tensor": 2}, 72, True, "balanced cut"),
    ("llama4-scout", {"context": 8}, 72, True, "contiguous cut"),
    ("llama4-maverick", {"data": 2, "expert": 4}, 64, True, ""),
    ("llama4-maverick", {"expert": 2, "context": 2, "tensor": 2}, 64, True, "balanced whole"),
    ("llama4-maverick", {"expert": 8}, 72, False, ""),
    ("llama4-maverick", {"fsdp": 2, "expert": 2, "tensor": 2}, 72, False, ""),
    ("llama3.1-8b", {"data": 8}, 72, True, ""),
    ("llama3.1-8b", {"fsdp": 4, "tensor": 2}, 72, True, ""),
    ("llama3.1-8b", {"fsdp": 2, "context": 4}, 72, True, "balanced"),
    ("llama3.1-8b", {"context": 8}, 72, False, "contiguous"),
    ("llama3.1-8b", {"data": 2, "context": 2, "tensor": 2}, 72, False, "balanced"),
    ("llama3.2-1b", {"data": 2, "fsdp": 2, "context": 2}, 72, True, "balanced"),
    # So few tokens that they go to the weights; see `sharding.apart`.
    ("llama4-scout", {"fsdp": 2, "expert": 4}, 2, False, ""),
    ("llama4-maverick", {"fsdp": 2, "context": 2, "tensor": 2}, 4, False, "balanced cut"),
]


@pytest.mark.parametrize(("name", "axes", "length", "packed", "layout"), STEPS, ids=label)
def test_a_step_on_a_mesh_is_that_of_one_device(name, axes, length, packed, layout):
    """Loss, every gradient and every updated parameter."""
    expected = alone(name, length, packed)
    with on(axes):
        cut = split(config_of(name), length)
        if layout:
            kind, *chunks = layout.split()
            assert cut.balanced == (kind == "balanced")
            assert chunks in ([], ["whole" if cut.piece % CHUNK == 0 else "cut"])
        else:
            assert cut is None
        assert_same(step(config_of(name), batch_of(length, packed)), expected)


@functools.cache
def whole():
    """One step of two periods of one global, routed layer, and what it was made of."""
    config, batch = config_of("llama4-scout", 1), batch_of(40, packed=True)
    return config, batch, step(config, batch, PLAIN)


@pytest.mark.parametrize("remat", ["dots", "attention", "full", "offload"])
def test_gradients_do_not_depend_on_what_is_kept(remat):
    config, batch, expected = whole()
    with on({"expert": 2, "context": 2, "tensor": 2}):
        assert_same(step(config, batch, PLAIN, remat=remat), expected)


@pytest.mark.parametrize(
    ("axes", "pieces"),
    [({}, 2), ({"fsdp": 2, "expert": 2, "context": 2}, 2), ({"data": 2, "tensor": 2}, 4)],
    ids=label,
)
def test_pieces_of_a_batch_give_the_gradients_of_the_whole(axes, pieces):
    """Each piece counts another number of tokens."""
    config, batch, expected = whole()
    ends = np.diff(batch["segment_ids"], axis=1, append=0) != 0
    counted = ((batch["segment_ids"] > 0) & ~ends).sum(1)
    assert len({counted[i::pieces].sum() for i in range(pieces)}) == pieces
    with on(axes):
        found = step(config, batch, PLAIN, accumulate=pieces)
    # A mean of pieces' entropies is another number than the whole batch's, and balance likewise.
    names = {"loss", "count", "expert_load", "dropped", "grad_norm"}
    assert found.metrics.keys() >= names
    assert_same(found, expected._replace(metrics={n: expected.metrics[n] for n in names}))


# --- Experts -------------------------------------------------------------------------------------
WIDTH, EXPERTS, TOKENS = 16, 8, 24
FIRST, NONE = 5, 2
"""The expert that everything goes to first, and one that nothing reaches."""
CROWDED = [
    ({"expert": 8}, 8, None),
    ({"expert": 4, "context": 2}, 3, None),
    *(({"expert": 4, "tensor": 2}, 4, capacity) for capacity in (None, 1.0)),
    ({"fsdp": 2, "expert": 4}, 8, None),
    *(({"data": 2, "expert": 2, "context": 2}, 8, capacity) for capacity in (None, 1.0)),
]
"""With rows and capacity; 3 rows are whole on every shard of the expert axis."""


@functools.cache
def crowded(k, capacity, rows):
    """A layer, its input, and what it does on one device and by definition.

    Rows all go to FIRST, and, the last one, wherever each of its tokens wants but to NONE.
    """
    config = MoE(num_experts=EXPERTS, mlp_dim=24, shared_mlp_dim=8, experts_per_token=k)
    layer = Experts(WIDTH, config, rngs=nnx.Rngs(3))
    layer.router[...] = layer.router[...].at[0].set(0).at[0, FIRST].set(20).at[0, NONE].set(-20)
    x = np.random.default_rng(rows).standard_normal((rows, TOKENS, WIDTH), np.float32)
    x[..., 0] = 1
    x[-1, :, 0] = 0.1
    return layer, x, through(layer, x, capacity), by_loops(layer, x, capacity)


def through(layer, x, capacity=None):
    """Output, routing, and the gradients of a random projection of the output, anywhere."""
    rows, context = sharding.token_axes(*x.shape[:2])
    graph, state = nnx.split(layer)
    state = jax.device_put(jax.tree.map(np.array, state), sharding.shardings(state))
    token = PartitionSpec(rows or None, *context)

    def shard(state, x):
        return nnx.merge(graph, state)(x, Tiling(rows, context), capacity)

    def run(state, x):
        specs = (sharding.specs(state), token)
        y, routing = sharding.per_shard(shard, specs, (token, PartitionSpec()))(state, x)
        c = np.random.default_rng(0).standard_normal(x.shape, np.float32)
        return (y * c).sum() + routing.balance, (y, routing)

    grad = jax.grad(run, argnums=(0, 1), has_aux=True)
    gradients, (y, routing) = jax.jit(grad, compiler_options=QUICK)(state, x)
    return jax.tree.map(np.asarray, (y, routing, gradients))


def by_loops(layer, x, capacity=None):
    """The definition: output, and which assignments [b t k] go where, -1 for dropped."""
    w = jax.tree.map(lambda v: np.asarray(v, np.float64), nnx.to_pure_dict(nnx.state(layer)))
    k, (b, t, _) = layer.experts_per_token, x.shape
    fill = np.inf if capacity is None else math.ceil(capacity * t * k / EXPERTS)
    y, chosen = np.zeros(x.shape), np.full((b, t, k), -1)
    for row in range(b):
        had = np.zeros(EXPERTS, int)
        for i, token in enumerate(x[row].astype(np.float64)):
            logits = token @ w["router"]
            y[row, i] = reference._swiglu(w["shared"], token)
            for j, e in enumerate(np.argsort(-logits)[:k]):
                had[e] += 1
                if had[e] <= fill:
                    chosen[row, i, j] = e
                    one = {name: w[name][e] for name in ("gate", "up", "down")}
                    y[row, i] += reference._swiglu(one, token / (1 + np.exp(-logits[e])))
    return y, chosen


def rounds(chosen, axes):
    """Rounds that the most uneven pair of shards needs, in the layout of the current mesh."""
    rows, context = sharding.token_axes(*chosen.shape[:2])
    if "expert" not in rows:
        return 0
    sizes, n = jax.sharding.get_abstract_mesh().shape, axes["expert"]
    parts = math.prod(sizes[a] for a in rows), math.prod(sizes[a] for a in context)
    tiles = [
        tile.reshape(-1)
        for rows in np.split(chosen, parts[0])
        for tile in np.split(rows, parts[1], axis=1)
    ]
    most = max(np.bincount(tile[tile >= 0] // (EXPERTS // n), minlength=n).max() for tile in tiles)
    return -(-most // exchange._round_rows(tiles[0].size, n))


@pytest.fixture
def small_rounds(monkeypatch):
    """Rounds that hold half an even share, so that even routing needs two."""
    monkeypatch.setattr(exchange, "FEW", 1)
    monkeypatch.setattr(exchange, "SLACK", 0.5)


def assert_near(found, expected):
    found, expected = (map(np.asarray, jax.tree.leaves(x)) for x in (found, expected))
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other).max() <= BOUND * np.abs(other).max()


@pytest.mark.parametrize(("axes", "rows", "capacity"), CROWDED, ids=label)
@pytest.mark.usefixtures("small_rounds")
def test_uneven_routing_is_the_same_on_every_mesh(axes, rows, capacity):
    """Two experts a token: one is everybody's, one is nobody's."""
    layer, x, (y, routing, gradients), (expected, chosen) = crowded(2, capacity, rows)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert routing.dropped == (chosen < 0).sum()
    assert (routing.dropped > 0) == (capacity is not None)
    assert routing.load[FIRST] >= TOKENS * (rows - 1)
    assert routing.load[NONE] == 0
    assert not any(np.any(gradients[0][name][...][NONE]) for name in ("gate", "up", "down"))
    with on(axes):
        assert rounds(chosen, axes) >= (0 if rows == 3 else 1 if capacity else 3)
        assert_near(through(layer, x, capacity), (y, routing, gradients))


@pytest.mark.usefixtures("small_rounds")
def test_all_tokens_reach_one_expert_in_many_rounds(monkeypatch):
    layer, x, expected, (y, chosen) = crowded(1, None, 8)
    with on({"expert": 4}):
        assert rounds(chosen, {"expert": 4}) == 6
        found = through(layer, x)
        assert_near(found, expected)
        # After the first round alone, tokens that wait for another one have nothing yet.
        monkeypatch.setattr(exchange, "_further", lambda trip, start, step: start)
        waiting = np.abs(through(layer, x)[0] - y).max(-1) > 0.01
    assert 8 * TOKENS / 2 < waiting.sum() < 8 * TOKENS


@pytest.mark.parametrize(
    ("axes", "length"),
    [({"fsdp": 2, "expert": 4}, 40), ({"context": 2, "tensor": 2}, 40), ({"context": 2}, 34)],
    ids=label,
)
def test_capacity_drops_the_same_tokens_on_every_mesh(axes, length):
    """The later ones of a row, also where each shard has tokens from both of its ends."""
    config, tokens = config_of("llama4-scout", 1), batch_of(length, packed=False)["tokens"]
    expected = outputs(placed(config, capacity=1.0), tokens)
    with on(axes):
        cut = split(config, length)
        assert cut is None or cut.balanced == (length == 40)
        found = outputs(placed(config, capacity=1.0), tokens)
    assert np.all(expected.routing.dropped > 0)
    np.testing.assert_array_equal(found.routing.dropped, expected.routing.dropped)
    assert_near(found.logits, expected.logits)


# --- Caches --------------------------------------------------------------------------------------
WIDTHS = 40, 1, 19, 1
COUNTS = [(33, 1, 15, 1), (5, 0, 19, 1), (40, 1, 0, 1), (16, 1, 19, 0)]
"""Tokens of each row in each piece: over several chunks, to a border, and some add nothing."""
RULES = {"serving": sharding.SERVING, "training": sharding.TRAINING}
CACHED = [
    ("llama4-scout", {"fsdp": 2, "expert": 2, "context": 2}, "training", 4, 80, True),
    ("llama4-scout", {"context": 4, "tensor": 2}, "serving", 3, 80, True),
    ("llama4-maverick", {"data": 2, "expert": 4}, "serving", 1, 80, False),
    ("llama4-maverick", {"context": 4, "fsdp": 2}, "training", 2, 70, False),
    ("llama3.2-1b", {"context": 2, "fsdp": 2, "tensor": 2}, "serving", 3, 80, True),
]


@functools.cache
def hidden_alone(name):
    tokens = np.random.default_rng(5).integers(0, 512, (4, 64), np.int32)
    run = jax.jit(lambda model, tokens: model.hidden(tokens)[0], compiler_options=QUICK)
    return tokens, np.asarray(run(placed(config_of(name)), tokens))


@pytest.mark.parametrize(("name", "axes", "rules", "rows", "context", "cut"), CACHED, ids=label)
def test_a_cache_on_a_mesh_gives_the_hidden_states_of_one_device(
    name, axes, rules, rows, context, cut
):
    """Of one pass over the whole rows, without a cache."""
    tokens, expected = hidden_alone(name)
    lengths, cache = np.zeros(rows, int), None
    with on(axes, RULES[rules]):
        model = placed(config_of(name))
        fill = jax.jit(
            lambda model, *args: model.prefill(*args, context=context), compiler_options=QUICK
        )
        extend = jax.jit(type(model).extend, donate_argnums=2, compiler_options=QUICK)
        for width, counts in zip(WIDTHS, np.array(COUNTS, np.int32).T[:, :rows], strict=True):
            piece = np.full((rows, width), 9, np.int32)
            for row, n in enumerate(counts):
                piece[row, :n] = tokens[row, lengths[row] : lengths[row] + n]
            if cache is None:
                found, cache = fill(model, piece, counts)
                slots = cache.layers[-1].k
                shards = axes.get("context", 1) if cut else 1
                assert slots.addressable_shards[0].data.shape[2] == context // shards
            else:
                found, cache = extend(model, piece, cache, counts)
            for row, n in enumerate(counts):
                right = expected[row, lengths[row] : lengths[row] + n]
                if n:
                    assert np.abs(found[row, :n] - right).max() < BOUND * np.abs(expected).max()
            lengths += counts
    np.testing.assert_array_equal(cache.lengths, lengths)


PROMPTS = [[7, 1, 2, 3, 400], [9] * 14 + [8], list(range(100, 137))]


@pytest.mark.parametrize(
    ("name", "axes", "rules", "rows"),
    [
        ("llama4-scout", {"fsdp": 2, "context": 4}, "training", 3),
        ("llama4-maverick", {"expert": 4, "tensor": 2}, "serving", 1),
    ],
    ids=label,
)
def test_generated_tokens_are_those_of_one_device(name, axes, rules, rows):
    """Each is the most likely one after a full pass over those before it."""
    model, prompts = placed(config_of(name)), PROMPTS[-rows:]
    with on(axes, RULES[rules]):
        found = generate(placed(config_of(name)), prompts, max_new_tokens=20).tokens
    tokens = np.zeros((rows, 57), np.int32)
    for row, prompt, new in zip(tokens, prompts, found, strict=True):
        row[: len(prompt) + 20] = prompt + new
    best = np.asarray(outputs(model, tokens).logits).argmax(-1)
    for row, prompt, new in zip(best, prompts, found, strict=True):
        assert row[len(prompt) - 1 :][:20].tolist() == new
        assert len(set(new)) > 5


# --- The loss ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("axes", "tied"),
    [({}, False), ({"tensor": 4}, False), ({"fsdp": 2, "tensor": 4}, True)],
    ids=label,
)
def test_cross_entropy_in_pieces_is_that_of_plain_logits(axes, tied, monkeypatch):
    """37 tokens in pieces of 8 or more; several weigh nothing, and their labels are no ids."""
    monkeypatch.setattr(cross_entropy, "PIECE_BYTES", 4 * 64 * 8)
    rng = np.random.default_rng(0)
    d, v, m = 16, 64, 37
    x = rng.standard_normal((m, d), np.float32)
    table = rng.standard_normal((v, d) if tied else (d, v), np.float32)
    labels = rng.integers(0, v, m, np.int32)
    weights = np.where(rng.random(m) < 0.3, 0, rng.random(m)).astype(np.float32)
    assert 5 < (weights == 0).sum() < 20

    def plain(x, table):
        logits = x @ (table.T if tied else table)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (weights * losses).sum()

    def part(x, table, labels):
        table = sharding.gather(table, 1 if tied else 0, "fsdp")
        head = table.T if tied else table
        return cross_entropy.linear_cross_entropy(x, head, labels, jnp.asarray(weights))[0]

    expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(x, table)
    with on(axes):
        whole = PartitionSpec()
        cut = PartitionSpec("tensor", "fsdp") if tied else PartitionSpec("fsdp", "tensor")
        run = sharding.per_shard(part, (whole, cut if axes else whole, whole), whole)
        aimless = np.where(weights == 0, -1, labels)
        found = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(x, table, aimless)
    assert_near(found, expected)
