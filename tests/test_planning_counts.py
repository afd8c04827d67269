"""Counting whole programs, whose traffic and products arithmetic knows."""

from __future__ import annotations

import collections
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from l4jax import sharding
from l4jax.config import Attention, Execution, Layer, TextConfig
from l4jax.models import llama4
from l4jax.planning import chips, compiler, counting, hlo, meshes, programs

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, the compiler for TPUs: pip install 'l4jax[tpu]'",
)


def test_collectives_of_a_program_compiled_for_eight_devices():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def shard(x, w):
        def layer(x, w):
            return jnp.tanh(x @ jax.lax.all_gather(w, "a", tiled=True)), None

        x, _ = jax.lax.scan(layer, x, w)
        x = jax.lax.psum_scatter(x, "b", tiled=True)
        x = jax.lax.all_to_all(x, "a", 0, 1, tiled=True)
        return jax.lax.psum(x, ("a", "b"))

    step = jax.jit(
        jax.shard_map(
            shard, mesh=mesh, in_specs=(P("a"), P(None, "a")), out_specs=P(), check_vma=False
        )
    )
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P("a")))
    w = jax.ShapeDtypeStruct((5, 32, 32), jnp.float32, sharding=NamedSharding(mesh, P(None, "a")))
    found = counting.count(step.lower(x, w).compile().as_text(), dict(mesh.shape))
    assert found.wire_by_kind() == {
        "all-gather": 5 * 16 * 32 * 4,
        "reduce-scatter": 3 / 4 * 32 * 32 * 4,
        "all-reduce": 2 * 7 / 8 * 8 * 32 * 4,
        "all-to-all": 1 / 2 * 8 * 32 * 4,
    }
    assert found.product_flops == 5 * 2 * 32 * 32 * 32
    assert found.open_loops == ()


