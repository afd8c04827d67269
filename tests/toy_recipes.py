"""Recipes that run in this process, on a tiny model and a few made-up texts."""

from __future__ import annotations

import dataclasses
import random
import sys

from conftest import build

from experiments import recipe
from l4jax import checkpoints, presets
from l4jax.config import Layer
from l4jax.data import tokenizer as tokenizers
from l4jax.training import tracking

VOCABULARY = 320
SCOUT = presets.tiny(presets.llama4_scout())
CONFIG = dataclasses.replace(
    SCOUT,
    num_layers=2,
    embed_dim=32,
    vocab_size=VOCABULARY,
    mlp_dim=32,
    max_context=80,
    pattern=(Layer("chunked", "dense"), Layer("global", "dense")),
    moe=None,
)


def texts(seed, count=12):
    """Some texts of a few words, without digits."""
    rng = random.Random(seed)
    words = ("red", "green", "blue", "one", "two", "three", "is", "and")
    return [" ".join(rng.choice(words) for _ in range(120)) for _ in range(count)]


def make(folder):
    """A folder with a model and its tokenizer in `model`, and texts in `texts` and `rest`."""
    for name, seed in (("texts", 0), ("rest", 1)):
        (folder / name).mkdir()
        for number, text in enumerate(texts(seed)):
            (folder / name / f"{number}.txt").write_text(text)
    checkpoints.save(build(CONFIG), folder / "model", to="orbax")
    tokenizers.train(texts(0), vocab_size=VOCABULARY).save(folder / "model")
    return folder


def call(module, default, monkeypatch, *arguments):
    """A recipe's exit status, called in this process."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    return recipe.main(default, module.run, module.PRESETS, module.__doc__)


def lines(out):
    """The metrics, without what differs from run to run."""
    return [
        {name: value for name, value in line.items() if name not in tracking.TIMING}
        for line in tracking.read(out / "metrics.jsonl")
    ]


class Killed(BaseException):
    """Stands for the end of the process."""
