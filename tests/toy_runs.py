"""Runs that compile at once, of batches whose numbers show in the metrics."""

from __future__ import annotations

import dataclasses
import io
import json

import jax.numpy as jnp
import numpy as np
import optax
from conftest import build
from rich.console import Console

from l4jax import presets
from l4jax.config import Layer
from l4jax.training import loop, schedules, tracking, trainer

SCOUT = presets.tiny(presets.llama4_scout())
CONFIG = dataclasses.replace(
    SCOUT,
    num_layers=1,
    embed_dim=16,
    vocab_size=24,
    mlp_dim=16,
    pattern=(Layer("causal", "dense"),),
    moe=None,
)
RATE = schedules.warmup_cosine(0.05, steps=40, warmup=4)


class Numbers:
    """Batches that know their number; some have a loss that is multiplied."""

    def __init__(self, scales=None, count=10**9):
        self.scales, self.count, self.next = scales or {}, count, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.next == self.count:
            raise StopIteration
        number, self.next = self.next, self.next + 1
        return {
            "tokens": np.random.default_rng(number).integers(0, 24, (2, 3)).astype(np.int32),
            "number": np.int32(number),
            "scale": np.float32(self.scales.get(number, 1)),
        }

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]


def distance(model, batch):
    """How far the head is from the tokens' mean."""
    gap = model.head[...] - batch["tokens"].astype(jnp.float32).mean() / 24
    loss = batch["scale"] * jnp.square(gap).mean()
    return loss, {"loss": loss, "count": jnp.int32(1), "number": batch["number"]}


def training(optimizer=None, **options):
    return trainer.Training(build(CONFIG), distance, optimizer or optax.adam(RATE), **options)


def fit(out, *, data=None, of=None, console=None, hooks=(), resume=False, **settings):
    """A run of 20 steps with a checkpoint at every fifth, unless told otherwise."""
    settings = loop.Settings(**{"steps": 20, "checkpoint_every": 5} | settings)
    return loop.fit(
        of or training(),
        data or Numbers(),
        out,
        settings=settings,
        schedule=RATE,
        hooks=hooks,
        resume=resume,
        console=console or Console(file=io.StringIO()),
    )


def lines(out):
    """The metrics, without what differs from run to run."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in tracking.TIMING} for line in found]


def events(out):
    """Kind and step of every event."""
    found = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    return [(event["event"], event["step"]) for event in found]


def message(out, kind):
    """What the last event of a kind says."""
    found = list(map(json.loads, (out / "events.jsonl").read_text().splitlines()))
    return next(event["message"] for event in reversed(found) if event["event"] == kind)


def checkpoints(out):
    """The steps of the checkpoints that are there."""
    found = (out / "checkpoints").iterdir()
    return sorted(int(path.name) for path in found if (path / "run.json").exists())
