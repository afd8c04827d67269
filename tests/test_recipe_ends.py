"""Recipes are refused before they work, told to stop at any time, and leave whole models."""

import json
import os
import pathlib
import signal

import numpy as np
import pytest
from conftest import build
from etils import epath
from toy_recipes import CONFIG, call, lines, make

from experiments import leaves, pretrain, saving, sft
from experiments import midtrain_long_context as midtrain
from l4jax import checkpoints
from l4jax.data import tokenizer as tokenizers
from l4jax.data import tokenizing
from l4jax.training import checkpointing, loop

SMALL = ("--steps=4", "--warmup=1", "--length=64", "--batch=2", "--checkpoint-every=2")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, texts, and conversations."""
    folder = make(tmp_path_factory.mktemp("files"))
    turns = [[("user", f"{n}?"), ("assistant", "red " * (n % 3 + 1))] for n in range(9)]
    records = [{"messages": [{"role": r, "content": c} for r, c in talk]} for talk in turns]
    (folder / "talk.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def train(files, monkeypatch):
    """Goes on with the toy model on its texts; the exit status."""

    def train(out, *more):
        given = ("--checkpoint", files / "model", "--data", files / "texts", "--prompts")
        return call(pretrain, pretrain.Pretrain(), monkeypatch, "--out", out, *given, *SMALL, *more)

    return train


@pytest.fixture
def tune(files, monkeypatch):
    """Fine-tunes the toy model; the exit status."""

    def tune(out, *more):
        given = ("--checkpoint", files / "model", "--data", files / "talk.jsonl")
        return call(sft, sft.Sft(), monkeypatch, "--out", out, *given, *SMALL, *more)

    return tune


def told(capsys):
    """The last line of the errors."""
    return capsys.readouterr().err.splitlines()[-1]


def usage(capsys, function, *arguments):
    """What a recipe says of arguments that cannot be, in one line."""
    with pytest.raises(SystemExit, match="2"):
        function(*arguments)
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


# --- Told to stop --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("number", "status", "words"),
    [
        (signal.SIGTERM, 143, "pretrain: told to stop; --resume goes on"),
        (signal.SIGINT, 130, "pretrain: interrupted"),
    ],
)
def test_a_recipe_that_only_reads_leaves_no_mess(
    train, tmp_path, monkeypatch, capsys, number, status, words
):
    before = signal.getsignal(signal.SIGTERM)
    tried, seen = tokenizing._tried, []

    def told_at_the_third(encode, record):
        seen.append(len(list(tmp_path.rglob("*.part"))))
        if len(seen) == 3:
            os.kill(os.getpid(), number)
        return tried(encode, record)

    monkeypatch.setattr(tokenizing, "_tried", told_at_the_third)
    assert train(tmp_path / "out") == status
    assert told(capsys) == words
    assert seen == [1, 1, 1]
    assert list((tmp_path / "out" / "data").iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_is_stopped_saves_and_does_no_more(train, tmp_path, monkeypatch, capsys):
    update = loop._Run._update

    def tell(self, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        update(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "_update", tell)
        assert train(tmp_path / "out") == 143
    assert "stop after 1 steps, which are saved; --resume goes on" in told(capsys)
    assert (tmp_path / "out" / "checkpoints" / "1" / "run.json").exists()
    assert not (tmp_path / "out" / "model").exists()
    assert train(tmp_path / "out", "--resume") == 0
    assert [line["step"] for line in lines(tmp_path / "out")] == [0, 1, 2, 3]
    assert (tmp_path / "out" / "model").exists()


# --- Refused before there is work ----------------------------------------------------------------
@pytest.fixture
def unread(monkeypatch):
    """Fails if anything is tokenized."""

    def tokenize(*_, **__):
        raise AssertionError("tokenized too early")

    monkeypatch.setattr(tokenizing, "tokenize", tokenize)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--eval-data", "nix.txt"), "nix.txt: no such file or folder"),
        (("--length=100",), "length 100 exceeds the model's longest context of 80"),
        (("--batch=3", "--mesh=data=2"), "data=2 does not divide the 3 rows"),
        (("--ramp", "0:2", "2:3", "--mesh=data=2"), "data=2 does not divide the 3 rows"),
        (("--mesh=fsdp=3",), "fsdp=3"),
        (("--checkpoint=gs://b/x",), "l4jax convert gs://b/x FOLDER --to orbax copies it"),
    ],
)
def test_pre_training_is_refused_at_once(train, tmp_path, unread, capsys, arguments, words):
    assert train(tmp_path / "out", *arguments) == 1
    assert words in told(capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rank=2", "--adapt", "*.nix"), "pattern '*.nix' fits no parameter"),
        (("--rank=99",), "rank 99 must be from 1 to"),
        (("--frozen", "*.nix"), "pattern '*.nix' fits no parameter"),
        (("--rank=2", "--quantize=int4", "--group=7"), "int4 groups of 7 do not divide"),
        (("--keep-hardest=0.5", "--scorer=nix"), "nix: no such checkpoint"),
    ],
)
def test_fine_tuning_is_refused_at_once(tune, tmp_path, unread, capsys, arguments, words):
    assert tune(tmp_path / "out", *arguments) == 1
    assert words in told(capsys)


def test_leaves_that_do_not_go_together_are_bad_usage(train, tune, tmp_path, capsys):
    out = tmp_path / "out"
    assert "weights (0.0,) must be above 0" in usage(capsys, train, out, "--weights", 0)
    words = "image_folder photos belongs to --images"
    assert words in usage(capsys, tune, out, "--image-folder", "photos")
    words = "accumulate 2 does not divide batch 3"
    assert words in usage(capsys, train, out, "--ramp", "0:2", "2:3", "--accumulate=2")
    words = "quantize int8: Hugging Face's files are written of plain weights only"
    assert words in usage(capsys, tune, out, "--rank=2", "--quantize=int8", "--export")
    words = "out s3://bucket/x: a run is kept in a folder or at a gs:// address"
    assert words in usage(capsys, train, "s3://bucket/x")
    words = "of a model at an address l4jax convert gs://b/x/model FOLDER --to hf makes the same"
    assert words in usage(capsys, tune, "gs://b/x", "--export")


def test_a_later_stage_is_refused_before_the_first(files, tmp_path, unread, monkeypatch, capsys):
    given = ("--checkpoint", files / "model", "--data", files / "texts", "--warmup=1")
    given += ("--lengths", 64, 96, "--meshes", "data=2", "context=5", "--out", tmp_path / "out")
    assert call(midtrain, midtrain.Midtrain(), monkeypatch, *given) == 1
    assert "context=5 does not divide" in told(capsys)


def test_a_place_where_nothing_can_be_written_is_named(train, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out, words in (
        (tmp_path / "file", "is a file: give a folder"),
        (tmp_path / "file" / "out", "nothing can be written there: Not a directory"),
        ("/proc/nope", "--out /proc/nope: nothing can be written there: No such file"),
    ):
        assert train(out) == 1
        assert words in told(capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_is_no_checkpoint_but_has_one(train, files, tmp_path, capsys):
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert train(tmp_path / "out", "--checkpoint", tmp_path / "run") == 1
    assert told(capsys).endswith(f"is no checkpoint; did you mean {tmp_path / 'run' / 'model'}?")
    assert train(tmp_path / "out", "--checkpoint", files / "talk.jsonl") == 1
    assert "a checkpoint is a directory, this is a file" in told(capsys)


# --- Going on ------------------------------------------------------------------------------------
def test_a_finished_run_can_still_be_exported(tune, tmp_path):
    out = tmp_path / "out"
    assert tune(out) == 0
    before = lines(out)
    assert tune(out, "--resume", "--export", "--checkpoint-every=3", "--on-nonfinite=stop") == 0
    assert checkpoints.detect(out / "export")[1] == "hf"
    assert lines(out) == before


@pytest.mark.parametrize("change", ["gone", "other"])
def test_a_run_goes_on_with_the_tokens_that_it_began_with(train, files, tmp_path, capsys, change):
    own = tmp_path / "own.txt"
    own.write_text((files / "texts" / "0.txt").read_text())
    given = (tmp_path / "out", "--data", own)
    assert train(*given) == 0
    kept = (tmp_path / "out" / "data" / "train-0" / "tokens.bin").read_bytes()
    own.write_text("something else") if change == "other" else own.unlink()
    capsys.readouterr()
    assert train(*given, "--resume") == 0
    assert "is gone or has changed; going on with its tokens in" in " ".join(
        capsys.readouterr().err.split()
    )
    assert (tmp_path / "out" / "data" / "train-0" / "tokens.bin").read_bytes() == kept


# --- Models --------------------------------------------------------------------------------------
@pytest.fixture
def tokenizer(files):
    return tokenizers.load(files / "model")


def test_an_earlier_model_goes_when_the_new_one_is_whole(tokenizer, tmp_path, monkeypatch):
    folder, complete = epath.Path(tmp_path / "model"), saving._complete
    for scale in (1.0, 2.0):
        model = build(CONFIG)
        model.head[...] = model.head[...] * scale
        saving.save_model(model, tokenizer, folder)
        assert os.listdir(tmp_path) == ["model"]

    def full(new, *rest):
        assert pathlib.Path(new).exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "_complete", full)
    with pytest.raises(OSError, match="No space left"):
        saving.save_model(build(CONFIG), tokenizer, folder)
    assert os.listdir(tmp_path) == ["model"]
    np.testing.assert_array_equal(checkpoints.load(folder).head[...], model.head[...])
    # One that was killed has left its part.
    monkeypatch.setattr(saving, "_complete", complete)
    (tmp_path / ".model.new" / "parameters").mkdir(parents=True)
    saving.save_model(build(CONFIG), tokenizer, folder, to="hf")
    assert os.listdir(tmp_path) == ["model"]
    assert checkpoints.detect(folder)[1] == "hf"


def test_at_an_address_what_marks_a_model_comes_last(tokenizer, tmp_path, monkeypatch):
    folder, model = epath.Path(tmp_path / "model"), build(CONFIG)
    saving.save_at_address(model, tokenizer, folder)
    np.testing.assert_array_equal(checkpoints.load(folder).head[...], model.head[...])
    assert tokenizers.load(folder).vocab_size == tokenizer.vocab_size

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "_complete", killed)
    with pytest.raises(KeyboardInterrupt):
        saving.save_at_address(model, tokenizer, folder)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoints.detect(folder)


def test_a_run_at_an_address_leaves_its_model_there(train, tmp_path, monkeypatch):
    """The address is a folder here: what is written there is the same."""
    there = epath.Path(tmp_path / "bucket" / "run")
    monkeypatch.setattr(leaves.Recipe, "folder", there)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train("gs://bucket/run") == 0
    assert checkpoints.read_config(there / "model") == CONFIG
    assert {path.name for path in there.iterdir()} == {
        *("checkpoints", "config.json", "curves.png", "events.jsonl", "metrics.jsonl", "model"),
    }
    (cache,) = (tmp_path / ".cache" / "l4jax" / "data").iterdir()
    monkeypatch.setattr(leaves.Recipe, "folder", epath.Path(tmp_path / "other" / "run"))
    assert train("gs://other/run") == 0
    assert len(list(cache.parent.iterdir())) == 2, "runs of one name share no tokens"


def test_a_file_that_cannot_be_written_leaves_no_part(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    file = epath.Path(tmp_path / "x.json")
    monkeypatch.setattr(type(file), "replace", full)
    with pytest.raises(OSError, match="No space left"):
        checkpointing.write(file, "{}")
    assert os.listdir(tmp_path) == []
