"""What devices send each other, read from the programs compiled for eight of them."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from test_meshes import QUICK, config_of, on

from l4jax import sharding
from l4jax.config import Layer
from l4jax.kernels import experts
from l4jax.kernels.attention import Where
from l4jax.models.attention import Attention, describe
from l4jax.models.llama4 import Llama
from l4jax.models.sequence import split
from l4jax.planning import counting, hlo
from l4jax.training import objectives, optimizers, trainer

ROWS, LENGTH = 8, 64


@pytest.fixture(autouse=True)
def _plain_experts(monkeypatch):
    """On CPU experts loop over as many blocks as they have rows; here only what is sent counts."""
    monkeypatch.setitem(experts._FASTEST, "cpu", "ragged")


class Program(NamedTuple):
    """A compiled program and the mesh that it is for."""

    text: str
    mesh: dict[str, int]


class Sent(NamedTuple):
    """A collective, the axes along which it joins devices, and how often it runs in a step.

    sizes: of its operands and results, in numbers. arrays: that it sends, of these.
    """

    kind: str
    axes: tuple[str, ...]
    times: float
    sizes: list[int]
    arrays: int


def sent(program):
    """Every collective that joins devices; those in rounds that are rarely needed run 0 times."""
    module, devices = hlo.Module(program.text), math.prod(program.mesh.values())
    runs = module.runs()
    for name, computation in module.computations.items():
        for x in computation.instructions.values():
            kind = x.opcode.removesuffix("-start")
            if kind == "collective-permute":
                groups = hlo.pairs(x.attributes)
            elif kind in ("all-gather", "all-reduce", "reduce-scatter", "all-to-all"):
                groups = [hlo.first_group(x.attributes, devices)]
            else:
                continue
            types = [*(computation.instructions[name].type for name in x.operands), x.type]
            sizes = [math.prod(shape.dims) for one in types for shape in hlo.shapes(one)]
            times = runs[name].times if name in runs else 0.0
            # An exchange has an operand for each device, the others one for each array.
            arrays = 1 if kind == "all-to-all" else len(x.operands)
            if axes := hlo.axes_of(groups, program.mesh):
                yield Sent(kind, axes, times, sizes, arrays)


def compiled(lowered):
    mesh = dict(jax.sharding.get_mesh().shape)
    return Program(lowered.compile(compiler_options=QUICK).as_text(), mesh)


def abstract(module):
    """A module's structure and what its arrays would be, where they would lie."""
    graph, state = nnx.split(module)
    places = sharding.shardings(state)
    return graph, jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, places
    )


def step(config, axes, length=LENGTH):
    """The training step of a model that has no arrays."""
    with on(axes):
        model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
        objective, rule = objectives.next_token(balance=0.01), optimizers.adamw(lambda _: 0.1)
        update = trainer.Update(model, objective, rule)
        place = trainer.batch_sharding(ROWS, length)
        batch = {"tokens": jax.ShapeDtypeStruct((ROWS, length), np.int32, sharding=place)}
        return compiled(trainer.compiled(update).lower(update.abstract(), batch))


# --- Training steps ------------------------------------------------------------------------------
PROGRAMS = [
    ("llama4-scout", {"fsdp": 2, "expert": 2, "context": 2}),
    ("llama4-scout", {"data": 2, "expert": 2, "tensor": 2}),
    ("llama4-maverick", {"fsdp": 2, "expert": 4}),
    ("llama4-maverick", {"expert": 2, "context": 2, "tensor": 2}),
    ("llama3.1-8b", {"data": 2, "fsdp": 4}),
    ("llama3.1-8b", {"fsdp": 2, "context": 2, "tensor": 2}),
]


