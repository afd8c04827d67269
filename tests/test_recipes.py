"""The recipes, one after another, on a user's own files: trained, exported, killed, refused."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from toy_recipes import call, lines

from experiments import distill, dpo, leaves, pretrain, sft
from experiments import midtrain_long_context as midtrain
from l4jax import checkpoints, lora
from l4jax.data import tokenizer as tokenizers

ROOT = pathlib.Path(__file__).parent.parent
WORDS = ("red", "green", "blue", "one", "two", "three", "is", "and")
SMALL = ["--warmup=2", "--length=64", "--batch=2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A user's own files: texts, fifty conversations of two forms, and preferences."""
    folder = tmp_path_factory.mktemp("files")
    rng = random.Random(0)
    (folder / "texts").mkdir()
    for number in range(20):
        words = [rng.choice(WORDS) for _ in range(200)]
        (folder / "texts" / f"{number}.txt").write_text(" ".join(words))
    with open(folder / "talk.jsonl", "w") as file:
        for n in range(50):
            a, b = rng.randint(0, 9), rng.randint(0, 9)
            turns = [("user", f"{a} and {b}?"), ("assistant", f"{a + b}")] * (1 + n % 2)
            if n % 3:
                record = {"messages": [{"role": r, "content": c} for r, c in turns]}
            else:
                names = {"user": "human", "assistant": "gpt"}
                record = {"conversations": [{"from": names[r], "value": c} for r, c in turns]}
            file.write(json.dumps(record) + "\n")
    with open(folder / "pairs.jsonl", "w") as file:
        for n in range(30):
            record = {"prompt": f"{n}?", "chosen": f"{n} is good", "rejected": f"bad {'no ' * n}"}
            file.write(json.dumps(record) + "\n")
    tokenizers.train(
        [path.read_text() for path in folder.rglob("*") if path.is_file()], vocab_size=320
    ).save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def pretrained(files, tmp_path_factory):
    """The model of a short pre-training on two mixed sources."""
    out = tmp_path_factory.mktemp("runs") / "pretrain"
    with pytest.MonkeyPatch.context() as monkeypatch:
        status = call(
            *(pretrain, pretrain.Pretrain(), monkeypatch),
            *("--out", out, "--data", files / "texts", files / "texts" / "1*.txt"),
            *("--weights", 3, 1, "--tokenizer", files / "tokenizer"),
            *("--eval-data", files / "texts" / "2.txt", "--steps=6", "--evaluate-every=6"),
            *("--average=0.9", "--ramp", "0:1", "2:2", *SMALL),
        )
    assert status == 0
    return out


def test_pre_training_leaves_what_it_says(pretrained):
    assert {path.name for path in pretrained.iterdir()} == {
        *("checkpoints", "config.json", "curves.png", "data", "events.jsonl"),
        *("metrics.jsonl", "model", "samples.jsonl"),
    }
    found = lines(pretrained)
    assert [line["step"] for line in found] == list(range(6))
    assert [line["count"] for line in found][:2] < [64, 64] < [line["count"] for line in found][2:4]
    assert found[-1]["loss"] < found[0]["loss"]
    assert np.isfinite(found[-1]["eval_loss"])
    model = checkpoints.load(pretrained / "model")
    assert model.config.vocab_size == tokenizers.load(pretrained / "model").vocab_size


@pytest.fixture(scope="module")
def tuned(files, pretrained, tmp_path_factory):
    """Fine-tuned on the harder half of the conversations, and exported."""
    out = tmp_path_factory.mktemp("runs") / "sft"
    with pytest.MonkeyPatch.context() as monkeypatch:
        status = call(
            *(sft, sft.Sft(), monkeypatch, "--out", out, "--checkpoint", pretrained / "model"),
            *("--data", files / "talk.jsonl", "--steps=5", "--evaluate-every=5"),
            *("--keep-hardest=0.5", "--export", *SMALL),
        )
    assert status == 0
    return out


@pytest.mark.parity
def test_the_export_answers_alike_in_transformers(tuned):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tuned / "export")
    coder = transformers.AutoTokenizer.from_pretrained(tuned / "export")
    ids = coder.apply_chat_template(
        [{"role": "user", "content": "3 and 4?"}], add_generation_prompt=True, return_dict=False
    )
    ours = checkpoints.load(tuned / "model")
    logits = np.asarray(jax.jit(lambda m, x: m(x))(ours, np.array([ids], np.int32)))
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=2e-5 * expected.std(), rtol=0)