@pytest.fixture
def optimized():
    """Undoes the suite's quick compilation: the compiler for TPUs obeys it too."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


class Step:
    """A training step of a few dense layers, computed again in the backward pass."""

    layers, width, hidden, tokens = 3, 512, 1024, 4096

    def __init__(self, mesh):
        def place(*axes):
            return NamedSharding(mesh, P(*axes))

        shape = self.layers, self.width, self.hidden
        self.weights = [
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place(None, "fsdp")),
            jax.ShapeDtypeStruct(
                (shape[0], shape[2], shape[1]), jnp.float32, sharding=place(None, None, "fsdp")
            ),
        ]
        self.x = jax.ShapeDtypeStruct(
            (self.tokens, self.width), jnp.bfloat16, sharding=place("fsdp")
        )

    def lower(self):
        @jax.checkpoint
        def layer(x, weights):
            up, down = (w.astype(jnp.bfloat16) for w in weights)
            return x + jax.nn.silu(x @ up) @ down, None

        def step(weights, x):
            def loss(weights):
                return jnp.sum(jax.lax.scan(layer, x, weights)[0].astype(jnp.float32) ** 2)

            return jax.tree.map(lambda w, g: w - g, weights, jax.grad(loss)(weights))

        return jax.jit(step, donate_argnums=0).lower(self.weights, self.x)


@needs_libtpu
def test_what_is_compiled_for_a_tpu_stays_out_of_the_cache_of_programs(tmp_path, optimized):
    """A second compilation would find it there and could not read it."""
    wanted = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in wanted}
    mesh = Mesh(np.array(compiler.devices(chips.parse("v5p:2x2x1"))), ("fsdp",))
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        for _ in range(2):
            assert isinstance(compiler.compile(Step(mesh), mesh), compiler.Compiled)
            assert not list(tmp_path.iterdir())
        jax.jit(lambda x: x + 1).lower(1.0).compile()
        assert list(tmp_path.iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@needs_libtpu
def test_a_dense_step_compiled_for_a_tpu_has_the_products_that_arithmetic_says(optimized):
    """6·N·T and the first product again; nobody needs the second's result a second time."""
    mesh = Mesh(np.array(compiler.devices(chips.parse("v5p:2x2x1"))), ("fsdp",))
    found = compiler.compile(Step(mesh), mesh)
    assert isinstance(found, compiler.Compiled)
    counts = counting.count(found.text, {"fsdp": 4})
    product = 2 * (Step.tokens // 4) * Step.width * Step.hidden
    assert counts.product_flops == Step.layers * 7 * product
    weights = 2 * Step.layers * Step.width * Step.hidden
    once = 3 / 4 * 2 * weights
    by_kind = counts.wire_by_kind()
    assert by_kind.pop("all-gather") == 2 * once
    # The compiler reduces one of the two gradients to every device.
    assert once <= sum(by_kind.values()) <= 2 * once
    assert set(counts.wire_by_axes()) == {"fsdp"}
    assert counts.open_loops == ()
    assert found.memory.arguments == pytest.approx(
        (weights + Step.tokens * Step.width * 2 / 4) / 2**30, rel=0.02
    )
    assert found.memory.arguments < found.memory.peak < 1
    assert found.cpu_seconds > 0


@needs_libtpu
def test_what_many_products_or_layers_read_is_formed_once(optimized):
    """XLA would form norms again in each product, and RoPE's tables in the loop over the layers."""
    config = TextConfig(
        num_layers=6,
        embed_dim=512,
        vocab_size=1024,
        mlp_dim=768,
        max_context=4096,
        attention=Attention(num_heads=4, num_kv_heads=2, head_dim=128, chunk_size=512),
        pattern=(Layer("chunked", "dense"), Layer("global", "dense")),
    )
    devices = compiler.devices(chips.parse("v5p:2x2x1"))
    mesh = sharding.make_mesh(devices, **meshes.parse("fsdp=4"))
    asked = meshes.Work(task="prefill", batch=4, length=1000)
    execution = Execution(dtype="bfloat16")
    found = compiler.compile(programs.program(config, asked, execution=execution, mesh=mesh), mesh)
    assert isinstance(found, compiler.Compiled)
    module = hlo.Module(found.text)
    formed = collections.Counter()
    for name, (times, _) in module.runs().items():
        for x in module.computations[name].instructions.values():
            formed["tables"] += times * (x.opcode == "cosine")
            formed["products"] += times * (x.opcode in ("convolution", "dot"))
            if x.opcode == "multiply":
                wide = hlo.shapes(x.type)[0].dims[-2:] == (asked.length, config.embed_dim)
                formed["norms"] += times * wide
    assert formed["tables"] == 1
    # One for queries, keys and values, one after attention and three of SwiGLU; and the logits'.
    assert formed["products"] == 5 * config.num_layers + 1
    # Each norm of a layer squares its input, divides it by the root and scales it.
    assert formed["norms"] == 3 * 2 * config.num_layers


@needs_libtpu
def test_embedding_rows_and_their_gradients_are_not_laid_out_anew_to_be_sent(optimized):
    devices = compiler.devices(chips.parse("v5p:2x2x1"))
    mesh = sharding.make_mesh(devices, **meshes.parse("fsdp=4"))
    v, d, table, rows = 1024, 512, P(None, "fsdp"), P("fsdp")

    class Gradient:
        def lower(self):
            def loss(part, ids, weights):
                param = nnx.Param(part, axes=("vocab", "embed"))
                return (llama4.lookup(param, ids, v, "bfloat16") * weights).sum()

            run = sharding.per_shard(jax.grad(loss), (table, rows, rows), table)
            return jax.jit(run).lower(
                *(
                    jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
                    for shape, dtype, spec in (
                        ((v, d), jnp.float32, table),
                        ((4, 1000), jnp.int32, rows),
                        ((4, 1000, d), jnp.bfloat16, rows),
                    )
                )
            )

    found = compiler.compile(Gradient(), mesh)
    assert isinstance(found, compiler.Compiled)
    module = hlo.Module(found.text)
    large = collections.Counter(
        x.opcode
        for name, (_, fused) in module.runs().items()
        for x in module.computations[name].instructions.values()
        if not fused and sum(s.bytes for s in hlo.shapes(x.type)) >= 1000 * d
    )
    assert large["all-to-all"] + large["all-to-all-start"] == 1
    # One that starts and ends apart brings an array into fast memory as it lies.
    assert large["reshape"] == large["copy"] == 0