def test_every_collective_of_a_training_step_is_known(golden):
    """Arrays sent in a step, by kind and axes; how many share one message is the compiler's."""
    lines = []
    for name, axes in PROGRAMS:
        program, found = step(config_of(name), axes), collections.Counter()
        for x in sent(program):
            found[x.kind, "+".join(x.axes)] += int(x.times * x.arrays)
        lines += [f"{name} {' '.join(f'{axis}={n}' for axis, n in axes.items())}"]
        lines += [f"  {kind} {along}: {n}" for (kind, along), n in sorted(found.items()) if n]
        # One loop forward and one backward for each routed layer of the period; no other loop
        # depends on data.
        counts = counting.count(*program)
        routed = sum(layer.ffn == "moe" for layer in config_of(name).pattern)
        assert counts.idle_loops == (2 * routed if "expert" in axes else 0)
        assert counts.open_loops == ()
    golden("collectives.txt", "\n".join(lines) + "\n")


def test_expert_weights_never_travel_between_experts():
    """Of all widths only the experts' is a multiple of 7, so that it shows in an array's size."""
    config = config_of("llama4-scout")
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, mlp_dim=112))
    found = list(sent(step(config, {"fsdp": 2, "expert": 2, "context": 2})))
    weights = {(x.kind, x.axes) for x in found if any(size % 7 == 0 for size in x.sizes)}
    kinds = "all-gather", "reduce-scatter"
    assert weights == {(kind, (axis,)) for kind in kinds for axis in ("fsdp", "context")}
    assert any(x.kind == "all-to-all" and x.axes == ("expert",) for x in found)
    assert any(x.kind == "all-to-all" and not x.times for x in found)


# --- Decoding ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "axes", "rules"),
    [
        ("llama4-scout", {"fsdp": 4, "tensor": 2}, sharding.SERVING),
        ("llama4-scout", {"fsdp": 2, "expert": 2, "context": 2}, sharding.TRAINING),
        ("llama4-maverick", {"fsdp": 2, "expert": 2, "tensor": 2}, sharding.SERVING),
        ("llama3.1-8b", {"data": 2, "fsdp": 4}, sharding.SERVING),
        ("llama3.1-8b", {"data": 8}, sharding.SERVING),
    ],
)
def test_decoding_sends_tokens_and_never_weights(name, axes, rules):
    """All but the router's, which is small, are more than anything made of eight tokens."""
    config, rows = config_of(name), 8
    with on(axes, rules):
        model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
        graph, state = abstract(model)
        cache = jax.eval_shape(lambda: model.empty_cache(rows, 64))
        tokens = jax.ShapeDtypeStruct((rows, 1), np.int32)

        def decode(state, tokens, cache):
            model = nnx.merge(graph, state)
            x, cache = model.extend(tokens, cache)
            return model.logits(x), cache

        program = compiled(jax.jit(decode).lower(state, tokens, cache))
    # Sums over shards, of some shards' tokens or of all; shards along context have the same ones.
    data, tensor, d = axes.get("data", 1), axes.get("tensor", 1), config.embed_dim
    hidden = max(config.mlp_dim, config.moe.mlp_dim if config.moe else 0)
    met = rows // data * axes.get("context", 1)
    sums = {met * config.vocab_size // tensor, met * hidden // tensor}
    router = {d * config.moe.num_experts} if config.moe else set()
    sizes = {size for x in sent(program) if x.times for size in x.sizes} - router
    assert sizes or data == 8
    assert max(sizes, default=0) <= max(sums) < d * config.vocab_size // tensor
    others = sizes - {n // parts for n in sums for parts in (1, 2, 4, 8)}
    kv = config.attention.num_kv_heads * config.attention.head_dim
    assert max(others, default=0) < d * kv // tensor


@pytest.mark.parametrize("types", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_weights_travel_in_the_narrower_of_their_own_type_and_the_products(types):
    """Also those that are gathered side by side; read before CPUs widen what they send."""
    stored, computed = types
    config = config_of("llama4-scout")
    with on({"fsdp": 4}):
        layer = nnx.eval_shape(lambda: Attention(config, "global", rngs=nnx.Rngs(0)))
        graph, state = abstract(layer)
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, stored), state)
        row = PartitionSpec("fsdp")

        def shard(state, x, positions):
            return nnx.merge(graph, state)(x, describe(config, positions))[0]

        run = sharding.per_shard(shard, (sharding.specs(state), row, row), row)
        x = jax.ShapeDtypeStruct((4, LENGTH, config.embed_dim), computed)
        positions = jax.ShapeDtypeStruct((4, LENGTH), jnp.int32)
        text = jax.jit(run).lower(state, x, positions).as_text()
    # One gather of queries, keys and values, one of the output's weight.
    assert re.findall(r"stablehlo.all_gather.*x(\w+)>\n?$", text, re.M) == ["bf16", "bf16"]


# --- Chunked attention ---------------------------------------------------------------------------
def attention_program(kind, length, *, placed=False):
    """One layer's output and the gradient of its input, on each of four shards of the sequence."""
    config = config_of("llama4-scout")
    with on({"context": 4}, sharding.SERVING):
        cut = split(config, length)
        layer = nnx.eval_shape(lambda: Attention(config, kind, rngs=nnx.Rngs(0)))
        graph, state = abstract(layer)
        token = PartitionSpec(None, "context")

        def shard(state, x, positions):
            where = Where(positions, 0 * positions) if placed else None
            tokens = describe(config, positions, where, cut)
            return nnx.merge(graph, state)(x, tokens)[0]

        def run(state, x, positions):
            specs = (sharding.specs(state), token, token)
            f = sharding.per_shard(shard, specs, token)
            return jax.vjp(lambda x: f(state, x, positions), x)[1](x)

        place = jax.sharding.NamedSharding(jax.sharding.get_mesh(), token)
        x = jax.ShapeDtypeStruct((1, length, config.embed_dim), jnp.float32, sharding=place)
        positions = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=place)
        return cut, compiled(jax.jit(run).lower(state, x, positions))


