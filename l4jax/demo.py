"""The main job, small: from raw text to a trained, saved, generating and exported model.

Every stage is a function of what the stages before it made, so that further stages (fine-tuning,
alignment) go between `pretrain` and `sample`. The corpus is the Python standard library.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import matplotlib.figure
import numpy as np
from flax import nnx
from rich import progress
from rich.console import Console
from rich.table import Table

from l4jax import checkpoints, inference, presets, roofline, sharding
from l4jax.config import TextConfig
from l4jax.data import corpus, pipeline, tokenizer
from l4jax.data.ngrams import Ngrams
from l4jax.models.llama4 import Llama
from l4jax.training import objectives, optimizers, trainer

VOCABULARY = 512
LENGTH = 256
BATCH = 4
PROMPTS = ("import ", "def __init__(self", "    for i in range(", '"""Return ')
_MADE = ("config.json", "metrics.jsonl", "report.json", "report.txt", "curves.png", "experts.png")
_MADE_FOLDERS = ("tokenizer", "checkpoint", "export")
_MARKER = ".l4jax-demo"
"""Says that a folder is a demo's, so that the next demo may replace what is in it."""


class Data(NamedTuple):
    """Tokenized documents of both sides, and batches of the held-out one."""

    tokenizer: tokenizer.Tokenizer
    train: list[list[int]]
    held_out: list[pipeline.Batch]


class Pretrained(NamedTuple):
    """The trained model, what each step reported, and its held-out evaluation."""

    model: Llama
    metrics: list[dict[str, Any]]
    before: dict[str, Any]
    after: dict[str, Any]


def run(out: pathlib.Path, *, steps: int, seed: int, console: Console) -> dict[str, Any]:
    """Runs every stage, writes what they make under `out`, and returns the report.

    Args:
        out: made if missing; an earlier demo's files in it are replaced.
        steps: pre-training updates.
        seed: of the initial parameters, the data's order and the samples.
        console: where progress goes.

    Raises:
        ValueError: `steps` or `seed` is out of range, or `out` holds what no demo made.
    """
    if steps < 2:
        raise ValueError(f"steps {steps} must be at least 2: one to warm up, one to learn")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} must be from 0 to {2**32 - 1}")
    begun = time.perf_counter()
    _clear(out)
    data = prepare(out, seed=seed, console=console)
    config = model_config(data.tokenizer.vocab_size)
    settings = {"steps": steps, "seed": seed, "batch": BATCH, "length": LENGTH}
    _write_json(out / "config.json", settings | {"model": dataclasses.asdict(config)})
    with console.status("Counting unigrams and bigrams"):
        unigram, bigram = Ngrams(data.train, config.vocab_size).losses(data.held_out)
    trained = pretrain(out, data, config, steps=steps, seed=seed, console=console)
    with console.status("Saving with Orbax, restoring, exporting, reading back"):
        agreement = round_trip(out, trained.model, data)
    with console.status("Generating"):
        samples, generation = sample(trained.model, data.tokenizer, seed=seed)
    speeds = [BATCH * LENGTH / m["seconds"] for m in trained.metrics]
    report = {
        "held_out_loss": {
            "before": trained.before["loss"],
            "after": trained.after["loss"],
            "unigram": unigram,
            "bigram": bigram,
        },
        "beats_bigram": trained.after["loss"] < bigram,
        "held_out_tokens": trained.after["count"],
        "training_tokens_per_second": float(np.median(speeds)),
        "generation_tokens_per_second": generation,
        "parameters": roofline.parameters(config).total,
        "active_parameters": roofline.parameters(config).active,
        "expert_load": trained.after["expert_load"].tolist(),
        "samples": samples,
        "largest_logit_difference": agreement,
        "seconds": time.perf_counter() - begun,
        "files": {name: str(out / name) for name in (*_MADE_FOLDERS, *_MADE)},
        "settings": settings,
    }
    draw(out, trained, unigram=unigram, bigram=bigram)
    _write_json(out / "report.json", report)
    with open(out / "report.txt", "w", encoding="utf-8") as file:
        show(report, Console(file=file, width=100))
    return report