@pytest.mark.slow
def test_preferences_with_a_reference_and_with_adapters(files, tuned, tmp_path, monkeypatch):
    """A reference table and the base without its adapters begin with the same rewards: none."""
    given = ["--checkpoint", tuned / "model", "--data", files / "pairs.jsonl", "--steps=4", *SMALL]
    given += ["--eval-data", files / "pairs.jsonl", "--pairs=3", "--evaluate-every=4"]
    begin = (dpo, dpo.Dpo(), monkeypatch)
    assert call(*begin, "--out", tmp_path / "full", *given) == 0
    adapters = ["--rank=2", "--quantize=int8", "--adapt", "*.attention.*", "*.shared.*"]
    assert call(*begin, "--out", tmp_path / "lora", *given, *adapters, "--learning-rate=1e-2") == 0
    for name in ("full", "lora"):
        found = lines(tmp_path / name)
        assert found[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
        assert abs(found[0]["margin"]) < 1e-4
        assert found[-1]["margin"] != 0
        assert 0 <= found[-1]["eval_accuracy"] <= 1
    assert found[0]["nll"] == pytest.approx(lines(tmp_path / "full")[0]["nll"], rel=0.02)
    merged = checkpoints.load(tmp_path / "lora" / "model")
    assert not lora.state(merged)


@pytest.mark.parametrize(
    ("module", "kind", "arguments", "status", "told"),
    [
        (sft, sft.Sft, ["--checkpoint=nix"], 1, "nix: no such checkpoint"),
        (sft, sft.Sft, ["--preset=pod"], 2, "'pod' is unknown; choose from laptop, scout-v5p-64"),
        (dpo, dpo.Dpo, ["--preset=scout-v5p-64"], 2, "needs --out"),
        (dpo, dpo.Dpo, ["--beta=0"], 2, "beta 0.0 must be above 0"),
        (dpo, dpo.Dpo, ["--kind=ippo"], 2, "ippo"),
        (pretrain, pretrain.Pretrain, ["--steps=5"], 2, "warmup 10"),
        (pretrain, pretrain.Pretrain, ["--data=x"], 2, "give --tokenizer"),
        (pretrain, pretrain.Pretrain, ["--ramp", "1:2"], 2, "0"),
        (pretrain, pretrain.Pretrain, ["--mesh=expert"], 2, "axes are data, fsdp"),
    ],
)
def test_bad_usage(module, kind, arguments, status, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        found = call(module, kind(), monkeypatch, *arguments)
    except SystemExit as error:
        found = error.code
    text = " ".join("".join(capsys.readouterr()).replace("│", " ").split())
    assert (found, told in text) == (status, True), text
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_run_is_not_overwritten_nor_resumed_as_another(pretrained, files, monkeypatch, capsys):
    given = ["--out", pretrained, "--data", files / "texts", "--tokenizer", files / "tokenizer"]
    begin = (pretrain, pretrain.Pretrain(), monkeypatch)
    assert call(*begin, *given, "--steps=6", *SMALL) == 1
    assert "holds a run; add --resume" in capsys.readouterr().err
    before = (pretrained / "metrics.jsonl").read_text()
    assert call(*begin, *given, "--steps=6", *SMALL, "--seed=3", "--resume") == 1
    assert "seed: 0 then, 3 now" in " ".join(capsys.readouterr().err.split())
    assert (pretrained / "metrics.jsonl").read_text() == before


def test_a_malformed_record_is_named(files, pretrained, tmp_path, monkeypatch, capsys):
    talk = (files / "talk.jsonl").read_text().splitlines()
    talk[7] = '{"question": "1 and 2?", "answer": "3"}'
    talk[9] = '{"messages": [{"role": "user", "content": "anybody?"}]}'
    (tmp_path / "bad.jsonl").write_text("\n".join(talk))
    given = ["--checkpoint", pretrained / "model", "--data", tmp_path / "bad.jsonl", "--steps=3"]
    begin = (sft, sft.Sft(), monkeypatch)
    assert call(*begin, "--out", tmp_path / "a", *given, *SMALL) == 1
    assert "bad.jsonl:8: a record with the names answer, question" in capsys.readouterr().err
    skip = ["--on-error=skip", "--checkpoint-every=3"]
    assert call(*begin, "--out", tmp_path / "b", *given, *SMALL, *skip) == 0
    report = json.loads((tmp_path / "b" / "data" / "train-0" / "report.json").read_text())
    assert (report["kept"], report["refused"]) == (48, 2)


def test_a_missing_package_is_named(pretrained, tmp_path, monkeypatch, capsys):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    given = ["--checkpoint", pretrained / "model", "--data", tmp_path / "x.parquet"]
    assert call(sft, sft.Sft(), monkeypatch, "--out", tmp_path / "a", *given) == 1
    assert "pip install l4jax[data]" in " ".join(capsys.readouterr().err.split())


def listed(section):
    """One line for everything that can be set, in sections that the command line flattens."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from listed(value)
        else:
            yield f"  --{field.name.replace('_', '-')}: {field.type} = {value!r}\n"


def test_everything_that_can_be_set_is_listed(golden):
    recipes = (pretrain.Pretrain, midtrain.Midtrain, sft.Sft, dpo.Dpo, distill.Distill)
    text = "".join(f"{kind.__name__}\n{''.join(listed(kind()))}" for kind in recipes)
    golden("recipes.txt", text)


# --- Killed --------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(("name", "times"), [("pretrain", 4), ("sft", 3), ("dpo", 3)])
def test_a_killed_recipe_goes_on_as_if_nothing_had_been(
    name, times, files, pretrained, tuned, tmp_path
):
    given = {
        "pretrain": ["--data", files / "texts", files / "talk.txt", "--weights", 2, 1]
        + ["--tokenizer", files / "tokenizer", "--average=0.9"],
        "sft": ["--data", files / "talk.jsonl", files / "more.jsonl", "--weights", 1, 2]
        + ["--checkpoint", pretrained / "model"],
        "dpo": ["--data", files / "pairs.jsonl", "--checkpoint", tuned / "model", "--pairs=3"],
    }[name]
    (files / "talk.txt").write_text((files / "talk.jsonl").read_text())
    (files / "more.jsonl").write_text("\n".join((files / "talk.jsonl").read_text().split("\n")[:9]))
    steps = 30
    command = [sys.executable, "-m", f"experiments.{name}", *given, *SMALL]
    command += [f"--steps={steps}", "--checkpoint-every=4", "--workers=2", "--evaluate-every=10"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
    }

    def begin(out, *more):
        words = list(map(str, [*command, "--out", out, *more]))
        with open(tmp_path / "output", "a") as log:
            return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log)

    assert begin(tmp_path / "whole").wait(600) == 0, (tmp_path / "output").read_text()
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    out, killed = tmp_path / "killed", 0
    for moment in sorted(draw.uniform(0, steps - 1) for _ in range(times)):
        child, file = begin(out, "--resume"), out / "metrics.jsonl"
        deadline = time.monotonic() + 600
        while child.poll() is None and time.monotonic() < deadline:
            if file.exists() and len(file.read_bytes().splitlines()) > moment:
                break
            time.sleep(0.005)
        time.sleep(0.1 * (moment % 1))
        child.kill()
        killed += child.wait() == -signal.SIGKILL
    assert begin(out, "--resume").wait(600) == 0, (tmp_path / "output").read_text()
    assert killed >= times - 1
    assert lines(out) == lines(tmp_path / "whole"), f"seed {seed}"


# --- Pods ----------------------------------------------------------------------------------------
def on_pods():
    """What the pod presets of all recipes compute: model, task, slice, and the recipe's leaves."""
    for name, pod in leaves.PODS.items():
        for module, task in ((pretrain, "train"), (sft, "sft"), (dpo, "dpo")):
            model = pretrain.PRESETS[name].model
            yield f"{task}-{name}", model, task, pod.topology, module.PRESETS[name]
    for name, preset in midtrain.PRESETS.items():
        for stage in midtrain.stages(dataclasses.replace(preset, out="/out")):
            yield f"{name}-{stage.length}", "llama4-scout", "sft", leaves.PODS[name].topology, stage
    for name, preset in distill.PRESETS.items():
        for model, task in ((preset.student, "distill"), ("llama4-maverick", "teach")):
            yield f"{task}-{name}", model, task, "v5p:4x4x8", preset


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "task", "topology", "preset"),
    [pytest.param(*values, id=name) for name, *values in on_pods()],
)
def test_what_a_pod_runs_compiles_and_fits(model, task, topology, preset):
    """Minutes each, and 10 GB: the TPU compiler's own answer for the real slice."""
    command = [sys.executable, "-m", "l4jax.cli", "plan", model, "--json", "--task", task]
    command += ["--topology", topology, "--mesh", preset.place.mesh]
    command += ["--batch", str(preset.batch), "--seq", str(preset.length)]
    command += ["--remat", preset.place.remat] if task != "teach" else []
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["fits"]
