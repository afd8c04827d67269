"""A checkpoint is whole or none, fits any mesh, and knows what it is of."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from l4jax import sharding
from l4jax.training import checkpointing
from l4jax.training.checkpointing import Checkpoints, Failure, fingerprints


def state(value=1.0):
    return {
        "w": jnp.arange(48, dtype=jnp.float32).reshape(6, 8) * value,
        "few": jnp.arange(-8, 8).astype(jnp.int4),
        "narrow": jnp.full((3,), value, jnp.bfloat16),
        "layers": {0: {"count": jnp.int32(7)}},
    }


def saved(folder, *steps, scores=None, **options):
    made = Checkpoints(folder, **{"keep": 9} | options)
    for step in steps:
        metrics = {"x": scores[step]} if scores else {}
        assert made.save(step, state(step), {"metrics": metrics}) == []
    assert made.close() is None
    return made


def test_what_was_saved_is_loaded_bit_for_bit_and_what_is_changed_meanwhile_is_not(tmp_path):
    """The save goes on while a step uses up the arrays, on a mesh too."""
    step = jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    for number, place in enumerate((None, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))):
        x = {"x": jax.device_put(jnp.arange(1024.0 * 256).reshape(1024, 256), place)}
        expected = np.array(x["x"])
        made = Checkpoints(tmp_path / str(number), keep=1)
        made.save(1, x, {})
        for _ in range(5):
            x = step(x)
        made.settle()
        found = made.load(1, x)["x"]
        assert found.sharding.is_equivalent_to(x["x"].sharding, 2)
        np.testing.assert_array_equal(found, expected)
        made.close()


def test_types_and_trees_come_back(tmp_path):
    made = saved(tmp_path, 2)
    found = made.load(2, state(9))
    expected = state(2)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_plain_orbax_reads_a_checkpoint_by_its_names(tmp_path):
    from orbax.checkpoint import v1 as ocp

    saved(tmp_path, 2)
    found = ocp.metadata(tmp_path / "2").metadata
    assert found.keys() == {"w", "few", "narrow", "layers.0.count"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"w": jnp.zeros((6, 9))}, r"w is float32\[6, 8\] there and float32\[6, 9\] in this run"),
        ({"narrow": jnp.zeros(3)}, r"narrow is bfloat16\[3\] there and float32\[3\] in this run"),
        ({"more": jnp.zeros(3)}, r"more is nothing there and float32\[3\] in this run"),
    ],
)
def test_another_tree_is_refused_and_left_alone(tmp_path, change, words):
    made, wanted = saved(tmp_path, 2), state() | change
    with pytest.raises(ValueError, match=words):
        made.load(2, wanted)
    assert not any(x.is_deleted() for x in jax.tree.leaves(wanted))


DAMAGED = """
import pathlib, sys
import jax.numpy as jnp
from l4jax.training.checkpointing import Checkpoints
made = Checkpoints(sys.argv[1], keep=2)
made.save(2, {"x": jnp.ones(3)}, {"metrics": {}})
made.settle()
for path in pathlib.Path(sys.argv[1], "2").rglob("d/*"):
    path.write_bytes(bytes(path.stat().st_size))
wanted = {"x": jnp.zeros(3)}
try:
    made.load(2, wanted)
except ValueError as error:
    print(error, wanted["x"].is_deleted())
"""


def alone(code, *arguments):
    """What a program prints; Orbax leaves tasks behind in a process where something failed."""
    argv = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_damaged_checkpoint_is_an_error_that_names_it(tmp_path):
    expected = f"{tmp_path}/2: cannot be read: its arrays are damaged False\n"
    assert alone(DAMAGED, tmp_path) == expected


# --- Whole or none -------------------------------------------------------------------------------
def test_without_its_last_file_a_folder_is_no_checkpoint(tmp_path):
    saved(tmp_path, 3, 6)
    (tmp_path / "6" / checkpointing.MARKER).unlink()
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "notes").mkdir()
    again = Checkpoints(tmp_path, keep=9)
    assert again.steps() == [3]
    assert again.latest() == 3
    assert sorted(os.listdir(tmp_path)) == ["3", "notes"], "the rest is cleared away"
    assert again.save(6, state(), {}) == []
    assert again.close() is None
    assert again.steps() == [3, 6]


def test_a_removal_that_is_interrupted_leaves_no_checkpoint(tmp_path, monkeypatch):
    """The file that makes it one goes first."""

    def interrupted(path):
        raise OSError("busy")

    made = Checkpoints(tmp_path, keep=1)
    monkeypatch.setattr(type(made.folder), "rmtree", interrupted)
    made.save(1, state(), {"metrics": {}})
    made.save(2, state(), {"metrics": {}})
    assert made.close() is None
    assert (tmp_path / "1").exists()
    assert made.steps() == [2]


def test_a_failed_save_is_told_once_and_the_next_one_works(tmp_path, monkeypatch):
    real, made = checkpointing.begin, Checkpoints(tmp_path, keep=2)
    made.save(1, state(), {"metrics": {}})

    def full():
        raise OSError(28, "No space left\n on device")

    monkeypatch.setattr(checkpointing, "begin", lambda path, arrays: full)
    assert made.save(2, state(), {}) == []
    failure = Failure(2, "[Errno 28] No space left on device")
    assert made.settle() == failure
    assert made.settle() is None
    made.save(3, state(), {})
    monkeypatch.setattr(checkpointing, "begin", lambda path, arrays: full())
    assert made.save(4, state(), {}) == [failure._replace(step=3), failure._replace(step=4)]
    assert made.steps() == [1]
    monkeypatch.setattr(checkpointing, "begin", real)
    assert made.save(4, state(), {"metrics": {}}) == []
    assert made.close() is None
    assert made.steps() == [1, 4]


FULL = """
import resource, sys
import jax.numpy as jnp
from l4jax.training.checkpointing import Checkpoints
made = Checkpoints(sys.argv[1], keep=2)
big = {"x": jnp.arange(300_000.0) ** 0.5, "y": jnp.ones(300)}
assert made.save(1, big, {"metrics": {}}) == []
assert made.settle() is None
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
failures = made.save(2, big, {"metrics": {}}) + [made.settle()]
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
print(*failures)
assert made.steps() == [1]
made.save(3, big, {"metrics": {}})
assert made.close() is None
assert made.steps() == [1, 3]
assert (made.load(3, big)["x"] == jnp.arange(300_000.0) ** 0.5).all()
"""


def test_files_that_may_not_grow_are_a_failure_and_no_more(tmp_path):
    """As a full disk is one: the storage library's own writes fail."""
    assert "Failure(step=2, reason=" in alone(FULL, tmp_path / "checkpoints")
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "3"]