def model_config(vocab_size: int) -> TextConfig:
    """A twin of Scout that learns in minutes: its layer pattern, experts, qk-norm and temperature.

    Chunk and temperature floor are shorter than a row, so that training crosses both.
    """
    base = presets.tiny(presets.llama4_scout())
    attention, moe = base.attention, base.moe
    assert attention.temperature is not None
    assert moe is not None
    return dataclasses.replace(
        base,
        num_layers=4,
        embed_dim=128,
        vocab_size=vocab_size,
        max_context=4 * LENGTH,
        attention=dataclasses.replace(
            attention,
            num_kv_heads=2,
            head_dim=32,
            chunk_size=LENGTH // 4,
            temperature=dataclasses.replace(attention.temperature, floor=LENGTH // 4),
        ),
        moe=dataclasses.replace(moe, mlp_dim=256, shared_mlp_dim=256),
    )


def prepare(out: pathlib.Path, *, seed: int, console: Console) -> Data:
    """Collects the corpus, trains a byte-level BPE tokenizer on its training side, tokenizes."""
    with console.status("Collecting the standard library, training a tokenizer"):
        texts = corpus.standard_library()
        bpe = tokenizer.train(texts.train, vocab_size=VOCABULARY)
        bpe.save(out / "tokenizer")
    with console.status("Tokenizing"):
        train, held_out = (
            [bpe.encode(text, bos=True) for text in side] for side in (texts.train, texts.held_out)
        )
    batches = pipeline.packed(
        held_out, length=LENGTH, batch_size=8 * BATCH, seed=None, repeat=False
    )
    console.print(
        f"{len(train)} files to train on, {len(held_out)} held out; "
        f"{sum(map(len, train)):,} and {sum(map(len, held_out)):,} tokens, "
        f"vocabulary {bpe.vocab_size}"
    )
    return Data(bpe, train, list(batches)[:16])


def pretrain(
    out: pathlib.Path, data: Data, config: TextConfig, *, steps: int, seed: int, console: Console
) -> Pretrained:
    """Trains on next tokens with AdamW; every step's metrics go to `metrics.jsonl`."""
    model = sharding.create(lambda: Llama(config, rngs=nnx.Rngs(seed)))
    schedule = optimizers.warmup_cosine(6e-3, steps=steps, warmup=max(1, min(50, steps // 10)))
    training = trainer.Training(
        model, objectives.next_token(balance=0.01), optimizers.adamw(schedule)
    )
    measure = objectives.next_token()
    with console.status("Compiling"):
        before = trainer.evaluate(training.model, measure, data.held_out)
    batches = iter(pipeline.packed(data.train, length=LENGTH, batch_size=BATCH, seed=seed))
    lines: list[dict[str, Any]] = []
    columns = (
        *progress.Progress.get_default_columns(),
        progress.TextColumn("loss {task.fields[loss]:.3f} · {task.fields[speed]:,.0f} tokens/s"),
    )
    with (
        progress.Progress(*columns, console=console) as bar,
        open(out / "metrics.jsonl", "w", encoding="utf-8") as file,
    ):
        task = bar.add_task("Pre-training", total=steps, loss=float("nan"), speed=0)
        for metrics in training.run(batches, steps):
            line = {
                "step": metrics["step"],
                "loss": float(metrics["loss"]),
                "grad_norm": float(metrics["grad_norm"]),
                "learning_rate": float(schedule(metrics["step"])),
                "tokens_per_second": BATCH * LENGTH / metrics["seconds"],
                "router_entropy": float(metrics["router_entropy"]),
            }
            file.write(json.dumps(line) + "\n")
            lines.append(line | {"seconds": metrics["seconds"]})
            bar.update(task, advance=1, loss=line["loss"], speed=line["tokens_per_second"])
    after = trainer.evaluate(training.model, measure, data.held_out)
    return Pretrained(training.model, lines, before, after)


def round_trip(out: pathlib.Path, model: Llama, data: Data) -> dict[str, float]:
    """Saves with Orbax and as Hugging Face safetensors, reads both back, compares logits.

    Returns the largest absolute difference of each from the model in memory; both should be 0.
    """
    bpe = data.tokenizer
    checkpoints.save(model, out / "checkpoint", to="orbax")
    ids = {"bos_token_id": bpe.bos_id, "eos_token_id": list(bpe.stop_ids)}
    checkpoints.save(model, out / "export", to="hf", extra=ids)
    for folder in ("checkpoint", "export"):
        bpe.save(out / folder)
    forward = jax.jit(lambda model, tokens: model(tokens))
    tokens = data.held_out[0]["tokens"][:2]
    ours = forward(model, tokens)
    return {
        folder: float(abs(forward(checkpoints.load(out / folder), tokens) - ours).max())
        for folder in ("checkpoint", "export")
    }


def sample(
    model: Llama, bpe: tokenizer.Tokenizer, *, seed: int
) -> tuple[list[dict[str, str]], float]:
    """A continuation of every prompt, and how many tokens per second came after compilation."""
    prompts = [bpe.encode(prompt, bos=True) for prompt in PROMPTS]

    def generate() -> Sequence[list[int]]:
        return inference.generate(
            model,
            prompts,
            max_new_tokens=96,
            temperature=0.7,
            top_p=0.95,
            seed=seed,
            stop_ids=bpe.stop_ids,
        ).tokens

    generate()
    begun = time.perf_counter()
    rows = generate()
    speed = sum(map(len, rows)) / (time.perf_counter() - begun)
    texts = [bpe.decode(row, skip_special=True) for row in rows]
    return [{"prompt": p, "text": t} for p, t in zip(PROMPTS, texts, strict=True)], speed


def draw(out: pathlib.Path, trained: Pretrained, *, unigram: float, bigram: float) -> None:
    """`curves.png`: loss by step against the baselines; `experts.png`: who got the tokens."""
    losses = [m["loss"] for m in trained.metrics]
    width = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, color="tab:blue", alpha=0.25, linewidth=1)
    axes.plot(np.arange(len(smooth)) + width - 1, smooth, color="tab:blue", label="training")
    ends = [trained.before["loss"], trained.after["loss"]]
    axes.plot([0, len(losses) - 1], ends, "o", color="tab:red", label="held out, before and after")
    for value, name, style in ((unigram, "unigram", ":"), (bigram, "bigram", "--")):
        axes.axhline(value, color="black", linestyle=style, linewidth=1, label=f"{name}, held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Pre-training")
    axes.legend()
    figure.savefig(out / "curves.png", dpi=120)

    load = trained.after["expert_load"] / trained.after["expert_load"].sum(1, keepdims=True)
    figure = matplotlib.figure.Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(load, cmap="viridis", vmin=0, aspect="auto")
    for (layer, expert), share in np.ndenumerate(load):
        color = "black" if share > 0.8 * load.max() else "white"
        axes.text(expert, layer, f"{share:.0%}", ha="center", va="center", color=color)
    axes.set(xlabel="expert", ylabel="layer", title="Share of held-out tokens")
    axes.set_xticks(range(load.shape[1]))
    axes.set_yticks(range(load.shape[0]))
    figure.colorbar(image)
    figure.savefig(out / "experts.png", dpi=120)


def show(report: dict[str, Any], console: Console) -> None:
    """Prints a report for people."""
    losses = report["held_out_loss"]
    table = Table("model", "held-out loss (nats per token)", title="Did it learn?")
    for name, value in (
        ("untrained", losses["before"]),
        ("unigram", losses["unigram"]),
        ("bigram", losses["bigram"]),
        (f"after {report['settings']['steps']} steps", losses["after"]),
    ):
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    if not report["beats_bigram"]:
        console.print("It does not beat the bigram model; give it more --steps.", style="bold red")
    load = np.asarray(report["expert_load"])
    table = Table("layer", *(f"expert {e}" for e in range(load.shape[1])), title="Expert load")
    for layer, row in enumerate(load / load.sum(1, keepdims=True)):
        table.add_row(str(layer), *(f"{share:.0%}" for share in row))
    console.print(table)
    for item in report["samples"]:
        console.print(f"[bold]{item['prompt']!r}[/bold]", highlight=False)
        console.print(item["prompt"] + item["text"], markup=False, highlight=False)
        console.print()
    differences = report["largest_logit_difference"]
    console.print(
        f"{report['parameters']:,} parameters, {report['active_parameters']:,} active per token. "
        f"Training {report['training_tokens_per_second']:,.0f} tokens/s, "
        f"generation {report['generation_tokens_per_second']:,.0f} tokens/s (4 rows). "
        f"Logits read back differ by at most {differences['checkpoint']:.1e} (Orbax) and "
        f"{differences['export']:.1e} (Hugging Face). Took {report['seconds']:.0f} s.",
        highlight=False,
    )
    console.print(
        f"Figures, samples and checkpoints: {pathlib.Path(report['files']['curves.png']).parent}",
        markup=False,
    )


def _clear(out: pathlib.Path) -> None:
    """Makes `out` an empty folder, if only an earlier demo's files and folders are in it."""
    known = {_MARKER, *_MADE, *_MADE_FOLDERS}
    if out.exists():
        if not out.is_dir():
            raise ValueError(f"{out}: is a file; --out needs a folder")
        names = sorted(path.name for path in out.iterdir())
        if not (out / _MARKER).exists():
            known = set()
        foreign = [name for name in names if name not in known]
        if foreign:
            raise ValueError(
                f"{out}: holds {foreign[0]!r}, which no demo made; choose another --out"
            )
        for path in out.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()


def _write_json(file: pathlib.Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
