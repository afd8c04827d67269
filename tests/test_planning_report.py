"""`l4jax plan` as users see it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import threading
import types

import jax
import matplotlib.figure
import pytest

from l4jax import cli, presets, roofline, sharding
from l4jax.config import Execution
from l4jax.planning import chips, compiler, hlo, meshes, plan, programs

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, the compiler for TPUs: pip install 'l4jax[tpu]'",
)
TINY = ("plan", "tiny-llama4-scout", "--topology", "v5p:2x2x1", "--seq", "64")


@pytest.fixture
def run(capsys):
    """Calls the command line in this process: exit status, output, errors."""

    def call(*arguments):
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def optimized():
    """Undoes the suite's quick compilation: the compiler for TPUs obeys it too."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


# --- Usage ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--topology", "v7:2x2"), "the TPU generations are v5e, v5p, v6e, tpu7x"),
        (("--topology", "v5p:4x4"), "slices of v5p are v5p:2x2x1"),
        (("--topology", "v5p:2x2x1", "--slices", "0"), "slices 0 must be at least 1"),
        (("--topology", "v5p:2x2x1", "--mesh", "fsdp:4"), "write axes and sizes such as"),
        (
            ("--topology", "v5p:2x2x1", "--mesh", "fsdp=8"),
            "has 8 devices, but v5p:2x2x1 has 4; nearest meshes that do: fsdp=4",
        ),
        (("--topology", "v5p:2x2x1", "--batch", "0"), "batch 0 must be greater than 0"),
        (("--topology", "v5p:2x2x1", "--seq", "-1"), "seq -1 must be greater than 0"),
        (("--topology", "v5p:2x2x1", "--mesh", "fsdp=2,fsdp=4"), "gives fsdp twice"),
        (
            ("--topology", "v5p:2x2x1", "--price-per-chip-hour", "inf"),
            "price_per_chip_hour inf must be greater than 0, and finite",
        ),
        (("--topology", "v5p:2x2x1", "--seq", "99999999"), "99999999 tokens are more than"),
        (("--topology", "v5p:2x2x1", "--context", "64"), "--context is for --task decode"),
        (
            ("--topology", "v5p:2x2x1", "--task", "decode", "--remat", "full"),
            "a decode step has no backward pass",
        ),
        (
            ("--topology", "v5p:2x2x1", "--task", "decode", "--context", "long"),
            "context 'long' must be a number of tokens or max",
        ),
        (
            ("--topology", "v5p:2x2x1", "--task", "decode", "--seq", "64", "--context", "64"),
            "say the same when decoding",
        ),
        (("--topology", "v5p:2x2x1", "--search", "--measure"), "do not go together"),
        (("--topology", "v5p:2x2x1", "--search", "--limit", "0"), "limit 0 must be at least 1"),
        (("--topology", "v5p:2x2x1", "--tiles", "-1"), "tiles -1 must be at least 0"),
        (
            ("--topology", "v5p:2x2x1", "--seq", "70", "--tiles", "18"),
            "18 tiles of 4 tokens are more than the 70 of a sequence: at most 17 tiles",
        ),
        (
            ("--topology", "v5p:2x2x1", "--task", "decode", "--tiles", "1"),
            "a decode step reads no images",
        ),
        (("--topology", "v5p:2x2x1", "--freeze-vision"), "is for training with --tiles"),
        (("--topology", "v5p:2x2x1", "--local-steps", "9"), "is for several --slices"),
        (
            ("--topology", "v5p:2x2x1", "--slices", "2", "--local-steps", "0"),
            "local_steps 0 must be at least 1",
        ),
        (
            ("--topology", "v5p:2x2x1", "--slices", "3", "--local-steps", "9", "--batch", "8"),
            "3 slices must divide the batch of 8",
        ),
    ],
)
def test_bad_usage_is_one_clear_line(run, options, message):
    code, out, err = run("plan", "tiny-llama4-scout", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize(
    ("preset", "mesh", "message"),
    [
        ("llama3.1-8b", "expert=4", "a dense model has no experts to split; fsdp does the same"),
        ("nonsense", "fsdp=4", "no preset is called 'nonsense'; there are llama"),
        ("l4jax", "fsdp=4", "l4jax is no preset: plan takes the name of the one that it is of"),
    ],
)
def test_what_has_no_such_mesh_or_is_no_preset_is_said(run, preset, mesh, message):
    code, _, err = run("plan", preset, "--topology", "v5p:2x2x1", "--mesh", mesh)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_without_the_compiler_the_line_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    code, out, err = run(*TINY)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "pip install 'l4jax[tpu]'" in err


# --- What comes back -----------------------------------------------------------------------------
@pytest.fixture
def answer(monkeypatch):
    """Lets a function answer for the compiler."""

    def use(function):
        monkeypatch.setattr(compiler, "require", lambda: None)
        monkeypatch.setattr(compiler, "versions", lambda: compiler.Versions("1", "2"))
        monkeypatch.setattr(compiler, "devices", lambda topology: _devices(topology.devices))
        monkeypatch.setattr(compiler, "compile", lambda program, mesh: function(mesh))
        monkeypatch.setattr(plan.programs, "program", lambda *_, **__: _Program())
        monkeypatch.setattr(plan.sharding, "make_mesh", _mesh)

    return use


class _Program:
    def bytes(self):
        return {"parameters": 3.0 * 2**30, "optimizer": 6.0 * 2**30}


def _devices(n):
    return [types.SimpleNamespace(coords=(i % 2, i // 2, 0), core_on_chip=0) for i in range(n)]


def _mesh(devices, **sizes):
    return types.SimpleNamespace(devices=types.SimpleNamespace(flat=devices), shape=sizes)


def too_large(gib):
    return compiler.TooLarge(gib, "RESOURCE_EXHAUSTED: …", 2.0, 3.0)


def taken(gib=12.0):
    """A compiled program with one all-gather along fsdp, and a product."""
    text = """HloModule m

ENTRY %main (p: bf16[64,64]) -> bf16[256,64] {
  %p = bf16[64,64]{1,0} parameter(0)
  %x = bf16[64,64]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %g = bf16[256,64]{1,0} all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}
}
"""
    return compiler.Compiled(None, text, compiler.Memory(9.5, gib - 9.5, gib, 0.0), 2.0, 3.0)


ASKED = ("plan", "llama3.1-8b", "--topology", "v5p:2x2x1", "--mesh", "fsdp=4")


def test_a_plan_has_all_that_scripts_rely_on(run, answer, tmp_path):
    answer(lambda mesh: taken())
    out = tmp_path / "new" / "folder"
    code, text, _ = run(*ASKED, "--json", "--price-per-chip-hour", "4.2", "--out", out)
    found = json.loads(text)
    assert (code, found["fits"], found["mesh"]) == (0, True, {"fsdp": 4})
    assert found["hbm_gib"] == {
        "parameters": 3.0,
        "optimizer": 6.0,
        "other arguments": 0.5,
        "temporaries": 2.5,
        "total": 12.0,
        "capacity": 95.74,
    }
    assert found["wire_gb"]["by_kind"] == {"all-gather": 3 * 64 * 64 * 2 / 1e9}
    assert found["wire_gb"]["by_axis"] == {"fsdp": found["wire_gb"]["total"]}
    assert found["flops"]["executed"] == 2 * 64**3
    times = found["roofline_seconds"]
    assert times["total"] == max(times["compute"], times["hbm"], times["ici"])
    assert found["mfu_bound"] == pytest.approx(found["flops"]["ideal"] / (459e12 * times["total"]))
    rate = 4 * 8192 / times["total"]
    assert found["tokens_per_second"] == pytest.approx(rate)
    assert found["cost_per_million_tokens"] == pytest.approx(4 * 4.2 / 3600 / rate * 1e6)
    assert found["compile_seconds"] == {"wall": 2.0, "cpu": 3.0}
    assert found["versions"] == {"jax": "1", "libtpu": "2"}
    assert json.loads((out / "plan.json").read_text()) == found
    assert (out / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in out.iterdir()) == ["plan.json", "plan.png"]


def test_a_plan_is_shown_to_people(run, answer):
    answer(lambda mesh: taken())
    code, text, _ = run(*ASKED)
    assert code == 0
    for words in ("12.0 of 95.74 GiB", "fits", "all-gather", "of peak", "3 CPU-seconds"):
        assert words in text


def test_what_does_not_fit_says_by_how_much_and_what_would(run, answer, tmp_path):
    answer(lambda mesh: too_large(101.0))
    code, text, _ = run(*ASKED, "--remat", "none", "--batch", "16", "--json", "--out", tmp_path)
    found = json.loads(text)
    assert (code, found["fits"]) == (0, False)
    assert found["hbm_gib"]["missing"] == pytest.approx(101.0 - 95.74)
    options = {line.split()[0] for line in found["advice"]}
    assert {"--remat", "--batch", "--seq", "--topology"} <= options
    # The mesh and the remat that were asked for would not do on another slice, and are named.
    assert "--topology v5p:2x2x4 --mesh fsdp=16" in found["advice"]
    parts = [found["hbm_gib"][name] for name in ("parameters", "optimizer", "temporaries")]
    assert sum(parts) == pytest.approx(101.0)
    assert (tmp_path / "compiler.txt").read_text().startswith("RESOURCE_EXHAUSTED")
    code, text, _ = run(*ASKED)
    assert "at least 101.0 of 95.74 GiB" in text
    assert (tmp_path / "plan.png").exists()


def test_a_refusal_is_one_line_and_a_file(run, answer, tmp_path):
    def refuse(mesh):
        raise compiler.Failed("INTERNAL: Mosaic failed to compile: bad tile\nand much more")

    answer(refuse)
    code, out, err = run(*ASKED, "--out", tmp_path)
    assert (code, out) == (1, "")
    assert "the TPU compiler refuses this program: Mosaic failed to compile: bad tile" in err
    assert (tmp_path / "compiler.txt").read_text().endswith("and much more")


@pytest.mark.parametrize(
    ("options", "first", "last"),
    [
        # An odd batch has no half; less of it may need another mesh as well.
        (
            {"task": "decode", "batch": 17, "length": 65536},
            "--batch 4 --mesh tensor=4",
            "--topology v5e:4x4",
        ),
        (
            {"task": "prefill", "batch": 64, "mesh": meshes.parse("data=4")},
            "--batch 32 --mesh fsdp=4",
            "--topology v5e:2x4 --mesh fsdp=8",
        ),
    ],
)
def test_advice_can_be_followed(options, first, last):
    request = plan.Request(preset="llama3.1-8b", topology=chips.parse("v5e:2x2"), **options)
    mesh, remat = request.layout()
    needed = meshes.estimate(request.config, request.topology, request.work, mesh, remat).gib
    found = plan.advice(request, mesh, remat, needed)
    assert (found[0], found[-1]) == (first, last)


def test_an_earlier_plan_does_not_stay_beside_a_failed_one(run, answer, tmp_path):
    answer(lambda mesh: taken())
    assert run(*ASKED, "--out", tmp_path)[0] == 0

    def refuse(mesh):
        raise compiler.Failed("INTERNAL: no")

    answer(refuse)
    assert run(*ASKED, "--out", tmp_path)[0] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["compiler.txt"]


def test_ctrl_c_does_not_wait_for_the_compiler(run, answer):
    compiling, end = threading.Event(), threading.Event()

    def compile(mesh):
        compiling.set()
        end.wait(60)
        return taken()

    answer(compile)
    asked = threading.Thread(
        target=lambda: compiling.wait(60) and os.kill(os.getpid(), signal.SIGINT)
    )
    asked.start()
    code, out, err = run(*ASKED)
    assert (code, out, err.splitlines()[-1]) == (130, "", "l4jax: interrupted")
    assert not end.is_set()
    end.set()
    asked.join()


def test_a_search_keeps_to_the_remat_that_was_asked_for(run, answer):
    answer(lambda mesh: taken())
    code, text, _ = run(
        *("plan", "llama3.1-8b", "--topology", "v5p:2x2x1", "--search", "--limit", "2"),
        *("--remat", "offload", "--json"),
    )
    assert code == 0
    assert [found["remat"] for found in json.loads(text)["plans"]] == ["offload"] * 2


def test_a_small_model_has_bars_and_numbers_too(run, answer, monkeypatch, tmp_path):
    drawn = []
    answer(lambda mesh: taken())
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda self, *rest, **how: (drawn.append(self), save(self, *rest, **how)),
    )
    assert run(*ASKED, "--out", tmp_path)[0] == 0
    _, times, wire = drawn[0].axes
    assert times.get_xlabel().startswith("least time per step, ")
    assert len(times.patches) == 3, "compute, hbm and ici, however short"
    assert wire.get_xlabel().startswith("kB sent per device and step")
    assert {round(bar.get_width(), 3) for bar in wire.patches} == {round(3 * 64 * 64 * 2 / 1e3, 3)}


def test_a_search_ranks_what_it_compiles(run, answer):
    seen = []

    def some(mesh):
        seen.append(dict(mesh.shape))
        return too_large(200.0) if len(seen) == 1 else taken()

    answer(some)
    code, text, _ = run(
        *("plan", "llama3.1-8b", "--topology", "v5p:2x2x1", "--search", "--limit", "3", "--json")
    )
    found = json.loads(text)
    assert (code, len(seen), len(found["plans"])) == (0, 3, 3)
    assert [p["fits"] for p in found["plans"]] == [True, True, False]
    assert found["mesh"] == found["plans"][0]["mesh"]
    code, text, _ = run(
        *("plan", "llama3.1-8b", "--topology", "v5p:2x2x1", "--search", "--limit", "2")
    )
    assert code == 0
    assert "Ranking" in text


@pytest.mark.parametrize("limit", [700, 5000, 131072])
def test_the_longest_context_that_fits_is_found_in_few_trials(monkeypatch, limit):
    trials = []

    def fake(request, *, out=None):
        trials.append(request.length)
        gib = 20 + 75.74 * request.length / (limit * 1024)
        return {"fits": gib <= 95.74, "length": request.length, "hbm_gib": {"total": gib}}

    monkeypatch.setattr(plan, "plan", fake)
    request = plan.Request(
        preset="llama4-scout", topology=chips.parse("v5p:2x2x1"), task="decode", batch=1
    )
    found = plan.longest(request, notify=lambda text: None)
    most = min(limit * 1024, request.config.max_context)
    assert found["fits"]
    assert most * 31 / 32 - 1024 <= found["length"] <= most
    assert len(trials) <= 6


def test_no_context_at_all_is_an_error(monkeypatch):
    monkeypatch.setattr(plan, "plan", lambda *_, **__: {"fits": False, "hbm_gib": {"total": 99.0}})
    request = plan.Request(
        preset="llama4-scout", topology=chips.parse("v5p:2x2x1"), task="decode", batch=1
    )
    with pytest.raises(ValueError, match="not even 1,024 tokens of context fit"):
        plan.longest(request, notify=lambda text: None)


def test_measuring_needs_the_very_devices(run, monkeypatch):
    monkeypatch.setattr(compiler, "require", lambda: None)
    code, _, err = run(*TINY, "--measure")
    assert code == 1
    assert "needs v5p:2x2x1 itself, with 4 devices; here are 8 CPU devices" in err


# --- The real thing ------------------------------------------------------------------------------
@needs_libtpu
def test_the_image_encoder_is_part_of_the_step(optimized, run):
    """Its bytes by arithmetic; that it is computed, the compiler's products show."""
    vision = presets.get("tiny-llama4-scout").vision
    size = 4 * roofline.vision_parameters(vision, presets.get(TINY[1]).make().embed_dim)
    mesh = meshes.parse("data=4")

    def request(task="train", **options):
        return plan.Request(
            preset=TINY[1], topology=chips.parse("v5p:2x2x1"), task=task, length=64, **options
        )

    def held(*arguments, **options):
        asked = request(*arguments, **options)
        devices = sharding.make_mesh(compiler.devices(asked.topology), **mesh)
        how = Execution(dtype="bfloat16")
        return programs.program(asked.config, asked.work, execution=how, mesh=devices).bytes()

    text, seen, frozen = held(), held(tiles=3), held(tiles=3, freeze_vision=True)
    assert seen["parameters"] - text["parameters"] == size
    assert seen["optimizer"] - text["optimizer"] == 2 * size
    assert frozen == {"parameters": seen["parameters"], "optimizer": text["optimizer"]}
    served = held("prefill", tiles=3)["parameters"] - held("prefill")["parameters"]
    assert served == size // 2
    estimates = [
        meshes.estimate(asked.config, asked.topology, asked.work, mesh, "full").gib * 2**30
        for asked in (request(), request(tiles=3, freeze_vision=True), request(tiles=3))
    ]
    assert estimates[1] - estimates[0] > size
    assert estimates[2] - estimates[1] >= 2 * size
    found, more = (plan.compiled(request("prefill", tiles=n), mesh, "none")[0] for n in (0, 3))
    tile = roofline.vision_flops(vision, request().config.embed_dim)
    assert more["flops"]["ideal"] - found["flops"]["ideal"] == 3 * tile
    assert 0.95 < (more["flops"]["products"] - found["flops"]["products"]) / (3 * tile) < 1.6
    assert more["tiles"] == 3


@needs_libtpu
def test_tpu7x_does_not_hold_parameters_twice_to_serve(optimized):
    """Its compiler would copy those in bfloat16 into tiles of 16 rows."""
    request = plan.Request(
        preset=TINY[1], topology=chips.parse("tpu7x:2x2x1"), task="prefill", length=64
    )
    program = plan.compiled(request, *request.layout())[1]
    assert program is not None
    assert "T(8,128)(2,1)" in program.text
    assert "T(16,128)(2,1)" not in program.text


@needs_libtpu
def test_slices_train_a_small_scout_by_themselves_and_meet(run, optimized, tmp_path):
    options = ("--slices", "2", "--local-steps", "50", "--batch", "16", "--mesh", "expert=4")
    price = ("--price-per-chip-hour", "2")
    code, text, err = run(*TINY, *options, *price, "--json", "--out", tmp_path)
    assert code == 0, err
    found = json.loads(text)
    hbm, wire, met = found["hbm_gib"], found["wire_gb"], found["meetings"]
    assert found["fits"]
    assert 0 < hbm["parameters"] < hbm["total"] < 1
    assert set(wire["by_axis"]) == {"expert"}, "a slice's own step crosses no other"
    assert wire["by_kind"]["all-to-all"] > 0
    assert found["idle_loops"] > 0, f"the exchange's loop is to be in the scope {hlo.IDLE}"
    assert (found["open_loops"], found["uncounted_kernels"]) == ([], [])
    assert found["compile_seconds"]["cpu"] > 0
    assert (found["slices"], found["chips"], found["batch"]) == (2, 8, 16)
    assert hbm["meetings"] == pytest.approx(2 * hbm["parameters"])
    # An all-reduce between two sends each of them as much as it holds.
    assert met["wire_gb"] == pytest.approx(hbm["parameters"] * 2**30 / 1e9, rel=0.02)
    assert met["wire_gb_per_step"] == pytest.approx(met["wire_gb"] / 50)
    assert met["seconds"] == pytest.approx(
        met["wire_gb"] * 1e9 / chips.GENERATIONS["v5p"].dcn_bandwidth, rel=1e-6
    )
    step = found["roofline_seconds"]["total"] + met["seconds"] / 50
    assert found["tokens_per_second"] == pytest.approx(16 * 64 / step)
    assert found["cost_per_million_tokens"] == pytest.approx(16 / 3600 * step / (16 * 64) * 1e6)
