"""Does the best learning rate stay where it is when the model grows?

Trains a Scout-like mixture of experts at every width, learning rate and seed, twice: with AdamW as
it is, and with `l4jax.training.metap` on the narrowest model's numbers (for which both are one).
Same tokens everywhere: the Python standard library, one pass at most.

    python -m experiments.metap [--out runs/metap] [--quick] [--resume] [--widths 64 128 256 512]

Writes `config.json`, `metrics.jsonl` (one run a line, as soon as it is over), `report.json` (best
rates, coordinate check), `curves.png` and `coordinates.png`. The default takes about 15 minutes on
two CPU cores, `--quick` one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from flax import nnx

from experiments import console
from l4jax import presets
from l4jax.config import TextConfig
from l4jax.data import corpus, tokenizer
from l4jax.models.llama4 import Llama
from l4jax.training import checkpointing, metap, objectives, schedules, trainer

VOCABULARY = 512
PARAMETERIZATIONS = ("standard", "metap")
HEAD_DIM = 32
CHECKED = 4
"""Updates of the coordinate check."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What can be set on the command line."""

    out: pathlib.Path = pathlib.Path("runs/metap")
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Multiples of 64; the narrowest one is the base."""
    layers: int = 2
    steps: int = 60
    batch: int = 8
    length: int = 64
    rates: tuple[float, ...] = tuple(2.0**-k for k in range(9, 2, -1))
    """Peak learning rates, of the base."""
    seeds: tuple[int, ...] = (0,)
    """Of the initial parameters and of the order of the data."""
    quick: bool = False
    """Two widths, five rates, 30 steps: a minute."""
    resume: bool = False
    """Keep the runs that `out` has, and make the others."""

    def __post_init__(self) -> None:
        for width in self.widths:
            if width < 64 or width % 64:
                raise ValueError(f"width {width} must be a multiple of 64")
        if len(set(self.widths)) < 2 or list(self.widths) != sorted(set(self.widths)):
            raise ValueError(f"widths {self.widths} must be at least two, and grow")
        if len(self.rates) < 3 or list(self.rates) != sorted(set(self.rates)):
            raise ValueError(f"rates {self.rates} must be at least three, and grow")
        if self.rates[0] <= 0 or not self.seeds:
            raise ValueError("rates must be positive, and there must be at least one seed")
        if self.layers < 2 or self.steps < 10 or self.batch < 1 or self.length < 2:
            raise ValueError("layers must be at least 2, steps 10, batch 1 and length 2")


def run(settings: Settings) -> dict[str, Any]:
    """Makes the runs that are missing, and returns the report."""
    if settings.quick:
        quick = {"widths": (64, 128), "rates": tuple(2.0**-k for k in (9, 7, 6, 5, 3)), "steps": 30}
        settings = dataclasses.replace(settings, **quick)
    done = _begin(settings)
    data = Data(settings)
    for (name, width), todo in _todo(settings, done).items():
        train = compiled(settings, name, width)
        for seed, rate in todo:
            begun = time.perf_counter()
            losses, held_out = train(seed, rate, data)
            line = {
                "parameterization": name,
                "width": width,
                "seed": seed,
                "learning_rate": rate,
                "loss": held_out,
                "losses": losses,
                "seconds": time.perf_counter() - begun,
            }
            done.append(line)
            with open(settings.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{name:8} width {width:4} seed {seed} rate {rate:.2e} loss {held_out:.4f}")
    checks = {name: coordinates(settings, name, data) for name in PARAMETERIZATIONS}
    report = {
        "best": {name: summary(settings, done, name) for name in PARAMETERIZATIONS},
        "coordinates": checks,
        "growth": {name: metap.growth(check) for name, check in checks.items()},
    }
    checkpointing.write(settings.out / "report.json", json.dumps(report, indent=2) + "\n")
    draw_losses(settings, done)
    draw_coordinates(settings, checks)
    print(json.dumps({"best": report["best"], "growth": report["growth"]}, indent=2))
    return report


class Data:
    """Batches of the corpus, the same for every model; the last rows are held out."""

    def __init__(self, settings: Settings) -> None:
        tokens = (settings.steps * settings.batch + 64) * (settings.length + 1)
        texts = corpus.standard_library(max_bytes=max(2_000_000, 4 * tokens))
        bpe = tokenizer.train(texts.train, vocab_size=VOCABULARY)
        self.vocab_size = bpe.vocab_size
        self._settings = settings
        self._train, held_out = (
            np.concatenate([bpe.encode(text, bos=True) for text in side])
            for side in (texts.train, texts.held_out)
        )
        self.held_out = {"tokens": self._rows(held_out)[:64]}

    def batches(self, seed: int) -> dict[str, np.ndarray]:
        """The run's tokens, Int32[steps batch length]."""
        s = self._settings
        rows = self._rows(self._train)
        if len(rows) < s.steps * s.batch:
            raise ValueError(f"{s.steps} steps of {s.batch} rows: the corpus has {len(rows)} rows")
        order = np.random.default_rng(seed).permutation(len(rows))[: s.steps * s.batch]
        return {"tokens": rows[order].reshape(s.steps, s.batch, s.length)}

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        length = self._settings.length
        return ids[: len(ids) // length * length].reshape(-1, length).astype(np.int32)


def model_config(settings: Settings, width: int) -> TextConfig:
    """A Scout-like model: chunked and global attention, every layer routed, a shared expert."""
    scout = presets.tiny(presets.llama4_scout())
    assert scout.moe is not None
    heads = width // HEAD_DIM
    return dataclasses.replace(
        scout,
        num_layers=settings.layers,
        embed_dim=width,
        vocab_size=VOCABULARY,
        pattern=(scout.pattern[0], scout.pattern[-1]),
        attention=dataclasses.replace(
            scout.attention, num_heads=heads, num_kv_heads=heads // 2, head_dim=HEAD_DIM
        ),
        moe=dataclasses.replace(scout.moe, num_experts=4, mlp_dim=width, shared_mlp_dim=width),
    )


def recipe(settings: Settings, name: str, width: int) -> tuple[Callable[[Any], Llama], metap.Table]:
    """How a model is made from a seed, and its multipliers: none in the standard one."""
    config, base = (model_config(settings, w) for w in (width, settings.widths[0]))

    def make(seed: Any) -> Llama:
        model = Llama(config, rngs=nnx.Rngs(jax.random.key(seed)))
        return metap.init(model, base) if name == "metap" else model

    return make, metap.multipliers(config, base) if name == "metap" else {}


def compiled(
    settings: Settings, name: str, width: int
) -> Callable[[int, float, Data], tuple[list[float], float]]:
    """Whole runs by seed and learning rate, compiled once: training losses and held-out loss."""
    make, table = recipe(settings, name, width)
    shape = schedules.linear(1.0, steps=settings.steps, warmup=settings.steps // 10)
    objective = objectives.next_token(balance=0.01)
    abstract = nnx.eval_shape(lambda: make(0))

    @jax.jit
    def whole(seed: Any, rate: Any, batches: Any, held_out: Any) -> tuple[Any, Any]:
        optimizer = metap.optimizer(lambda step: rate * shape(step), table)
        update = trainer.Update(abstract, objective, optimizer)
        params = nnx.to_pure_dict(nnx.state(make(seed)))
        state = trainer.State(params, optimizer.init(params))
        state, metrics = jax.lax.scan(update, state, batches)
        _, after = objective(update.model(state.params), held_out)
        return metrics["loss"], after["loss"]

    def train(seed: int, rate: float, data: Data) -> tuple[list[float], float]:
        arrays = jnp.int32(seed), jnp.float32(rate)
        losses, held_out = whole(*arrays, data.batches(seed), data.held_out)
        return [round(float(x), 4) for x in losses], float(held_out)

    return train


def coordinates(settings: Settings, name: str, data: Data) -> dict[int, dict[str, float]]:
    """The coordinate check at every width, at the middle of the learning rates."""
    rate = settings.rates[len(settings.rates) // 2]
    schedule = schedules.constant(rate, steps=CHECKED, warmup=0)
    tokens = data.batches(settings.seeds[0])["tokens"][:CHECKED]

    def trainings() -> Iterator[trainer.Training]:
        for width in settings.widths:
            make, table = recipe(settings, name, width)
            model, rule = make(settings.seeds[0]), metap.optimizer(schedule, table)
            yield trainer.Training(model, objectives.next_token(balance=0.01), rule)

    return metap.coordinate_check(trainings(), [{"tokens": x} for x in tokens])


# --- Results -------------------------------------------------------------------------------------
def losses_of(settings: Settings, lines: list[dict], name: str, width: int) -> np.ndarray:
    """Held-out losses [seeds rates]."""
    by_key = {_key(line): line["loss"] for line in lines}
    kept = _name(settings, name, width)
    return np.array(
        [[by_key[kept, width, seed, rate] for rate in settings.rates] for seed in settings.seeds]
    )


def mean_losses(settings: Settings, lines: list[dict], name: str, width: int) -> np.ndarray:
    """Held-out losses by learning rate, means over the seeds; infinite where a run diverged."""
    means = losses_of(settings, lines, name, width).mean(0)
    return np.where(np.isfinite(means), means, np.inf)


def summary(settings: Settings, lines: list[dict], name: str) -> dict[str, Any]:
    """Best rate and loss by width, and what the base's best rate costs on the widest model.

    drift: how far the best rate moved from the narrowest to the widest model, in powers of two;
    between the rates that were tried by the parabola through the best one and its neighbours.
    """
    rates = np.log2(settings.rates)
    by_width = {w: mean_losses(settings, lines, name, w) for w in settings.widths}
    vertices = {w: _vertex(rates, losses) for w, losses in by_width.items()}
    first, last = settings.widths[0], settings.widths[-1]
    carried = by_width[last][int(by_width[first].argmin())]
    return {
        "loss": {w: float(losses.min()) for w, losses in by_width.items()},
        "rate": {w: settings.rates[int(losses.argmin())] for w, losses in by_width.items()},
        "interpolated_rate": {w: 2.0**x for w, x in vertices.items()},
        "drift": vertices[last] - vertices[first],
        "loss_with_base_rate": float(carried),
        "regret": float(carried - by_width[last].min()),
    }


def _vertex(x: np.ndarray, y: np.ndarray) -> float:
    """Where the parabola through the least value and its neighbours is least."""
    at = int(y.argmin())
    if at in (0, len(x) - 1) or not np.isfinite(y[at - 1 : at + 2]).all():
        return float(x[at])
    a, b, _ = np.polyfit(x[at - 1 : at + 2], y[at - 1 : at + 2], 2)
    return float(-b / (2 * a)) if a > 0 else float(x[at])


def draw_losses(settings: Settings, lines: list[dict]) -> None:
    """`curves.png`: held-out loss against learning rate, one line a width; bands span the seeds."""
    figure = matplotlib.figure.Figure(figsize=(10, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colors = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.9, len(settings.widths)))
    best, worst = math.inf, -math.inf
    for axes, name in zip(panels, PARAMETERIZATIONS, strict=True):
        for width, color in zip(settings.widths, colors, strict=True):
            mean = mean_losses(settings, lines, name, width)
            runs = losses_of(settings, lines, name, width)
            axes.plot(settings.rates, mean, "o-", color=color, label=f"width {width}", markersize=4)
            axes.fill_between(settings.rates, runs.min(0), runs.max(0), color=color, alpha=0.15)
            axes.plot(settings.rates[int(mean.argmin())], mean.min(), "*", color=color, ms=13)
            best, worst = min(best, mean.min()), max(worst, mean[np.isfinite(mean)].min())
        axes.set_xscale("log", base=2)
        axes.set(title=name, xlabel="peak learning rate of the base")
        axes.legend()
    panels[0].set_ylabel("held-out loss (nats per token)")
    panels[0].set_ylim(best - 0.05, worst + 0.8)
    figure.savefig(settings.out / "curves.png", dpi=120)


def draw_coordinates(settings: Settings, checks: dict[str, dict[int, dict[str, float]]]) -> None:
    """`coordinates.png`: how far activations moved against the width."""
    figure = matplotlib.figure.Figure(figsize=(10, 4.5), layout="constrained")
    for axes, (name, check) in zip(figure.subplots(1, 2, sharey=True), checks.items(), strict=True):
        for coordinate, slope in metap.growth(check).items():
            changes = [x[coordinate] for x in check.values()]
            axes.plot(list(check), changes, "o-", label=f"{coordinate} (width^{slope:+.2f})")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(title=name, xlabel="width", ylabel=f"RMS change after {CHECKED} updates")
        axes.legend(fontsize=8)
    figure.savefig(settings.out / "coordinates.png", dpi=120)


# --- Files ---------------------------------------------------------------------------------------
def _key(line: dict[str, Any]) -> tuple:
    return tuple(line[name] for name in ("parameterization", "width", "seed", "learning_rate"))


def _name(settings: Settings, name: str, width: int) -> str:
    """Under which parameterization a width's runs are kept: the base has only one."""
    return PARAMETERIZATIONS[0] if width == settings.widths[0] else name


def _todo(settings: Settings, done: list[dict]) -> dict[tuple[str, int], list[tuple[int, float]]]:
    there = {_key(line) for line in done}
    pairs = [(name, width) for width in settings.widths for name in PARAMETERIZATIONS]
    wanted = {
        (name, width): [
            (seed, rate)
            for seed in settings.seeds
            for rate in settings.rates
            if (name, width, seed, rate) not in there
        ]
        for name, width in pairs
        if name == _name(settings, name, width)
    }
    return {key: runs for key, runs in wanted.items() if runs}


def _begin(settings: Settings) -> list[dict]:
    """The runs that are there already; the folder is made, or checked to be of these settings."""
    same = ("layers", "steps", "batch", "length")
    config = settings.out / "config.json"
    values = dataclasses.asdict(settings) | {"out": str(settings.out)}
    if config.exists():
        if not settings.resume:
            raise ValueError(f"{settings.out}: holds an earlier run; add --resume or another --out")
        old = json.loads(config.read_text())
        for name in same:
            if old[name] != values[name]:
                raise ValueError(f"{config}: {name} {old[name]} there, {values[name]} asked for")
    settings.out.mkdir(parents=True, exist_ok=True)
    checkpointing.write(config, json.dumps(values, indent=2) + "\n")
    lines = settings.out / "metrics.jsonl"
    return [json.loads(x) for x in lines.read_text().splitlines()] if lines.exists() else []


if __name__ == "__main__":
    sys.exit(console.main(Settings, run, __doc__, "metap"))
