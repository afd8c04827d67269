"""Milliseconds that a run's loop takes for itself in each step, beside the compiled update.

"loop" is `training.loop.fit` with an update that returns at once: placing the batch, reading the
metrics of the step before, writing its line, asking what is due. "8 devices" places each batch on a
mesh; "TensorBoard" writes event files too. "call" is what a true update keeps the host from going
on when no other is under way, which on a CPU may be part of the update itself.

    python -m experiments.benchmarks.trainer_overhead [--steps 400] [--out DIR] [--json]
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from experiments.benchmarks import peers

WARM = 20
"""Steps that are not counted, of every run."""


def main() -> None:
    args = peers.arguments(__doc__ or "", batch=8, length=64, steps=400, repetitions=5)
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    from l4jax import sharding

    mesh, plain = sharding.make_mesh(data=2, fsdp=4), make(args)
    with sharding.use(mesh):
        spread = make(args)
    runs = {
        "loop": lambda: fit(plain, args),
        "loop, TensorBoard": lambda: fit(plain, args, tensorboard=True),
        "call": lambda: call(plain, args),
    }
    times: dict[str, list[float]] = {name: [] for name in (*runs, "loop, 8 devices")}
    for _ in range(args.repetitions):
        for name, run in runs.items():
            times[name].append(run())
        with sharding.use(mesh):
            times["loop, 8 devices"].append(fit(spread, args))
    milliseconds = {name: statistics.median(found) for name, found in times.items()}
    report = {
        "benchmark": "trainer_overhead",
        **peers.environment(),
        "batch": [args.batch, args.length],
        "steps": args.steps,
        "milliseconds_per_step": milliseconds,
        "milliseconds_best": {name: min(found) for name, found in times.items()},
    }
    title = "A training run's own time in each step"
    peers.write("trainer_overhead", report, args, peers.bars(title, {"": milliseconds}, "ms"))


class Batches:
    """The same packed batches again and again."""

    def __init__(self, rows: int, length: int, vocabulary: int) -> None:
        rng = np.random.default_rng(0)
        ones = np.ones((rows, length), np.int32)
        self._made = [
            {
                "tokens": rng.integers(0, vocabulary, (rows, length)).astype(np.int32),
                "segment_ids": ones,
                "positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1,
            }
            for _ in range(16)
        ]
        self._next = 0

    def __iter__(self):
        return self

    def __next__(self):
        self._next += 1
        return self._made[self._next % len(self._made)]

    def get_state(self):
        """Where it is."""
        return {"next": self._next}


def make(args):
    """A small training that is compiled, its batches and its schedule."""
    import jax
    from flax import nnx

    from l4jax import presets, sharding
    from l4jax.config import Layer
    from l4jax.models.llama4 import Llama
    from l4jax.training import objectives, optimizers, schedules, trainer

    config = presets.get("tiny-llama4-scout").make()
    config = dataclasses.replace(
        config, num_layers=2, pattern=(Layer("chunked", "dense"),), moe=None
    )
    schedule = schedules.warmup_cosine(1e-3, steps=args.steps, warmup=10)
    model = sharding.create(lambda: Llama(config, rngs=nnx.Rngs(0)))
    training = trainer.Training(model, objectives.next_token(), optimizers.adamw(schedule))
    batches = Batches(args.batch, args.length, config.vocab_size)
    jax.block_until_ready(training.step(trainer.spread(next(batches))))
    return training, batches, schedule


def fit(made, args, *, tensorboard: bool = False) -> float:
    """Median milliseconds from one step's start to the next one's; its update costs nothing."""
    from l4jax.training import loop, tracking, trainer

    training, batches, schedule = made
    metrics = training.step(trainer.spread(next(batches)))
    training = copy.copy(training)
    training.step = lambda batch: metrics
    settings = loop.Settings(steps=args.steps, checkpoint_every=None, tensorboard=tensorboard)
    with tempfile.TemporaryDirectory() as folder:
        loop.fit(training, batches, folder, settings=settings, schedule=schedule)
        lines = tracking.read(Path(folder) / "metrics.jsonl")
    return 1000 * statistics.median(line["seconds"] for line in lines[WARM:-1])


def call(made, args) -> float:
    """Median milliseconds until the call of an update returns."""
    import jax

    training, batches, _ = made
    found = []
    for _ in range(args.steps):
        batch = next(batches)
        begun = time.perf_counter()
        metrics = training.step(batch)
        found.append(1000 * (time.perf_counter() - begun))
        jax.block_until_ready(metrics)
    return statistics.median(found[WARM:])


if __name__ == "__main__":
    main()
