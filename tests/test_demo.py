"""The demo goes from raw text to a tuned model that reads back, and reports what it did."""

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
from l4jax.data import corpus, mined, templates, tokenizer
from l4jax.demo import stages
from tests.test_mined import source

STEPS = 8
UPDATES = {"pretrain": 8, "sft": 2, "dpo": 2}
PICTURES = {"curves.png", "sft.png", "dpo.png", "experts.png"}
FILES = {"config.json", "metrics.jsonl", "report.json", "report.txt"} | PICTURES
MARKER = ".l4jax-demo"
FOLDERS = {"tokenizer", "checkpoint", "export"}


def small_corpus():
    draw = random.Random(0)
    return corpus.Corpus([source(draw) for _ in range(20)], [source(draw) for _ in range(8)])


def two_layers(vocab_size, make=stages.model_config):
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
    """A demo of a few steps with short rows and two layers on a small made-up corpus."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "standard_library", small_corpus)
        patch.setattr(stages, "VOCABULARY", 320)
        patch.setattr(stages, "LENGTH", 128)
        patch.setattr(stages, "ASKED", 60)
        patch.setattr(stages, "model_config", two_layers)
        return demo.run(out, steps=STEPS, seed=1, console=console)


def test_every_file_that_it_names_is_there_and_no_other(report, out):
    assert {path.name for path in out.iterdir()} == FILES | FOLDERS | {MARKER}
    assert report["files"] == {name: str(out / name) for name in FILES | FOLDERS}
    for name in FILES:
        assert (out / name).stat().st_size > 0
    for picture in PICTURES:
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_the_report_is_plain_json_and_the_file_holds_the_same(report, out):
    assert json.loads(json.dumps(report)) == json.loads((out / "report.json").read_text())


def test_losses_are_numbers_that_agree_with_each_other(report, out):
    losses = report["held_out_loss"]
    assert all(0 < loss < 20 for loss in losses.values())
    assert losses["bigram"] < losses["unigram"]
    assert losses["before"] > math.log(256)
    assert losses["after"] < losses["before"]
    assert losses["after"] == report["stages"]["pretrain"]["documents"]
    assert report["beats_bigram"] == (losses["after"] < losses["bigram"])


def test_every_stage_is_examined_the_same_way(report):
    assert list(report["stages"]) == ["pretrain", "sft", "dpo"]
    for exam in report["stages"].values():
        assert 0 < exam["documents"] < 20
        assert 0 < exam["answers"] < 20
        assert 0 <= exam["prefers_chosen"] <= 1
        assert set(exam["exact_match_by_kind"]) == set(mined.EXACT) - set(stages.HARD)
        shares = list(exam["exact_match_by_kind"].values())
        assert min(shares) <= exam["exact_match"] <= max(shares)
    before, after = (report["stages"][name]["answers"] for name in ("pretrain", "sft"))
    assert after < before
    assert 0 < report["guessed_exact_match"] < 1


def test_rewards_are_relative_to_the_model_that_dpo_began_with(report, metrics):
    first = metrics["dpo"][0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(first["margin"]) < 1e-3
    rewards = report["stages"]["dpo"]["rewards"]
    assert rewards["margin"] == pytest.approx(
        rewards["chosen_reward"] - rewards["rejected_reward"], abs=1e-5
    )
    assert rewards["margin"] != 0


@pytest.fixture(scope="module")
def metrics(report, out):
    """Lines of metrics by stage, in which each has its place."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = [line["stage"] for line in lines]
    assert names == [name for name, steps in UPDATES.items() for _ in range(steps)]
    return {name: [line for line in lines if line["stage"] == name] for name in UPDATES}


def test_metrics_hold_one_line_for_each_step(metrics):
    shared = {
        "stage", "step", "loss", "grad_norm", "learning_rate", "tokens_per_second", "router_entropy"
    }  # fmt: skip
    preferences = {"accuracy", "margin", "chosen_reward", "rejected_reward", "nll"}
    for name, lines in metrics.items():
        assert [line["step"] for line in lines] == list(range(UPDATES[name]))
        for line in lines:
            assert set(line) == shared | (preferences if name == "dpo" else set())
            assert all(math.isfinite(value) for key, value in line.items() if key != "stage")
        assert lines[0]["learning_rate"] == 0 < lines[1]["learning_rate"]
    assert metrics["pretrain"][-1]["loss"] < metrics["pretrain"][0]["loss"]


