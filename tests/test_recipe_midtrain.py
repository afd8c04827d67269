"""Mid-training: stages end when they should, and a killed run is the run it would have been."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build
from toy_recipes import CONFIG, VOCABULARY, Killed, call, lines, make

from experiments import midtrain_long_context as midtrain
from l4jax import checkpoints, presets
from l4jax.config import Layer, RopeScaling
from l4jax.data import store
from l4jax.data import tokenizer as tokenizers
from l4jax.planning import chips, meshes

LENGTHS = (64, 96)
STEPS = 4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make(tmp_path_factory.mktemp("files"))


@pytest.fixture
def go(files, monkeypatch):
    """Runs the recipe on the toy files; its exit status."""

    def go(out, *more):
        return call(
            *(midtrain, midtrain.Midtrain(), monkeypatch, "--out", out),
            *("--checkpoint", files / "model", "--data", files / "texts"),
            *("--eval-data", files / "rest", "--lengths", *LENGTHS, "--batch=3", "--samples=1"),
            *(f"--steps={STEPS}", "--evaluate-every=2", "--checkpoint-every=2", "--warmup=1"),
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


def stage_lines(out):
    return [lines(out / f"stage-{length}") for length in LENGTHS]


# --- A whole run ---------------------------------------------------------------------------------
def test_a_run_leaves_what_it_says(whole, files):
    assert {path.name for path in whole.iterdir()} == {
        *("config.json", "report.json", "needle.png", "model", "data", "stage-64", "stage-96"),
    }
    assert {path.name for path in (whole / "stage-64").iterdir()} == {
        *("checkpoints", "config.json", "curves.png", "events.jsonl", "metrics.jsonl"),
        *("model", "stage.json"),
    }
    for found in stage_lines(whole):
        assert [line["step"] for line in found] == list(range(STEPS))
        measured = [line["step"] for line in found if "eval_needle" in line]
        assert measured == [line["step"] for line in found if "eval_short_loss" in line] == [1, 3]
        assert np.isfinite([line["eval_loss"] for line in found if "eval_loss" in line]).all()
    report = json.loads((whole / "report.json").read_text())
    assert [x["length"] for x in report["stages"]] == list(LENGTHS)
    assert [np.shape(x["after"]["needle"]) for x in report["stages"]] == [(5, 1), (5, 2)]
    assert [x["reached"] for x in report["stages"]] == [False, False]
    # A stage begins with the model of the one before it.
    first, second = report["stages"]
    assert second["before"]["short_loss"] == pytest.approx(first["after"]["short_loss"], rel=1e-5)
    model = checkpoints.load(whole / "model")
    assert model.config == dataclasses.replace(CONFIG, max_context=96)
    assert tokenizers.load(whole / "model").vocab_size <= VOCABULARY
    assert checkpoints.read_config(whole / "stage-64" / "model") == CONFIG
    before = checkpoints.load(files / "model")
    assert not np.array_equal(model.head[...], before.head[...])


def test_later_stages_have_longer_rows_of_as_many_tokens(whole):
    configs = [json.loads((whole / f"stage-{n}" / "config.json").read_text()) for n in LENGTHS]
    assert [(x["batch"], x["length"]) for x in configs] == [(3, 64), (2, 96)]
    # Of n tokens n - 1 are predicted, and fewer where rows hold several documents.
    assert 2 * 96 - 2 >= max(line["count"] for line in lines(whole / "stage-96")) > 96


# --- Going on ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("stage", "batches"),
    [*(pytest.param(0, n, marks=pytest.mark.slow) for n in (1, 3)), (1, 3)],
)
def test_a_killed_run_goes_on_where_it_was(go, whole, tmp_path, monkeypatch, stage, batches):
    out, next_batch = tmp_path / "out", midtrain.Until.__next__
    left = stage * STEPS + batches

    def dies(self):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return next_batch(self)

    with monkeypatch.context() as patch:
        patch.setattr(midtrain.Until, "__next__", dies)
        with pytest.raises(Killed):
            go(out)
    assert not (out / "model").exists()
    assert go(out, "--resume") == 0
    assert stage_lines(out) == stage_lines(whole)
    assert (out / "report.json").read_text() == (whole / "report.json").read_text()


@pytest.mark.slow
def test_a_run_killed_between_stages_goes_on(go, whole, tmp_path, monkeypatch):
    out, finish = tmp_path / "out", midtrain.recipe.finish

    def dies(stage, *rest):
        if stage.length == LENGTHS[0]:
            raise Killed
        finish(stage, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(midtrain.recipe, "finish", dies)
        with pytest.raises(Killed):
            go(out)
    assert go(out, "--resume") == 0
    assert stage_lines(out) == stage_lines(whole)
    # What is done is not done again.
    with monkeypatch.context() as patch:
        patch.setattr(midtrain, "train", None)
        assert go(out, "--resume") == 0


def test_another_run_in_the_same_folder_is_refused(go, whole, capsys):
    assert go(whole) == 1
    assert "holds a run; add --resume" in capsys.readouterr().err
    assert go(whole, "--resume", "--needles=0.25") == 1
    assert "needles: 0.7 then, 0.25 now" in capsys.readouterr().err


def test_without_held_out_texts_only_needles_count_and_it_says_so(
    files, tmp_path, monkeypatch, capsys
):
    given = ("--checkpoint", files / "model", "--data", files / "texts", "--out", tmp_path)
    given += ("--lengths", 64, "--steps=2", "--warmup=1", "--samples=1", "--found=0.01")
    assert call(midtrain, midtrain.Midtrain(), monkeypatch, *given) == 0
    assert "short texts not measured" in " ".join(capsys.readouterr().err.split())
    text = (tmp_path / "report.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["stages"][0]["after"]["short_loss"] is None
    assert "eval_short_loss" not in lines(tmp_path / "stage-64")[-1]


# --- When a stage ends ---------------------------------------------------------------------------
@pytest.fixture
def measured(monkeypatch):
    """Makes the stages measure what they are told."""

    def told(found, losses):
        values = iter(losses)

        def measure(self, model):
            return {"short_loss": next(values), "found": [found], "needle": [[found]] * 5}

        monkeypatch.setattr(midtrain.Measure, "__call__", measure)

    return told


def test_a_stage_ends_when_needles_are_found_and_short_texts_are_known_again(
    go, tmp_path, measured, monkeypatch
):
    out, finish = tmp_path / "out", midtrain.recipe.finish
    # Before; after 2 steps worse; after 4 recovered.
    measured(0.9, [1.0, 1.03, 1.01, 1.01])
    assert go(out, "--lengths", 64, "--steps=20") == 0
    assert [line["step"] for line in lines(out / "stage-64")] == [0, 1, 2, 3]
    report = json.loads((out / "report.json").read_text())["stages"]
    assert [(x["steps"], x["reached"]) for x in report] == [(4, True)]

    def dies(*_):
        raise Killed

    # Killed when the stage has ended, but has no model yet.
    out = tmp_path / "killed"
    measured(0.9, [1.0] * 3)
    with monkeypatch.context() as patch:
        patch.setattr(midtrain.recipe, "finish", dies)
        with pytest.raises(Killed):
            go(out, "--lengths", 64, "--steps=20")
    measured(0.9, [1.0] * 2)
    assert midtrain.recipe.finish is finish
    assert go(out, "--lengths", 64, "--steps=20", "--resume") == 0
    assert [line["step"] for line in lines(out / "stage-64")] == [0, 1]


@pytest.mark.parametrize(
    ("found", "loss", "expected"),
    [
        ([1.0, 1.0], 1.019, True),
        ([1.0, 0.8], 0.5, False),
        ([1.0, 1.0], 1.03, False),
        ([0.9], None, True),  # nothing held out
        ([0.8], None, False),
    ],
)
def test_all_lengths_count(found, loss, expected):
    now, first = {"found": found, "short_loss": loss}, {"short_loss": 1.0}
    assert midtrain.reached(now, first, midtrain.Midtrain()) is expected


# --- Texts ---------------------------------------------------------------------------------------
def test_pieces_are_documents_cut_to_rows():
    documents = [list(range(7)), [50], list(range(100, 106))]
    masks = [[x % 2 == 0 for x in document] for document in documents]
    pieces = midtrain.Pieces(store.MemoryStore(documents, masks), 3)
    assert pieces.lengths.tolist() == [3, 3, 1, 1, 3, 3]
    read = [pieces.tokens(n, 0, size).tolist() for n, size in enumerate(pieces.lengths.tolist())]
    assert sum(read, []) == sum(documents, [])
    assert pieces.tokens(4, 1, 3).tolist() == [101, 102]
    assert pieces.loss_mask(4, 1, 3).tolist() == [False, True]
    assert midtrain.Pieces(store.MemoryStore(documents, masks), 4).meta != pieces.meta


# --- Models --------------------------------------------------------------------------------------
def longer(config, length, *factors):
    """The configuration of the last of some stages."""
    lengths = (*range(2, 1 + len(factors)), length)
    stage = midtrain.Midtrain(length=length, lengths=lengths, rope_factors=factors)
    return midtrain.longer_config(config, stage)


def test_rope_is_stretched_as_the_stage_says():
    llama3 = presets.llama3_8b()
    assert longer(llama3, 4096) == llama3
    assert longer(llama3, 16_384) == dataclasses.replace(llama3, max_context=16_384)
    assert longer(llama3, 16_384, 1.0).attention == llama3.attention
    # Llama 3.1 is what comes of Llama 3 at 131,072 tokens and a factor of 8.
    assert longer(llama3, 131_072, 2.0, 8.0) == presets.llama3_8b(scaled=True)
    scout = presets.llama4_scout(262_144)
    assert longer(scout, 524_288, 32.0).attention.rope.scaling == RopeScaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=1.0
    )
    assert longer(scout, 524_288, 32.0).attention.temperature == scout.attention.temperature
    assert longer(scout, 524_288) == presets.llama4_scout(524_288)


def test_a_longer_model_has_the_same_parameters_and_other_angles():
    model = build(dataclasses.replace(CONFIG, pattern=(Layer("causal", "dense"),), num_layers=1))
    tokens = jnp.arange(40)[None] % VOCABULARY
    stage = midtrain.Midtrain(lengths=(128,), length=128)
    same = midtrain.lengthened(model, stage)
    assert same.config.max_context == 128
    np.testing.assert_array_equal(same(tokens), model(tokens))
    stretched = dataclasses.replace(stage, rope_factors=(64.0,))
    other = midtrain.lengthened(model, stretched)
    assert abs(other(tokens) - model(tokens)).max() > 1e-3
    for one, two in zip(jax.tree.leaves(other), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(one, two)


# --- Places --------------------------------------------------------------------------------------
def test_a_stage_runs_on_a_mesh(go, whole, tmp_path):
    out = tmp_path / "out"
    assert go(out, "--lengths", LENGTHS[0], "--meshes", "context=2") == 0
    there, here = (lines(x / f"stage-{LENGTHS[0]}") for x in (out, whole))
    for name in ("loss", "grad_norm"):
        values = [[line[name] for line in found] for found in (there, here)]
        np.testing.assert_allclose(*values, rtol=1e-3)
    assert go(tmp_path / "other", "--lengths", LENGTHS[0], "--mesh", "context=3") == 1


@pytest.mark.parametrize("name", midtrain.PRESETS)
def test_a_pod_can_hold_every_stage(name):
    preset, topology = midtrain.PRESETS[name], chips.parse("v5p:4x4x4")
    preset = dataclasses.replace(preset, out="/out")
    for stage in midtrain.stages(preset):
        work = meshes.Work(task="train", batch=stage.batch, length=stage.length)
        sizes = meshes.parse(stage.place.mesh)
        meshes.check(presets.llama4_scout(), topology, work, sizes)
        assert stage.batch * stage.length == preset.batch * preset.lengths[0]
        assert stage.length // sizes["context"] % presets.llama4_scout().attention.chunk_size == 0


# --- Refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lengths", 96, 64), "lengths .* must be at least one, and grow"),
        (("--rope-factors", 2.0), "rope_factors .* give one for each of the lengths"),
        (("--rope-factors", 2.0, 0.5), "rope_factors .* must be at least 1"),
        (("--meshes", "context=2"), "meshes .* give one for each"),
        (("--meshes", "rows=2", "context=2"), "write axes and sizes such as"),
        (("--meshes", "data=1", "data=1", "--mesh", "data=1"), "leave one out"),
        (("--needles", 1.0), "needles 1.0 must be from 0 to below 1"),
        (("--found", 0), "found 0.0 above 0"),
        (("--length", 7), "length"),
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


def test_without_a_checkpoint_it_says_how_to_make_one(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ("--out", out, "--checkpoint", tmp_path / "none")
    assert call(midtrain, midtrain.Midtrain(), monkeypatch, *arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("midtrain: ")
    assert "no such checkpoint; give one with --checkpoint, or make" in line
    assert "experiments.pretrain" in line
    assert not out.exists()
