"""Meshes and their estimates, times from counts, the compiler's answers, measuring."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from l4jax import presets, roofline, sharding
from l4jax.config import Execution
from l4jax.planning import chips, compiler, counting, measuring, meshes, programs, timing

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, the compiler for TPUs: pip install 'l4jax[tpu]'",
)
SCOUT, MAVERICK, BEHEMOTH, DENSE = (
    presets.get(name).make()
    for name in ("llama4-scout", "llama4-maverick", "llama4-behemoth", "llama3.1-8b")
)
CUBE = chips.parse("v5p:4x4x4")


def work(task="train", batch=64, length=8192) -> meshes.Work:
    return meshes.Work(task=task, batch=batch, length=length)


# --- Meshes --------------------------------------------------------------------------------------
def test_a_mesh_is_read_and_shown():
    sizes = meshes.parse("fsdp=4, expert=16")
    assert sizes == {"data": 1, "fsdp": 4, "expert": 16, "context": 1, "tensor": 1}
    assert meshes.show(sizes) == "fsdp=4,expert=16"
    assert meshes.show(meshes.parse("data=1")) == "data=1"


@pytest.mark.parametrize("text", ["", "fsdp", "fsdp=0", "fsdp=x", "model=4", "fsdp=4;expert=2"])
def test_what_is_no_mesh_is_refused(text):
    with pytest.raises(ValueError, match="the axes are data, fsdp, expert, context, tensor"):
        meshes.parse(text)


@pytest.mark.parametrize(
    ("mesh", "job", "message"),
    [
        ("fsdp=4", work(), r"has 4 devices, but v5p:4x4x4 has 64; nearest meshes that do: "),
        ("expert=32,fsdp=2", work(), "expert=32 does not divide the model's 16 experts; near 32"),
        ("fsdp=4,tensor=16", work(), "tensor=16 does not divide the model's 40 heads"),
        ("fsdp=64", work(batch=48), "data × fsdp × expert = 64 must divide the batch of 48"),
        ("context=64", work("prefill", 1, 1000), "context=64 must divide the 1000 tokens"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused_with_the_nearest(mesh, job, message):
    with pytest.raises(ValueError, match=message):
        meshes.check(SCOUT, CUBE, job, meshes.parse(mesh))


def test_the_nearest_meshes_named_are_legal():
    with pytest.raises(ValueError, match="nearest") as caught:
        meshes.check(SCOUT, CUBE, work(), meshes.parse("fsdp=4,expert=32"))
    named = str(caught.value).rpartition(": ")[2].split("; ")
    assert len(named) == 3
    for text in named:
        meshes.check(SCOUT, CUBE, work(), meshes.parse(text))


def test_only_data_crosses_slices():
    two = chips.parse("v5p:2x2x1", slices=2)
    meshes.check(DENSE, two, work(batch=8), meshes.parse("data=2,fsdp=4"))
    with pytest.raises(ValueError, match="data=1 must be a multiple of the 2 slices"):
        meshes.check(DENSE, two, work(batch=8), meshes.parse("fsdp=8"))
    assert all(mesh["data"] % 2 == 0 for mesh in meshes.candidates(DENSE, two, work(batch=8)))


@pytest.mark.parametrize(
    ("config", "topology", "job", "mesh"),
    [
        (SCOUT, "v5p:4x4x4", work(), "fsdp=4,expert=16"),
        (MAVERICK, "v5p:4x4x8", work(batch=128), "expert=128"),
        (DENSE, "v5p:2x2x1", work(batch=4), "fsdp=4"),
        (SCOUT, "v6e:16x16", work(batch=256), "fsdp=16,expert=16"),
        (SCOUT, "v6e:4x4", work("decode", 16), "fsdp=2,tensor=8"),
        # A larger fsdp would hold copies of four rows.
        (SCOUT, "v5p:4x4x4", work("decode", 4, 2**20), "fsdp=4,context=2,tensor=8"),
        # Shards of a cache would all multiply the same rows.
        (DENSE, "v5p:4x8x8", work("decode", 256), "data=32,tensor=8"),
        # With fsdp=8,tensor=8 experts 2,784 wide would lie there twice, and not fit.
        (BEHEMOTH, "v5p:4x4x4", work("decode", 64), "fsdp=32,tensor=2"),
    ],
)
def test_the_recommended_mesh_is_the_one_that_arithmetic_prefers(config, topology, job, mesh):
    found = meshes.rank(config, chips.parse(topology), job)[0]
    assert meshes.show(found[0]) == mesh


def test_what_does_not_fit_is_ranked_last_and_smallest_first():
    host = chips.parse("v5p:2x2x1")
    ranked = meshes.rank(SCOUT, host, work(batch=4))
    sizes = [meshes.estimate(SCOUT, host, work(batch=4), *option).gib for option in ranked]
    assert min(sizes) > host.generation.hbm_gib
    assert sizes == pytest.approx(sorted(sizes), abs=1)


def test_the_estimate_holds_parameters_and_moments_where_sharding_puts_them():
    sizes = meshes.parse("fsdp=4,expert=16")
    held = meshes._memory(SCOUT, work(), sizes, "full")
    assert held.weights == 4 * roofline.parameters(SCOUT).total / 64
    assert held.optimizer == 2 * held.weights
    serving = meshes._memory(SCOUT, work("decode", 16), meshes.parse("expert=8,tensor=8"), "none")
    assert serving.cache == 2 * roofline.kv_bytes(SCOUT, 8192) / 8
    assert meshes._memory(SCOUT, work("distill"), sizes, "full") == held
    teaches = meshes._memory(SCOUT, work("teach"), sizes, "none")
    assert teaches[:3] == (held.weights / 2, 0, 0)


def test_keeping_more_takes_more_memory_and_less_time():
    gibs, seconds = zip(
        *(
            meshes.estimate(SCOUT, CUBE, work(), meshes.parse("fsdp=4,expert=16"), remat)
            for remat in ("dots", "attention", "full")
        ),
        strict=True,
    )
    assert list(gibs) == sorted(gibs, reverse=True)
    assert list(seconds) == sorted(seconds)


def test_ideal_operations_are_those_of_the_roofline():
    assert meshes.ideal_flops(SCOUT, work()) == 64 * 8192 * roofline.training_flops(SCOUT, 8192)
    assert meshes.ideal_flops(SCOUT, work("decode", 3)) == 3 * roofline.forward_flops(SCOUT, 8192)
    head = 6 * SCOUT.vocab_size * SCOUT.embed_dim * 64 * 8191
    assert meshes.ideal_flops(SCOUT, work("prefill")) * 3 == pytest.approx(
        meshes.ideal_flops(SCOUT, work()) - head
    )
    assert meshes.ideal_flops(SCOUT, work("teach")) * 3 == meshes.ideal_flops(SCOUT, work())


@pytest.mark.parametrize(
    ("mesh", "length", "follow"),
    [
        ("fsdp=64", 8192, False),
        ("expert=16,context=4", 32_768, True),  # shards of a chunk each, which halves would cut
        ("expert=16,context=4", 65_536, False),
        ("expert=16,context=4", 32_766, False),  # context does not divide it, and holds copies
    ],
)
def test_shards_follow_each_other_where_that_keeps_chunks_whole(mesh, length, follow):
    asked = work("sft", 16, length)
    assert meshes.in_order(SCOUT, asked, meshes.parse(mesh)) == follow


@pytest.mark.parametrize(("task", "tiles"), [("distill", 0), ("teach", 0), ("teach", 2)])
def test_a_teacher_and_its_student_are_what_the_recipe_runs(task, tiles):
    """Their programs: rows where the trainer lays them, parameters as each keeps them."""
    config = presets.tiny(presets.llama4_scout())
    mesh = jax.make_mesh(
        tuple(meshes.parse("fsdp=2,expert=4").values()),
        sharding.AXES,
        axis_types=(AxisType.Auto,) * len(sharding.AXES),
    )
    vision = presets.tiny_vision(presets.llama4_vision())
    pictures = meshes.Pictures(vision, tiles, frozen=False) if tiles else None
    asked = dataclasses.replace(work(task, 8, 64), images=pictures)
    found = programs.program(config, asked, execution=Execution(dtype="bfloat16"), mesh=mesh)
    held, count = found.bytes(), roofline.parameters(config).total
    count += roofline.vision_parameters(vision, config.embed_dim) if tiles else 0
    # Norms and routers are small, and lie whole on every device.
    each = (2 if task == "teach" else 4) * count / 8
    assert held["parameters"] == pytest.approx(each, rel=0.15)
    assert ("optimizer" in held) == (task == "distill")
    rows = found.arguments[-1]
    named = {"teacher_ids", "teacher_log_probs", "soft_weight"}
    assert named & set(rows) == (named if task == "distill" else set())
    assert ("tiles" in rows) == ("places" in rows) == bool(tiles)
    here = {name: x.sharding.shard_shape(x.shape)[0] for name, x in rows.items() if x.ndim}
    assert here == {name: tiles if name == "tiles" else 1 for name in here}
    out = found.lower().out_info
    if task == "teach":
        assert {name: x.shape for name, x in out.items()} == {
            "teacher_ids": (8, 64, 64),
            "teacher_log_probs": (8, 64, 64),
        }
    else:
        assert {"soft", "hard"} <= set(out[1])


# --- Times ---------------------------------------------------------------------------------------
def device(*coords, core=0):
    return types.SimpleNamespace(coords=[*coords, *(0,) * (3 - len(coords))], core_on_chip=core)


def ici(topology, kind, members, wire=6e9):
    """Seconds of one collective between these devices."""
    collective = counting.Collective(
        kind, ("x",), tuple(range(len(members))), "ici", times=1.0, wire=wire
    )
    return timing.seconds(counting.Counts([collective]), topology, members).ici


def test_a_closed_ring_uses_both_directions_and_a_line_one():
    link = 100e9
    ring = [device(0, 0, z) for z in range(4)]
    assert ici(CUBE, "all-gather", ring) == pytest.approx(6e9 / (2 * link))
    line = chips.parse("v5p:2x2x4")
    assert ici(line, "all-gather", ring) == pytest.approx(6e9 / link)
    part = chips.parse("v5p:4x4x8")
    assert ici(part, "all-gather", ring) == pytest.approx(6e9 / link)


def test_several_dimensions_add_their_links():
    plane = [device(0, y, z) for y in range(4) for z in range(4)]
    assert ici(CUBE, "reduce-scatter", plane) == pytest.approx(6e9 / (4 * 100e9))


def test_an_all_to_all_is_bound_by_the_middle_of_its_longest_side():
    plane = [device(0, y, z) for y in range(4) for z in range(4)]
    whole = 6e9 * 16 / 15
    assert ici(CUBE, "all-to-all", plane) == pytest.approx(whole * 4 / 8 / 100e9)
    flat = chips.parse("v6e:4x4")
    assert ici(flat, "all-to-all", [device(y, z) for y in range(4) for z in range(4)]) == (
        pytest.approx(whole * 4 / 4 / 100e9)
    )


def test_messages_take_as_long_as_their_way():
    assert ici(CUBE, "collective-permute", [device(0, 0, 0), device(0, 1, 3)]) == pytest.approx(
        6e9 * 2 / 100e9
    )


def test_the_halves_of_a_chip_share_its_links_but_not_their_own_connection():
    chip = chips.parse("tpu7x:4x4x4")
    halves = [device(0, 0, 0, core=core) for core in range(2)]
    assert ici(chip, "all-gather", halves) == pytest.approx(6e9 / 600e9)
    one_half = [device(0, 0, z) for z in range(4)]
    assert ici(chip, "all-gather", one_half) == pytest.approx(6e9 / 100e9)
    both = [device(0, 0, z, core=core) for z in range(4) for core in range(2)]
    assert ici(chip, "all-gather", both) == pytest.approx(6e9 / 200e9)


def test_the_largest_time_bounds_the_step():
    counts = counting.Counts(product_flops=459e12, hbm_bytes=2765e9 / 2)
    counts.collectives.append(
        counting.Collective("dcn-all-reduce", ("data",), (0,), "dcn", times=2.0, wire=6.25e9)
    )
    found = timing.seconds(counts, chips.parse("v5p:4x4x4", slices=2), [device(0, 0, 0)])
    assert dataclasses.astuple(found) == pytest.approx((1.0, 0.5, 0.0, 2.0))
    assert (found.total, found.serial, found.bound) == pytest.approx((2.0, 3.5, 0)) or (
        found.bound == "dcn"
    )


# --- The compiler --------------------------------------------------------------------------------
class Program:
    """A function of one array, sharded over all devices of a mesh."""

    def __init__(self, function, mesh, shape):
        self.function = function
        self.x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))

    def lower(self):
        return jax.jit(self.function).lower(self.x)


@pytest.fixture(scope="module")
def mesh():
    pytest.importorskip("libtpu")
    return sharding.make_mesh(compiler.devices(chips.parse("v5e:2x2")), fsdp=4)


@needs_libtpu
@pytest.mark.parametrize(("name", "slices"), [("v6e:1x1", 1), ("tpu7x:2x2x1", 1), ("v5p:2x2x2", 3)])
def test_every_slice_has_the_devices_that_it_counts(name, slices):
    topology = chips.parse(name, slices=slices)
    found = compiler.devices(topology)
    assert len(found) == topology.devices
    assert len({getattr(d, "slice_index", 0) for d in found}) == slices


def test_a_missing_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(compiler.NoCompiler, match=r"pip install 'l4jax\[tpu\]'"):
        compiler.devices(CUBE)


def test_a_program_that_is_too_large_is_an_answer(mesh):
    gib = 2**28
    found = compiler.compile(Program(lambda x: x * 2, mesh, (4 * 16, gib)), mesh)
    assert isinstance(found, compiler.TooLarge)
    assert found.needed_gib == 32


@pytest.mark.parametrize(
    ("text", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: required for temporaries (1.50T) exceeds available HBM (95.74G).",
            1536,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.25G of 15.75G hbm.",
            20.25,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20M of 16M vmem.", None),
        ("INTERNAL: Mosaic failed to compile", None),
    ],
)
def test_only_a_lack_of_hbm_is_too_large(text, gib):
    assert compiler._out_of_hbm(text) == gib


def test_a_refusal_is_shortened():
    text = "INTERNAL: E2003: Mosaic failed to compile\n  TPU kernel: " + "very bad, " * 100
    failed = compiler.Failed(text)
    assert str(failed).startswith("the TPU compiler refuses this program: Mosaic failed to compile")
    assert len(str(failed)) < 350
    assert failed.text == text


# --- Measuring -----------------------------------------------------------------------------------
def test_a_compiled_program_is_run_on_numbers_of_its_shapes():
    seen = []

    def step(state, tokens, *, scale):
        jax.debug.callback(seen.append, jnp.max(tokens))
        return jax.tree.map(lambda x: (x * scale).astype(x.dtype), state), jnp.sum(tokens)

    state = {
        "w": jax.ShapeDtypeStruct((8, 500), jnp.bfloat16),
        "n": jax.ShapeDtypeStruct((), jnp.int32),
    }
    tokens = jax.ShapeDtypeStruct((4, 100), jnp.int32)
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    program = jax.jit(step, donate_argnums=0).lower(state, tokens, scale=scale).compile()
    seconds = measuring.measure(program, runs=2)
    assert 0 < seconds < math.inf
    assert [int(n) for n in seen] == [250] * 3