# --- Which stay ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keep": 1}, [9]),
        ({"keep": 3}, [5, 8, 9]),
        ({"keep": 1, "every": 4}, [8, 9]),
        ({"keep": 1, "keep_best": "x"}, [5, 9]),
        ({"keep": 1, "keep_best": "-x"}, [2, 9]),
        ({"keep": 1, "keep_best": "y"}, [9]),
        ({"keep": 2, "keep_best": "x", "every": 2}, [5, 8, 9]),
    ],
)
def test_the_last_the_best_and_the_last_regular_one_stay(tmp_path, options, expected):
    scores = {2: 4.0, 4: None, 5: 1.0, 8: 2.0, 9: 3.0}
    assert saved(tmp_path, 2, 4, 5, 8, 9, scores=scores, **options).steps() == expected


def test_the_best_is_remembered_by_a_run_that_goes_on(tmp_path):
    saved(tmp_path, 2, 5, scores={2: 0.5, 5: 0.7}, keep=1, keep_best="x")
    made = saved(tmp_path, 8, 9, scores={8: 0.6, 9: 0.9}, keep=1, keep_best="x")
    assert made.steps() == [2, 9]


def test_later_ones_can_be_dropped_and_a_step_is_not_written_twice(tmp_path):
    made = Checkpoints(tmp_path, keep=9)
    for step in (1, 2, 3):
        made.save(step, state(), {"metrics": {}})
    made.drop_after(1)
    assert made.steps() == [1]
    assert made.latest(dividing=2) is None
    made.load(1, state())
    assert made.save(1, state(), {"metrics": {}, "again": True}) == []
    assert made.close() is None
    assert "again" not in made.run(1)


def test_impossible_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="keep 0 must be at least 1"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="s3://bucket/run: Orbax writes to local folders and to"):
        Checkpoints("s3://bucket/run", keep=1)


def test_a_folder_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert saved("run", 2).steps() == [2]
    assert checkpointing.Checkpoints(tmp_path / "run", keep=1).latest() == 2


# --- What they are of ----------------------------------------------------------------------------
def test_fingerprints_are_of_bits_and_not_of_layouts():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 5)), jnp.float32)
    kinds = (jnp.float32, jnp.bfloat16, ml_dtypes.float8_e4m3fn, jnp.int8, jnp.int4)
    arrays = {np.dtype(kind).name: (4 * x).astype(kind) for kind in kinds}
    arrays["scalar"] = jnp.float32(3)
    expected = fingerprints(arrays)
    assert expected.keys() == arrays.keys()
    bits = np.asarray(x * 4).view(np.uint32).reshape(-1).astype(object)
    assert expected["float32"] == sum((2 * i + 1) * b for i, b in enumerate(bits)) % 2**32
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    laid = {name: x for name, x in arrays.items() if x.ndim}
    laid = jax.device_put(laid, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    assert fingerprints(laid) == {name: expected[name] for name in laid}
    for name, array in arrays.items():
        if array.ndim:
            swapped = array[::-1]
            assert fingerprints({name: swapped})[name] != expected[name], name
        flipped = np.array(array).reshape(-1)
        flipped[0] = -flipped[0] if flipped[0] else 1
        again = jnp.asarray(flipped.reshape(array.shape), array.dtype)
        assert fingerprints({name: again})[name] != expected[name], name
