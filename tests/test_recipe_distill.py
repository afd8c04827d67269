"""Distillation: who teaches, when, and how much does not change when a run is killed or cached."""

import dataclasses
import json
import re

import numpy as np
import pytest
from toy_recipes import CONFIG, VOCABULARY, Killed, call, lines, make

from experiments import distill
from l4jax import checkpoints, presets
from l4jax.planning import chips, meshes
from l4jax.training import objectives, teacher, tracking

STEPS = 5
TEACHER = {"soft", "soft_weight", "hard"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make(tmp_path_factory.mktemp("files"))


@pytest.fixture
def go(files, monkeypatch):
    """Runs the recipe on the toy files; its exit status."""

    def go(out, *more):
        return call(
            *(distill, distill.Distill(), monkeypatch, "--out", out),
            *("--teacher", files / "model", "--data", files / "texts"),
            *("--eval-data", files / "rest", "--batch=2", "--length=48", "--top=9"),
            *(f"--steps={STEPS}", "--evaluate-every=5", "--checkpoint-every=2", "--warmup=1"),
            *more,
        )

    return go


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """A run that nothing happens to."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert go.__wrapped__(files, monkeypatch)(out) == 0
    return out


@pytest.fixture
def no_teacher(monkeypatch):
    """No teacher can be asked."""

    def refuse(*_, **__):
        raise AssertionError("a teacher is made")

    monkeypatch.setattr(teacher, "top_tokens", refuse)


def test_a_run_leaves_what_it_says(whole):
    assert {path.name for path in whole.iterdir()} == {
        *("checkpoints", "config.json", "curves.png", "data", "events.jsonl"),
        *("metrics.jsonl", "model"),
    }
    found = lines(whole)
    assert [line["step"] for line in found] == list(range(STEPS))
    assert np.isfinite(found[-1]["eval_loss"])
    for step, line in enumerate(found):
        weight = float(objectives.soft_weight(step, STEPS))
        assert line["soft_weight"] == pytest.approx(weight, abs=1e-6)
        expected = weight * line["soft"] + (1 - weight) * line["hard"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert checkpoints.read_config(whole / "model") == distill.half(CONFIG)


def test_weights_go_from_one_leaf_to_the_other(go, tmp_path):
    more = ("--soft", 0.25, "--soft-end", 0.75, "--steps=3", "--temperature=2.0")
    assert go(tmp_path / "out", *more) == 0
    weights = [line["soft_weight"] for line in lines(tmp_path / "out")]
    assert weights == pytest.approx([0.25, 0.5, 0.75])


@pytest.mark.parametrize("batches", [1, 3])
def test_a_killed_run_goes_on_with_the_same_weights(go, whole, tmp_path, monkeypatch, batches):
    out, weight = tmp_path / "out", objectives.soft_weight

    def dies(step, *rest, **more):
        if step == batches:
            raise Killed
        return weight(step, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(objectives, "soft_weight", dies)
        with pytest.raises(Killed):
            go(out)
    assert go(out, "--resume") == 0
    assert lines(out) == lines(whole)


def test_answers_on_disk_are_those_of_the_teacher(go, whole, tmp_path, request):
    assert go(tmp_path / "first", "--cache", "teacher") == 0
    cache = tmp_path / "first" / "teacher"
    assert json.loads((cache / "about.json").read_text())["rows"] == 2 * STEPS
    request.getfixturevalue("no_teacher")
    assert go(tmp_path / "second", "--cache", cache) == 0
    assert lines(tmp_path / "first") == lines(tmp_path / "second") == lines(whole)
    # More steps have batches that nobody asked the teacher about.
    assert go(tmp_path / "third", "--cache", cache, f"--steps={STEPS + 1}") == 1


def test_without_weight_there_is_no_teacher(go, whole, tmp_path, no_teacher):
    out = tmp_path / "out"
    assert go(out, "--soft", 0) == 0
    found = lines(out)
    assert not TEACHER & set(found[0])
    # The same student on the same data: the first hard loss is the same.
    assert found[0]["loss"] == pytest.approx(lines(whole)[0]["hard"], rel=1e-5)
    assert found[-1]["eval_loss"] != lines(whole)[-1]["eval_loss"]


def test_a_teacher_may_lie_on_other_devices(go, whole, tmp_path):
    out = tmp_path / "out"
    assert go(out, "--mesh", "data=2", "--teacher-mesh", "fsdp=2,context=2") == 0
    for here, there in zip(lines(whole), lines(out), strict=True):
        assert there["loss"] == pytest.approx(here["loss"], rel=1e-4)
    assert go(tmp_path / "many", "--mesh", "data=2", "--teacher-mesh", "data=8") == 1


@pytest.mark.slow
def test_a_teacher_may_learn_too(go, whole, files, tmp_path, monkeypatch):
    """Killed and resumed: both models go on; and both are saved."""
    out, weight = tmp_path / "out", objectives.soft_weight

    def dies(step, *rest, **more):
        if step == 3:
            raise Killed
        return weight(step, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(objectives, "soft_weight", dies)
        with pytest.raises(Killed):
            go(out, "--codistill")
    assert go(out, "--codistill", "--resume") == 0
    assert go(tmp_path / "second", "--codistill") == 0
    found, frozen = lines(out), lines(whole)
    assert found == lines(tmp_path / "second")
    # The first answers are those of the teacher as it was.
    assert found[0]["soft"] == pytest.approx(frozen[0]["soft"], rel=1e-4)
    assert found[-1]["soft"] != pytest.approx(frozen[-1]["soft"], rel=1e-4)
    assert found[-1]["eval_teacher_loss"] < found[0]["teacher_loss"]
    assert go(tmp_path / "slow", "--codistill", "--rates", "teacher.*", 0) == 0
    still, alone = lines(tmp_path / "slow"), lines(out)
    assert still[-1]["eval_teacher_loss"] > alone[-1]["eval_teacher_loss"]
    assert still[-1]["soft"] == pytest.approx(frozen[-1]["soft"], rel=1e-4)
    assert checkpoints.read_config(out / "teacher") == CONFIG
    assert checkpoints.read_config(out / "model") == distill.half(CONFIG)
    before = checkpoints.load(files / "model")
    after = checkpoints.load(out / "teacher")
    assert not np.array_equal(before.embed[...], after.embed[...])


def test_a_student_has_half_the_width():
    teacher, student = presets.llama4_maverick(), distill.half(presets.llama4_maverick())
    assert (student.embed_dim, student.mlp_dim) == (2560, 8192)
    assert (student.attention.num_heads, student.attention.num_kv_heads) == (20, 4)
    assert (student.moe.mlp_dim, student.moe.shared_mlp_dim) == (4096, 4096)
    assert student.moe.num_experts == teacher.moe.num_experts
    assert student.attention.head_dim == teacher.attention.head_dim
    tiny = dataclasses.replace(CONFIG.attention, num_heads=1, num_kv_heads=1)
    config = dataclasses.replace(CONFIG, attention=tiny)
    assert distill.half(config).attention == tiny


def test_a_student_may_be_a_preset_with_the_same_vocabulary(go, tmp_path, capsys):
    assert go(tmp_path / "out", "--student", "tiny-llama3-8b") == 1
    message = f"the teacher has {VOCABULARY} tokens, student tiny-llama3-8b 512"
    assert message in capsys.readouterr().err
    assert go(tmp_path / "other", "--student", "llama9") == 1
    assert "no preset is called 'llama9'" in capsys.readouterr().err


@pytest.mark.parametrize("name", distill.PRESETS)
def test_a_pod_can_hold_teacher_and_student(name):
    preset, topology = distill.PRESETS[name], chips.parse("v5p:4x4x8")
    work = meshes.Work(task="train", batch=preset.batch, length=preset.length)
    for config in (presets.get(preset.student).make(), presets.llama4_maverick()):
        meshes.check(config, topology, work, meshes.parse(preset.place.mesh))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--soft", 1.5), "soft 1.5 must be at least 0 and at most 1"),
        (("--soft-end", -1), "soft_end -1.0 must be at least 0"),
        (("--top", 0), "top 0 must be at least 1"),
        (("--temperature", 0), "temperature 0.0 above 0"),
        (("--teacher-mesh", "rows=2"), "write axes and sizes such as"),
        (("--codistill", "--cache", "a"), "codistill asks a teacher that changes"),
        (("--codistill", "--soft", 0), "codistill asks a teacher that changes"),
        (("--weight", 7), "weight"),
    ],
)
def test_bad_usage_is_told_in_words(go, tmp_path, capsys, arguments, message):
    try:
        status = go(tmp_path / "out", *arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2
    words = re.findall(r"[^\s│]+", "".join(capsys.readouterr()))
    assert re.search(message, " ".join(words))
    assert not (tmp_path / "out").exists()


def test_without_a_teacher_it_says_how_to_make_one(tmp_path, monkeypatch, capsys):
    arguments = ("--out", tmp_path / "out", "--teacher", tmp_path / "none")
    assert call(distill, distill.Distill(), monkeypatch, *arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("distill: ")
    assert "no such checkpoint; give one with --teacher, or make" in line
    assert tracking.read(tmp_path / "out" / "metrics.jsonl") == []