def test_parameters_and_load_are_those_of_the_configuration(report, out):
    written = json.loads((out / "config.json").read_text())
    config = from_json(TextConfig, written["model"])
    assert {**written, "model": 0} == {**report["settings"], "model": 0}
    assert report["settings"] == {
        "steps": UPDATES, "seed": 1, "batch": stages.BATCH, "length": 128
    }  # fmt: skip
    counts = roofline.parameters(config)
    assert (report["parameters"], report["active_parameters"]) == (counts.total, counts.active)
    load = np.array(report["stages"]["pretrain"]["expert_load"])
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


@pytest.mark.parametrize("name", ["checkpoint", "export"])
def test_what_it_saved_answers_in_a_chat(report, out, name, capsys):
    """The command line says what the last stage's model said."""
    assert (out / name / "chat_template.jinja").read_text() == templates.chat_template("llama4")
    item = next(x for x in report["answers"] if not x["dpo"].endswith("\ufffd…"))
    command = ["generate", str(out / name), "--chat", "--prompt", item["question"]]
    assert cli.main([*command, "--max-new-tokens", "32"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == item["dpo"].removesuffix("…").rstrip("\n")


def test_there_is_a_sample_for_every_prompt_and_an_answer_of_every_kind(report):
    assert [sample["prompt"] for sample in report["samples"]] == list(stages.PROMPTS)
    assert any(sample["text"] for sample in report["samples"])
    assert [item["kind"] for item in report["answers"]] == sorted(
        set(mined.QUESTIONS) - set(stages.HARD)
    )
    for item in report["answers"]:
        assert set(item) == {"kind", "question", "answer", *UPDATES}


def test_the_printed_report_tells_the_main_results(report, out, console):
    text = (out / "report.txt").read_text()
    for name, loss in report["held_out_loss"].items():
        assert f"{loss:.3f}" in text, name
    for name, exam in report["stages"].items():
        for value in (exam["documents"], exam["answers"]):
            assert f"{value:.3f}" in text, name
        assert f"{exam['exact_match']:.1%}" in text
    assert f"{report['stages']['dpo']['rewards']['accuracy']:.1%} of pairs" in text
    assert all(item["question"] in text for item in report["answers"])
    assert f"{report['parameters']:,} parameters" in text
    assert ("does not beat the bigram" in text) == (not report["beats_bigram"])
    assert "20 files to train on, 8 held out" in console.file.getvalue()


def test_torch_and_transformers_are_not_needed():
    code = "import sys, l4jax.demo; print({'torch', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert found.stdout == "set()\n", found.stderr


def test_its_model_is_a_small_scout_that_crosses_chunk_and_temperature_floor_in_a_row():
    config, scout = stages.model_config(512), presets.llama4_scout()
    assert config.pattern == scout.pattern
    assert config.num_layers % len(config.pattern) == 0
    assert config.attention.qk_norm
    assert config.moe.shared_mlp_dim > 0
    assert config.attention.chunk_size < stages.LENGTH
    assert config.attention.temperature.floor < stages.LENGTH
    assert config.max_context >= stages.LENGTH
    assert roofline.parameters(config).total < 10e6


class Begun(Exception):
    """The demo got past its checks."""


@pytest.fixture
def attempt(monkeypatch, console):
    """Starts a demo that goes no further than its first stage."""

    def prepare(*_, **__):
        raise Begun

    monkeypatch.setattr(stages, "prepare", prepare)
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
    load = np.array(first["stages"]["pretrain"]["expert_load"])
    assert (load / load.sum(1, keepdims=True)).min() > 0.02, "every expert is in use"
    pretrained, tuned, aligned = first["stages"].values()
    assert tuned["exact_match"] > pretrained["exact_match"] + 0.4
    assert tuned["exact_match"] > first["guessed_exact_match"], "it reads the question"
    assert tuned["answers"] < pretrained["answers"] - 1
    assert aligned["prefers_chosen"] > tuned["prefers_chosen"] + 0.05
    assert aligned["rewards"]["accuracy"] > 0.7
    assert aligned["rewards"]["margin"] > 0
    assert aligned["answers"] < tuned["answers"] + 0.15, "it still knows the answers"
    assert aligned["documents"] < tuned["documents"] + 0.2, "and how code goes on"
    again = demo.run(tmp_path, steps=2, seed=0, console=console)
    assert again["held_out_loss"]["before"] == first["held_out_loss"]["before"]
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["steps"]["sft"] == 2
