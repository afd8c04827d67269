"""Runs of several processes: they train what one would, stop with each other, and go on."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from l4jax import distributed, sharding

TESTS = pathlib.Path(__file__).parent
STEPS = 6
PATIENCE = 300
"""Seconds for a run, on a busy machine; and for the end of processes that lost another one."""


class Ended(NamedTuple):
    """How the processes of a run ended."""

    statuses: list[int]
    outputs: list[str]


def spawn(folder: pathlib.Path, processes: int, *command: object) -> Ended:
    """Runs a program of as many processes, which know each other by their environment."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(TESTS.parent),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
    }
    children, files = [], []
    for number in range(processes):
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(number),
            }
        # A file, as a pipe that nobody reads would fill.
        files.append((folder / f"output-{number}").open("w+"))
        argv = [sys.executable, *map(str, command)]
        children.append(subprocess.Popen(argv, env=environment, stdout=files[-1], stderr=files[-1]))
    deadline = time.monotonic() + PATIENCE
    try:
        statuses = [child.wait(max(deadline - time.monotonic(), 0)) for child in children]
    finally:
        for child in children:
            child.kill()
    outputs = []
    for file in files:
        file.seek(0)
        outputs.append(file.read())
        file.close()
    return Ended(statuses, outputs)


def train(folder: pathlib.Path, processes: int, *killed_at: int) -> Ended:
    folder.mkdir(exist_ok=True)
    return spawn(folder, processes, TESTS / "distributed_worker.py", folder, STEPS, *killed_at)


def metrics(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rows(folder: pathlib.Path, processes: int) -> list[list[int]]:
    files = (folder / f"rows-{processes}-{number}" for number in range(processes))
    return [json.loads(file.read_text()) for file in files]


def stopped(ended: Ended, killed: int) -> bool:
    """Whether all but the killed one ended with an error that says that another one is lost."""
    words = ("another task died", "the others will stop")
    return all(
        status == -9 if number == killed else status != 0 and any(w in output for w in words)
        for number, (status, output) in enumerate(zip(*ended, strict=True))
    )


def test_a_run_goes_on_after_losing_a_process_with_any_number_of_them(tmp_path):
    """Checkpoints come after steps 2, 4 and 6. Lost are first a process, then the first process."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    ended = train(alone, 1)
    assert ended.statuses == [0], ended.outputs
    ended = train(together, 2, 1, 3)
    assert stopped(ended, killed=1), ended
    ended = train(together, 4, 0, 5)
    assert stopped(ended, killed=0), ended
    ended = train(together, 2)
    assert ended.statuses == [0, 0], ended.outputs

    assert rows(together, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert rows(together, 4) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    expected, found = metrics(alone), metrics(together)
    assert [line["step"] for line in expected] == [1, 2, 3, 4, 5, 6]
    seen = [line["step"] for line in found]
    # A killed first process has perhaps not written its last line.
    assert seen in ([1, 2, 3, 3, 4, 5, 5, 6], [1, 2, 3, 4, 5, 5, 6], [1, 2, 3, 3, 4, 5, 6])
    for line in found:
        reference = expected[line["step"] - 1]
        assert line.keys() == reference.keys()
        assert (line["count"], line["expert_load"]) == (
            reference["count"],
            reference["expert_load"],
        )
        for name in ("loss", "grad_norm", "router_entropy", "router_balance"):
            # Sums over processes are made in another order than sums over threads.
            np.testing.assert_allclose(line[name], reference[name], rtol=1e-6, err_msg=name)


FAILING = """
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
from jax.experimental import multihost_utils
from l4jax import distributed
distributed.initialize(heartbeat_seconds=15)
multihost_utils.sync_global_devices("begun")
if jax.process_index() == 1:
    raise ValueError("row 7 cannot be read")
multihost_utils.sync_global_devices("never reached")
"""


def test_an_exception_in_one_process_ends_the_others_too(tmp_path):
    """At once: an orderly exit would wait minutes for processes that wait for it."""
    begun = time.monotonic()
    ended = spawn(tmp_path, 2, "-c", FAILING)
    assert time.monotonic() - begun < 120
    assert ended.statuses[1] == 1
    assert "ValueError: row 7 cannot be read" in ended.outputs[1]
    assert "process 1 failed; the others will stop" in ended.outputs[1]
    assert ended.statuses[0] != 0
    assert "another task died" in ended.outputs[0] or "process 0 failed" in ended.outputs[0]


ALONE = """
import jax
from l4jax import distributed
distributed.initialize()
print(jax.process_count(), jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize("platform", ["cpu", ""])
def test_a_process_alone_only_gets_a_cache(tmp_path, platform):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {
        "PYTHONPATH": str(TESTS.parent),
        "HOME": str(tmp_path),
        "JAX_PLATFORMS": platform,
    }
    argv = [sys.executable, "-c", ALONE]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", str(tmp_path / ".cache/l4jax/compiled")]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES also needs JAX_COORDINATOR_ADDRESS"),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "a:1",
                "JAX_NUM_PROCESSES": "two",
                "JAX_PROCESS_ID": "0",
            },
            r"must be numbers, not \['two', '0'\]",
        ),
    ],
)
def test_half_an_environment_is_an_error(monkeypatch, tmp_path, environment, message):
    monkeypatch.setattr(distributed, "CACHE", tmp_path)
    before = jax.config.jax_compilation_cache_dir
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        with pytest.raises(ValueError, match=message):
            distributed.initialize()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_local_rows_become_global_arrays_where_they_belong():
    mesh = sharding.make_mesh(data=2, fsdp=2, context=2)
    place = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context"))
    assert distributed.local_rows(place, 12) == list(range(12))
    tokens = np.arange(12 * 6, dtype=np.int32).reshape(12, 6)
    (made,) = distributed.global_batch({"tokens": tokens}, place).values()
    assert (made.shape, made.sharding) == (tokens.shape, place)
    np.testing.assert_array_equal(made, tokens)
