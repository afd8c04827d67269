"""Does a student learn more in the same steps when a teacher tells it what else might have come?

A model of half the teacher's width learns from scratch, once from the data alone and once by
`objectives.distill` with the teacher's weight falling from 1 to 0 (`objectives.soft_weight`):
the same batches, initial parameters, steps and learning rates. Held-out loss is cross-entropy with
the data, for both. Needs the model of `python -m experiments.pretrain`.

    python -m experiments.benchmarks.distillation
    python -m experiments.benchmarks.distillation --teacher DIR --steps 400 --seeds 0 1 2 3

Writes `distillation.json` and `distillation.png` under --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.figure
from flax import nnx

from experiments import console, distill, recipe
from experiments.benchmarks import peers
from l4jax import checkpoints, roofline
from l4jax.data import corpus, pipeline
from l4jax.data import tokenizer as tokenizers
from l4jax.models.llama4 import Llama
from l4jax.training import objectives, optimizers, schedules, teacher
from l4jax.training.trainer import Training, evaluator

BALANCE = 0.01
MEASURED = 8
"""Held-out losses of a run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Leaves of the command line."""

    teacher: str = "runs/pretrain/model"
    out: pathlib.Path = pathlib.Path("runs/benchmarks")
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of initial parameters and of the order of the data."""
    steps: int = 200
    batch: int = 4
    length: int = 128
    learning_rate: float = 6e-3
    top: int = 32
    """Tokens that the teacher tells the probability of."""
    json: bool = False
    """Print only the report."""

    def __post_init__(self) -> None:
        if self.steps < MEASURED or not self.seeds:
            raise ValueError(f"steps {self.steps} must be at least {MEASURED}, seeds at least one")


def run(settings: Settings) -> None:
    recipe.check_there(settings.teacher, "--teacher")
    begun = time.process_time()
    model = checkpoints.load(settings.teacher)
    train, held_out = data(settings)
    measure = evaluator(objectives.next_token())
    loss = functools.partial(measure, batches=held_out)
    known, config = loss(model)["loss"], distill.half(model.config)
    ask = teacher.top_tokens(model, settings.top)
    runs: dict[str, list[dict[int, float]]] = {"hard": [], "distilled": []}
    for seed in settings.seeds:
        for name, curves in runs.items():
            student = Llama(config, rngs=nnx.Rngs(seed))
            curves.append(learn(student, name, train(seed), ask, loss, settings))
            print(f"seed {seed}, {name}: {list(curves[-1].values())[-1]:.4f}", file=sys.stderr)
    last = {name: [list(x.values())[-1] for x in curves] for name, curves in runs.items()}
    gains = [hard - soft for hard, soft in zip(last["hard"], last["distilled"], strict=True)]
    report = {
        "benchmark": "distillation",
        **peers.environment(),
        "cpu_seconds": time.process_time() - begun,
        **{k: v for k, v in dataclasses.asdict(settings).items() if k not in ("out", "json")},
        "teacher_parameters": roofline.parameters(model.config).total,
        "student_parameters": roofline.parameters(config).total,
        "teacher_loss": known,
        "held_out_loss": {
            name: {"mean": statistics.fmean(x), "each": x} for name, x in last.items()
        },
        "gain": {"mean": statistics.fmean(gains), "each": gains},
        "curves": runs,
    }
    args = argparse.Namespace(out=settings.out, json=settings.json)
    peers.write("distillation", json.loads(json.dumps(report)), args, draw(runs, known))


def data(
    settings: Settings,
) -> tuple[Callable[[int], pipeline.Batches], Sequence[pipeline.Batch]]:
    """Batches to train on, by seed, and held-out ones."""
    tokenizer = tokenizers.load(settings.teacher)
    most = 5 * settings.steps * settings.batch * settings.length
    texts = corpus.standard_library(max_bytes=max(2_000_000, most))
    ids, rest = (
        [tokenizer.encode(text, bos=True) for text in side]
        for side in (texts.train, texts.held_out)
    )
    packed = functools.partial(pipeline.packed, length=settings.length)
    held_out = packed(rest, batch_size=16, seed=None, repeat=False)

    def train(seed: int) -> pipeline.Batches:
        return packed(ids, batch_size=settings.batch, seed=seed)

    return train, [batch for _, batch in zip(range(16), held_out, strict=False)]


def learn(  # noqa: PLR0913 - who learns how, from what, and how it is measured
    student: Llama,
    name: str,
    batches: pipeline.Batches,
    ask: Any,
    loss: Callable[[Any], dict[str, Any]],
    settings: Settings,
) -> dict[int, float]:
    """Held-out losses by the number of updates."""
    schedule = schedules.warmup_cosine(settings.learning_rate, steps=settings.steps, warmup=10)
    objective = objectives.next_token(balance=BALANCE)
    if name == "distilled":
        objective = objectives.distill(balance=BALANCE)
    training = Training(student, objective, optimizers.adamw(schedule))
    curve, every = {}, settings.steps // MEASURED
    for step, batch in zip(range(settings.steps), batches, strict=False):
        if name == "distilled":
            batch = {**ask(batch), "soft_weight": objectives.soft_weight(step, settings.steps)}
        training.step(batch)
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            curve[step + 1] = loss(training.model)["loss"]
    return curve


def draw(runs: dict[str, list[dict[int, float]]], known: float) -> matplotlib.figure.Figure:
    """Held-out loss by step, a line for each seed."""
    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    labels = {"hard": "data alone", "distilled": "data and teacher"}
    for (name, curves), color in zip(runs.items(), ("tab:gray", "tab:blue"), strict=True):
        for number, curve in enumerate(curves):
            label = labels[name] if number == 0 else None
            axes.plot(list(curve), list(curve.values()), "o-", color=color, label=label, ms=3)
    axes.axhline(known, color="black", linestyle="--", linewidth=1, label="the teacher")
    axes.set(xlabel="updates", ylabel="held-out loss (nats per token)")
    axes.set_title("A student of half the width, three seeds" if len(curves) == 3 else "")
    axes.legend()
    return figure


if __name__ == "__main__":
    sys.exit(console.main(Settings, run, __doc__, "distillation"))
