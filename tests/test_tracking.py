"""Lines are there once written, are mended and cut, and services are told the same numbers."""

import errno
import io
import json
import math
import sys
import types

import jax
import numpy as np
import pytest
from etils import epath
from rich.console import Console

from l4jax import presets, roofline
from l4jax.planning import chips
from l4jax.training import tracking
from l4jax.training.tracking import Lines

LINES = ['{"step": 0, "x": 1}\n', '{"step": 1, "x": 2}\n', '{"step": 2, "x": 3}\n']


@pytest.mark.parametrize("torn", ["", '{"step": 3, "x"', '{"step": 3, "x": 4}', "\n", "3\n"])
@pytest.mark.parametrize(("below", "kept"), [(0, 0), (1, 1), (3, 3), (None, 3)])
def test_lines_to_be_written_again_and_half_ones_are_dropped(tmp_path, below, kept, torn):
    file = tmp_path / "x.jsonl"
    file.write_text("".join(LINES) + torn)
    assert tracking.read(file) == [json.loads(line) for line in LINES]
    lines = Lines(file, below=below)
    assert file.read_text() == "".join(LINES[:kept])
    lines.write({"step": 9, "y": np.float32(0.1), "n": np.int32(3)})
    assert file.read_text() == "".join(LINES[:kept]) + (
        '{"step": 9, "y": 0.10000000149011612, "n": 3}\n'
    )
    lines.drop(1)
    assert file.read_text() == "".join(LINES[: min(kept, 1)])
    lines.write({"step": 1})
    lines.close()
    assert tracking.read(file)[-1] == {"step": 1}


def test_numbers_that_are_not_finite_are_null_and_texts_stay_one_line(tmp_path):
    file = tmp_path / "x.jsonl"
    lines = Lines(file, below=0)
    text = "a\nb\u2028c\x85d é"
    lines.write({"step": 0, "loss": math.nan, "text": text, "other": np.float64("-inf")})
    lines.drop(1)
    lines.close()
    assert tracking.read(file) == [{"step": 0, "loss": None, "text": text, "other": None}]


def test_there_may_be_no_file(tmp_path):
    assert tracking.read(tmp_path / "none") == []
    Lines(tmp_path / "none", below=None).close()
    assert (tmp_path / "none").read_text() == ""


def test_a_cloud_store_gets_all_lines_when_they_are_published(tmp_path, monkeypatch):
    """Files there cannot grow."""
    local = epath.Path
    monkeypatch.setattr(
        tracking.epath, "Path", lambda x: local(str(x).replace("gs://bucket", str(tmp_path)))
    )
    there = tmp_path / "x.jsonl"
    there.write_text("".join(LINES))
    lines = Lines("gs://bucket/x.jsonl", below=2)
    lines.write({"step": 2})
    assert there.read_text() == "".join(LINES)
    lines.publish()
    assert tracking.read(there) == [*map(json.loads, LINES[:2]), {"step": 2}]
    lines.drop(1)
    lines.close()
    assert there.read_text() == LINES[0]


# --- Speed ---------------------------------------------------------------------------------------
def test_peaks_are_those_that_plans_count_with():
    known = {"TPU v5 lite": "v5e", "TPU v5p": "v5p", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
    known["TPU7x"] = "tpu7x"
    assert {
        kind: chips.GENERATIONS[name].flops for kind, name in known.items()
    } == tracking.PEAK_FLOPS


def test_utilization_is_of_all_devices_and_of_known_ones_only(monkeypatch):
    config = presets.get("tiny-llama4-scout").make()
    assert tracking.utilization(config, 64, 1e3) is None
    device = types.SimpleNamespace(device_kind="TPU v6 lite")
    monkeypatch.setattr(jax, "devices", lambda: [device] * 4)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    flops = roofline.training_flops(config, 64)
    assert tracking.utilization(config, 64, 4 * 918e12 / flops) == pytest.approx(1.0)


# --- Services ------------------------------------------------------------------------------------
def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboardX", reason="extra [track] is not installed")
    board = tracking.TensorBoard(str(tmp_path), step=0)
    board.log({"step": 3, "loss": 0.5, "eval_loss": None})
    board.close()
    (file,) = tmp_path.iterdir()
    written = file.read_bytes()
    assert b"loss" in written
    assert np.float32(0.5).tobytes() in written
    assert b"eval_loss" not in written
    assert b"step" not in written


def test_wandb_is_told_the_run_and_its_numbers(monkeypatch):
    told = []

    class Run:
        def log(self, numbers, step):
            told.append((step, numbers))

        def finish(self):
            told.append("finished")

    def init(**options):
        told.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    tracker = tracking.WandB("mine", name="run-1", folder="/tmp", config={"a": 1})
    tracker.log({"step": 3, "loss": 0.5})
    tracker.close()
    assert told[0] == {
        "project": "mine",
        "id": "run-1",
        "name": "run-1",
        "dir": "/tmp",
        "config": {"a": 1},
        "resume": "allow",
    }
    assert told[1:] == [(3, {"loss": 0.5}), "finished"]


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("tensorboardX", lambda: tracking.TensorBoard("x", step=0)),
        ("wandb", lambda: tracking.WandB("x", name="x", folder="x", config={})),
    ],
)
def test_a_missing_package_is_named_with_what_brings_it(monkeypatch, package, make):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package}.*pip install 'l4jax\[track\]'"):
        make()


def test_a_bar_shows_what_is_known():
    shown = io.StringIO()
    bar = tracking.Bar(Console(file=shown, force_terminal=True, width=120), 10, 2)
    bar.log({"step": 4, "loss": None, "tokens_per_second": 1234.5, "mfu": 0.412})
    bar.close()
    last = shown.getvalue().replace("\x1b[0m", "")
    for word in ("50%", "loss not finite", "1,2", "tokens/s", "MFU 41.2%"):
        assert word in last, word


def test_lines_without_room_wait_for_it(tmp_path, capsys):
    """A full disk takes half a line and then nothing, and has room again later."""

    class Full:
        def __init__(self, file, room):
            self.file, self.room = file, room

        def write(self, data):
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken, self.room = data[: self.room], max(0, self.room - len(data))
            return self.file.write(taken)

        def close(self):
            self.file.close()

    lines = tracking.Lines(tmp_path / "x.jsonl", below=0)
    lines.write({"step": 0})
    lines._file = Full(lines._file, 5)
    lines.write({"step": 1})
    lines.write({"step": 2})
    assert [line["step"] for line in tracking.read(tmp_path / "x.jsonl")] == [0]
    assert capsys.readouterr().err.count("No space left") == 1
    with pytest.raises(OSError, match="No space"):
        lines.close()
    lines._file.room = 1000
    lines.write({"step": 3})
    lines.close()
    assert [line["step"] for line in tracking.read(tmp_path / "x.jsonl")] == [0, 1, 2, 3]
