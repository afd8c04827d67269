"""The recipe of digits shows what it says, and holds out what it says it holds out."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from toy_recipes import call, lines

from experiments import digits, leaves
from experiments.digits import KINDS, TILE, Digits
from l4jax import checkpoints
from l4jax.data import images


@pytest.mark.slow
def test_a_run_leaves_answers_and_a_model_that_sees(tmp_path, monkeypatch):
    out = tmp_path / "out"
    argv = ("--questions=40", "--held-out=9", "--steps=3", "--batch=4", "--evaluate-every=2")
    argv += ("--warmup=1", "--average=0.9", "--workers=1")
    assert call(digits, Digits(), monkeypatch, "--out", out, *argv) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["questions"] == 9
    assert report["right"].keys() == KINDS.keys()
    assert all(0 <= share <= 1 for share in report["right"].values())
    with Image.open(out / "answers.png") as drawn:
        assert drawn.width > 1000
    assert "eval_right" in lines(out)[-1]
    for name in ("model", "export"):
        vision = checkpoints.read_model(out / name).vision
        assert images.of_checkpoint(out / name, vision) == images.Settings(
            tile_size=TILE, max_tiles=2, tokens_per_tile=4
        )
    one, other = (checkpoints.load(out / name) for name in ("model", "export"))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(one.vision), nnx.state(other.vision))


def test_answers_are_those_of_the_scans():
    train, held_out = digits.questions(Digits(questions=30, held_out=10))
    assert [x.kind for x in train[:8]] == [*digits.ORDER, "one digit"]
    assert set(digits.ORDER) == set(held_out) == set(KINDS)
    for question in [*train, *(x for part in held_out.values() for x in part)]:
        shapes = [image.shape for image in question.shown]
        if question.kind == "a photo":
            assert shapes == [(TILE, TILE, 3)]
            assert question.answer in ("china", "flower")
            continue
        if question.kind == "one digit":
            assert shapes == [(TILE, TILE)]
            assert question.answer in set("0123456789")
            continue
        wide = question.kind == "two in a picture"
        assert shapes == ([(TILE, 2 * TILE)] if wide else [(TILE, TILE)] * 2)
        first, plus, second, equal, total = question.answer.split()
        assert (plus, equal, int(total)) == ("+", "=", int(first) + int(second))
    parts = digits.sources(0)
    seen, unseen = ({scan.tobytes() for scan, _ in part.scans} for part in parts)
    assert [len(part.scans) for part in parts] == [1437, 360]
    assert not seen & unseen
    for name in ("china", "flower"):  # the left three quarters, and the rest
        assert [part.photos[name].shape for part in parts] == [(427, 480, 3), (427, 160, 3)]


def test_it_takes_no_files():
    with pytest.raises(ValueError, match="makes its own pictures; use sft with --images"):
        Digits(files=leaves.Files(data=("a.jsonl",)))


@pytest.mark.slow
def test_it_learns_to_read_and_to_add(tmp_path, monkeypatch):
    """About twenty minutes on two cores."""
    out = tmp_path / "out"
    assert call(digits, Digits(), monkeypatch, "--out", out) == 0
    right = json.loads((out / "report.json").read_text())["right"]
    assert min(right.values()) > 0.93
    assert right.pop("a photo") > 0.95
    assert sum(right.values()) / len(right) > 0.95
