"""Killed at any moment and resumed, a run writes what it would have; on another mesh, nearly so."""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import run_worker
from test_distributed import spawn
from toy_runs import checkpoints, events, lines

from l4jax import sharding

TESTS = pathlib.Path(__file__).parent
STEPS = 22
PATIENCE = 240
"""Seconds for a run, on a busy machine."""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Begins a run in a folder as a process of its own; all share their compiled programs."""
    cache = tmp_path_factory.mktemp("compiled")
    environment = os.environ | {
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }

    def begin(out, *arguments):
        argv = [sys.executable, TESTS / "run_worker.py", out, STEPS, *arguments]
        out.mkdir(exist_ok=True)
        with (out / "output").open("a") as file:
            return subprocess.Popen(list(map(str, argv)), env=environment, stdout=file, stderr=file)

    return begin


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run that nothing happens to."""
    out = tmp_path_factory.mktemp("whole")
    assert start(out).wait(PATIENCE) == 0, (out / "output").read_text()
    assert [line["step"] for line in lines(out)] == list(range(STEPS))
    return out


def kill_at(child, out, count, more):
    """Kills a run some time after it has written so many lines; False if it ended before."""
    file, deadline = out / "metrics.jsonl", time.monotonic() + PATIENCE
    while not file.exists() or len(file.read_bytes().splitlines()) < count:
        assert time.monotonic() < deadline, (out / "output").read_text()
        if child.poll() is not None:
            break
        time.sleep(0.002)
    time.sleep(more)
    child.kill()
    return child.wait() == -signal.SIGKILL


def killed_often(start, whole, out, times):
    """Kills a run that often, each time further on, and lets it end."""
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    moments = sorted(draw.uniform(1, STEPS - 1) for _ in range(times))
    done = [kill_at(start(out, 0.05), out, int(moment), 0.06 * (moment % 1)) for moment in moments]
    assert start(out).wait(PATIENCE) == 0, (out / "output").read_text()
    assert sum(done) >= times - 1, (done, moments)
    assert lines(out) == lines(whole), f"seed {seed}: killed at {moments}"
    assert checkpoints(out) == [20, 22]
    assert sorted(os.listdir(out / "checkpoints")) == ["20", "22"]


def test_a_run_killed_at_three_moments_writes_the_same(start, whole, tmp_path):
    killed_often(start, whole, tmp_path / "run", 3)


@pytest.mark.slow
def test_a_run_killed_at_ten_moments_writes_the_same(start, whole, tmp_path):
    killed_often(start, whole, tmp_path / "run", 10)


@pytest.mark.parametrize("when", [pytest.param("begun", marks=pytest.mark.slow), "written"])
def test_a_checkpoint_that_is_half_written_is_none(start, whole, tmp_path, when):
    """At the save of step 12 the run is killed; it goes on from step 8."""
    out = tmp_path / "run"
    assert start(out, 0, when, 12).wait(PATIENCE) == -signal.SIGKILL
    left = set(os.listdir(out / "checkpoints")) - {"4", "8"}
    assert len(left) == 1
    assert left.pop().startswith("12")
    assert checkpoints(out) == [4, 8]
    assert start(out).wait(PATIENCE) == 0, (out / "output").read_text()
    assert events(out) == [("resume", 8)]
    assert lines(out) == lines(whole)
    assert sorted(os.listdir(out / "checkpoints")) == ["20", "22"]


def test_another_mesh_sees_the_same_batches_and_nearly_the_same_losses(tmp_path):
    """Eight devices, then four of them, laid out otherwise."""

    def train(out, steps, **mesh):
        with sharding.use(sharding.make_mesh(**mesh)):
            assert run_worker.run(out, steps, model=run_worker.placed()).step == steps
        return lines(out)

    expected = train(tmp_path / "eight", 8, fsdp=4, context=2)
    out = tmp_path / "four"
    shutil.copytree(tmp_path / "eight", out)
    shutil.rmtree(out / "checkpoints" / "8")
    found = train(out, 8, data=2, fsdp=2)
    assert events(out) == [("resume", 4)]
    assert found[:4] == expected[:4]
    assert found[4:] != expected[4:], "sums are made in another order"
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours["count"], ours["learning_rate"]) == (theirs["count"], theirs["learning_rate"])
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=3e-6, err_msg=name)


def test_on_one_mesh_a_resumed_run_is_bit_identical(on_mesh, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(on_mesh, out)
    shutil.rmtree(out / "checkpoints" / "8")
    assert train_on_mesh(out) == lines(on_mesh)
    assert events(out) == [("resume", 4)]


def train_on_mesh(out):
    with sharding.use(sharding.make_mesh(**run_worker.MESH)):
        run_worker.run(out, 8, model=run_worker.placed())
    return lines(out)


@pytest.fixture(scope="module")
def on_mesh(tmp_path_factory):
    """A run of one process on eight devices that nothing happens to."""
    out = tmp_path_factory.mktemp("on_mesh")
    train_on_mesh(out)
    return out


@pytest.mark.slow
def test_processes_stop_at_the_same_step_and_train_what_one_does(on_mesh, tmp_path):
    """The second of two is told to stop in the midst; all save, and go on when begun again."""
    out, command = tmp_path / "run", (TESTS / "run_worker.py",)
    out.mkdir()
    ended = spawn(out, 2, *command, out, 8, 0.0, "told", 5)
    assert ended.statuses == [0, 0], ended.outputs
    results = [output.split("Result(")[1].split(", last")[0] for output in ended.outputs]
    assert results[0] == results[1] == f"step={checkpoints(out)[-1]}, ended='stopped'"
    assert 6 <= checkpoints(out)[-1] <= 7
    assert [kind for kind, _ in events(out)] == ["stopped"]
    ended = spawn(out, 2, *command, out, 8)
    assert ended.statuses == [0, 0], ended.outputs
    assert checkpoints(out)[-1] == 8
    for ours, theirs in zip(lines(out), lines(on_mesh), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=3e-6, err_msg=name)
