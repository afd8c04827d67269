"""The demo goes from raw text to a checkpoint that reads back, and reports what it did."""

import dataclasses
import io
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from l4jax import checkpoints, cli, demo, presets, roofline
from l4jax.checkpoints.orbax import from_json
from l4jax.config import TextConfig
from l4jax.data import corpus, tokenizer

STEPS = 3
WORDS = ["def", "class", "return", "import", "self", "value", "for", "in", "range", "print"]
FILES = {"config.json", "metrics.jsonl", "report.json", "report.txt", "curves.png", "experts.png"}
MARKER = ".l4jax-demo"
FOLDERS = {"tokenizer", "checkpoint", "export"}


def small_corpus():
    draw = random.Random(0)

    def document():
        return "\n".join(" ".join(draw.choices(WORDS, k=6)) + " = 1" for _ in range(60))

    return corpus.Corpus([document() for _ in range(20)], [document() for _ in range(8)])


def two_layers(vocab_size, make=demo.model_config):
    """The demo's model with one chunked and one global layer, to compile in half the time."""
    config = make(vocab_size)
    return dataclasses.replace(config, num_layers=2, pattern=config.pattern[-2:])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "new" / "folder"


@pytest.fixture(scope="module")
def console():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def report(out, console):
    """A demo of three steps with short rows and two layers on a small made-up corpus."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "standard_library", small_corpus)
        patch.setattr(demo, "VOCABULARY", 320)
        patch.setattr(demo, "LENGTH", 32)
        patch.setattr(demo, "model_config", two_layers)
        return demo.run(out, steps=STEPS, seed=1, console=console)


def test_every_file_that_it_names_is_there_and_no_other(report, out):
    assert {path.name for path in out.iterdir()} == FILES | FOLDERS | {MARKER}
    assert report["files"] == {name: str(out / name) for name in FILES | FOLDERS}
    for name in FILES:
        assert (out / name).stat().st_size > 0
    for picture in ("curves.png", "experts.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_the_report_is_plain_json_and_the_file_holds_the_same(report, out):
    assert json.loads(json.dumps(report)) == json.loads((out / "report.json").read_text())


def test_losses_are_numbers_that_agree_with_each_other(report, out):
    losses = report["held_out_loss"]
    assert all(0 < loss < 20 for loss in losses.values())
    assert losses["bigram"] < losses["unigram"]
    assert losses["before"] > math.log(256)
    assert report["beats_bigram"] == (losses["after"] < losses["bigram"])


def test_metrics_hold_one_line_for_each_step(report, out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    for line in lines:
        assert set(line) == {
            "step", "loss", "grad_norm", "learning_rate", "tokens_per_second", "router_entropy"
        }  # fmt: skip
        assert all(math.isfinite(value) for value in line.values())
    assert lines[0]["learning_rate"] == 0 < lines[1]["learning_rate"]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_parameters_and_load_are_those_of_the_configuration(report, out):
    written = json.loads((out / "config.json").read_text())
    config = from_json(TextConfig, written["model"])
    assert {**written, "model": 0} == {**report["settings"], "model": 0}
    assert report["settings"] == {"steps": STEPS, "seed": 1, "batch": demo.BATCH, "length": 32}
    counts = roofline.parameters(config)
    assert (report["parameters"], report["active_parameters"]) == (counts.total, counts.active)
    load = np.array(report["expert_load"])
    assert load.shape == (config.num_layers, config.moe.num_experts)
    assert (load.sum(1) == load.sum(1)[0]).all()
    assert load.sum(1)[0] >= report["held_out_tokens"] > 0


def test_both_checkpoints_give_the_same_logits_bit_for_bit(report):
    assert report["largest_logit_difference"] == {"checkpoint": 0, "export": 0}


@pytest.mark.parametrize("name", ["checkpoint", "export"])
def test_what_it_saved_loads_with_its_tokenizer(report, out, name):
    config = checkpoints.read_config(out / name)
    coder = tokenizer.load(out / name)
    assert config.vocab_size == coder.vocab_size
    assert coder.decode(coder.encode("def name")) == "def name"


def test_the_export_names_its_begin_and_end_tokens(report, out):
    values = json.loads((out / "export" / "config.json").read_text())
    coder = tokenizer.load(out / "tokenizer")
    assert values["bos_token_id"] == coder.bos_id
    assert tuple(values["eos_token_id"]) == coder.stop_ids


def test_there_is_a_sample_for_every_prompt(report):
    assert [sample["prompt"] for sample in report["samples"]] == list(demo.PROMPTS)
    assert any(sample["text"] for sample in report["samples"])


def test_the_printed_report_tells_the_main_results(report, out, console):
    text = (out / "report.txt").read_text()
    for name, loss in report["held_out_loss"].items():
        assert f"{loss:.3f}" in text, name
    assert f"{report['parameters']:,} parameters" in text
    assert ("does not beat the bigram" in text) == (not report["beats_bigram"])
    assert "20 files to train on, 8 held out" in console.file.getvalue()


def test_torch_and_transformers_are_not_needed():
    code = "import sys, l4jax.demo; print({'torch', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert found.stdout == "set()\n", found.stderr


def test_its_model_is_a_small_scout_that_crosses_chunk_and_temperature_floor_in_a_row():
    config, scout = demo.model_config(512), presets.llama4_scout()
    assert config.pattern == scout.pattern
    assert config.num_layers % len(config.pattern) == 0
    assert config.attention.qk_norm
    assert config.moe.shared_mlp_dim > 0
    assert config.attention.chunk_size < demo.LENGTH
    assert config.attention.temperature.floor < demo.LENGTH
    assert config.max_context >= demo.LENGTH
    assert roofline.parameters(config).total < 10e6


class Begun(Exception):
    """The demo got past its checks."""


@pytest.fixture
def attempt(monkeypatch, console):
    """Starts a demo that goes no further than its first stage."""

    def prepare(*_, **__):
        raise Begun

    monkeypatch.setattr(demo, "prepare", prepare)
    return lambda out, steps=STEPS: demo.run(out, steps=steps, seed=0, console=console)


@pytest.mark.parametrize("steps", [1, 0, -5])
def test_too_few_steps_are_refused_before_anything_is_removed(attempt, tmp_path, steps):
    (tmp_path / "report.json").touch()
    with pytest.raises(ValueError, match=f"steps {steps} must be at least 2"):
        attempt(tmp_path, steps)
    assert (tmp_path / "report.json").exists()


def test_an_earlier_demo_is_replaced(attempt, report, out, tmp_path):
    for name in FILES:
        (tmp_path / name).write_bytes((out / name).read_bytes())
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "anything").touch()
    (tmp_path / MARKER).touch()
    with pytest.raises(Begun):
        attempt(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [MARKER]


@pytest.mark.parametrize("name", ["thesis.txt", ".git", "checkpoint-1000"])
def test_a_folder_with_anything_else_is_left_as_it_is(attempt, tmp_path, name):
    (tmp_path / name).touch()
    (tmp_path / MARKER).touch()
    (tmp_path / "report.json").write_text("old")
    with pytest.raises(ValueError, match=f"holds '{name}', which no demo made"):
        attempt(tmp_path)
    assert (tmp_path / "report.json").read_text() == "old"


def test_another_recipes_folder_is_left_as_it_is(attempt, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("a week of training")
    with pytest.raises(ValueError, match="holds 'metrics.jsonl', which no demo made"):
        attempt(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "a week of training"


def test_a_file_in_place_of_the_folder_is_refused(attempt, tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(ValueError, match="is a file; --out needs a folder"):
        attempt(file)
    assert file.read_text() == "kept"


def test_the_folder_may_be_the_current_one_or_a_link(attempt, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "report.json").touch()
    (folder / MARKER).touch()
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(Begun):
        attempt(link)
    assert link.is_symlink()
    assert [path.name for path in folder.iterdir()] == [MARKER]
    (folder / "report.json").touch()
    monkeypatch.chdir(folder)
    with pytest.raises(Begun):
        attempt(type(folder)("."))
    assert [path.name for path in folder.iterdir()] == [MARKER]


@pytest.mark.slow
def test_the_whole_demo_learns_more_than_pairs_of_tokens(tmp_path, console):
    """With the real corpus and the command line's own number of steps; then once more over it."""
    first = demo.run(tmp_path, steps=cli.Demo().steps, seed=0, console=console)
    assert first["beats_bigram"]
    assert first["held_out_loss"]["after"] < first["held_out_loss"]["bigram"]
    assert first["largest_logit_difference"] == {"checkpoint": 0, "export": 0}
    load = np.array(first["expert_load"])
    assert (load / load.sum(1, keepdims=True)).min() > 0.02, "every expert is in use"
    again = demo.run(tmp_path, steps=2, seed=0, console=console)
    assert again["held_out_loss"]["before"] == first["held_out_loss"]["before"]
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["steps"] == 2