@pytest.mark.parametrize(
    ("length", "balanced", "whole"),
    [(128, True, True), (64, False, True), (72, True, False), (36, False, False)],
)
def test_chunked_attention_sends_nothing_where_chunks_are_whole(length, balanced, whole):
    cut, program = attention_program("chunked", length)
    assert cut.balanced == balanced
    assert (cut.piece % 16 == 0) == whole
    assert {x.kind for x in sent(program)} == (set() if whole else {"all-gather", "reduce-scatter"})


def test_global_and_packed_attention_gather_keys_and_values():
    for kind, placed in (("global", False), ("chunked", True)):
        _, program = attention_program(kind, 128, placed=placed)
        assert {x.kind for x in sent(program)} == {"all-gather", "reduce-scatter"}


def test_chunked_layers_of_a_model_send_their_weights_only():
    """What two more of them add to a training step along context: parameters and gradients."""
    config, shards = config_of("llama3.1-8b"), 4
    attention = dataclasses.replace(config.attention, chunk_size=16)

    def wire(*kinds):
        pattern = tuple(Layer(kind, "dense") for kind in kinds)
        deep = dataclasses.replace(
            config, num_layers=len(kinds), pattern=pattern, attention=attention
        )
        program = step(deep, {"context": shards}, 128)
        return sum(c.times * c.wire for c in counting.count(*program).collectives)

    d, a = config.embed_dim, attention
    matrices = d * a.head_dim * (2 * a.num_heads + 2 * a.num_kv_heads) + 3 * d * config.mlp_dim
    # Each is gathered from every shard's part, and its gradient goes back in parts; norm scales
    # are whole everywhere, and their gradients are summed.
    layer = 4 * (2 * matrices + 2 * 2 * d) * (shards - 1) / shards
    few = wire("chunked", "global")
    more = wire("chunked", "chunked", "chunked", "global") - few
    # Beside them, the norm of all gradients takes a number or two from each parameter.
    assert 0 <= more - 2 * layer < 9 * 2 * 16
    keys_and_values = 4 * 2 * ROWS * 128 / shards * a.num_kv_heads * a.head_dim
    assert wire("chunked", "global", "global") - few - layer > 2 * (shards - 1) * keys_and_values
