"""Does federated learning here behave as it should, and what does a round of many clients cost?

Checks the claims of skew, sharing and server optimizers on digits (S1–S10, S14), generated textures
and keywords (S11–S13) and a tiny Scout on generated languages (S15), that averaged adapters are
what they should be (S16), and that traffic is counted exactly (P4): claim, threshold, value,
verdict. Then times rounds of 10 to 5,000 clients, and how many clients should run at once.

    python -m experiments.benchmarks.federated                # digits and growth, 5 minutes
    python -m experiments.benchmarks.federated --claims all   # generated sets too: 20 minutes
    python -m experiments.benchmarks.federated --claims S2 S4 --seeds 0

The claims are in `experiments/federated_claims.py`. Runs stay under --out and are not made again
with --resume. Writes `federated.json` and `federated.png` under --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

import jax
import matplotlib.figure
import numpy as np

from experiments import console
from experiments.benchmarks import peers
from experiments.console import CONSOLE
from experiments.federated_claims import CLAIMS, Runs
from experiments.federated_lab import Lab
from l4jax.federated import algorithms, clients, mapping
from l4jax.federated.local import Local

GROWTH = (10, 50, 200, 1000, 5000)
EACH = 20
"""Examples of a client there."""
BLOCKS = (1, 4, 16, 64)
COUNTED = 5
"""Rounds that are timed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Leaves of the command line."""

    out: pathlib.Path = pathlib.Path("runs/benchmarks")
    claims: tuple[str, ...] = ("digits",)
    """Names of claims; "digits" for those on digits, S16 and P4, "all" for all, "none" for none."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of digits and languages; of textures and keywords the first two."""
    growth: bool = True
    """Whether rounds are timed."""
    resume: bool = False
    """Keep the runs that --out has."""
    json: bool = False
    """Print only the report."""

    def __post_init__(self) -> None:
        unknown = [x for x in self.claims if x not in {*CLAIMS, "digits", "all", "none"}]
        if not self.seeds:
            raise ValueError("seeds must be at least one")
        if unknown:
            raise ValueError(
                f"claims {unknown} are unknown: choose from digits, all, none, {', '.join(CLAIMS)}"
            )

    @property
    def chosen(self) -> list[str]:
        """Names of the claims to be checked."""
        generated = ("S11", "S12", "S13", "S15")
        groups = {"all": list(CLAIMS), "none": []}
        groups["digits"] = [name for name in CLAIMS if name not in generated]
        return list(dict.fromkeys(c for name in self.claims for c in groups.get(name, [name])))


# --- Growth --------------------------------------------------------------------------------------
def growth(runs: Runs) -> dict[str, Any]:
    """Milliseconds for each client of a round, by clients and by block; memory, by clients."""
    found: dict[str, Any] = {"clients": {}, "blocks": {}}
    for name, lab in (("dense", runs.lab("dense")), ("convolutions", runs.lab("digits"))):
        block = mapping.block_size(lab.params(0), batched=name == "dense")
        found["clients"][name] = {n: _timed(lab, n, block) for n in GROWTH}
        found["blocks"][name] = {b: _timed(lab, 200, b)["milliseconds"] for b in BLOCKS}
        sampled = _timed(lab, 5000, block, per_round=10)
        found["clients"][name]["10 of 5000"] = sampled
    return found


def _timed(lab: Lab, count: int, block: int, per_round: int | None = None) -> dict[str, float]:
    rng = np.random.default_rng(0)
    parts = [rng.choice(lab.examples.train, EACH, replace=False) for _ in range(count)]
    data = clients.gather(lab.pool, parts)
    local = Local(loss=lab.loss, rate=0.1, batch=10)
    algorithm = algorithms.fedavg(local, options=algorithms.Options(block=block))
    rule = clients.Participation(per_round=per_round)
    state, key = algorithm.init(lab.params(0), count), jax.random.key(0)
    cohort = rule.draw(count, 0, seed=0)
    step = jax.jit(algorithm.round).lower(state, data, cohort, key=key, number=0).compile()
    times = []
    for number in range(COUNTED):
        cohort, begun = rule.draw(count, number, seed=0), time.perf_counter()
        state, _ = jax.block_until_ready(step(state, data, cohort, key=key, number=number))
        times.append(time.perf_counter() - begun)
    each = 1000 * float(np.median(times)) / (per_round or count)
    CONSOLE.print(f"{count:5} clients, block {block:3}: {each:.3f} ms for each", highlight=False)
    return {
        "milliseconds": each,
        "temporary_megabytes": step.memory_analysis().temp_size_in_bytes / 1e6,
        "data_megabytes": sum(x.nbytes for x in jax.tree.leaves(data)) / 1e6,
    }


def draw(claims: list[dict[str, Any]], found: dict[str, Any]) -> matplotlib.figure.Figure:
    """Time for each client and memory by clients, and time by block; below, what the claims say."""
    height = 0.3 + 0.22 * len(claims)
    figure = matplotlib.figure.Figure(figsize=(13, 4 * bool(found) + height), layout="constrained")
    rows = figure.subfigures(2, 1, height_ratios=(4 if found else 0.01, height))
    if found:
        _draw_growth(rows[0], found)
    lines = [
        f"{x['claim']:4}{'holds' if x['holds'] else 'FAILS':7}{x['about']}  "
        + ", ".join(f"{name} {value:.3g}" for name, value in x["values"].items())
        for x in claims
    ]
    rows[1].text(0.01, 0.95, "\n".join(lines), family="monospace", fontsize=7, va="top")
    return figure


def _draw_growth(figure: Any, found: dict[str, Any]) -> None:
    left, middle, right = figure.subplots(1, 3)
    for name in found["clients"]:
        points = {n: x for n, x in found["clients"][name].items() if isinstance(n, int)}
        for axes, key in ((left, "milliseconds"), (middle, "temporary_megabytes")):
            axes.plot(list(points), [x[key] for x in points.values()], "o-", label=name)
        blocks = found["blocks"][name]
        right.plot(list(blocks), list(blocks.values()), "o-", label=name)
    left.set(xlabel="clients", ylabel="ms for each client of a round", xscale="log", ylim=(0, None))
    middle.set(xlabel="clients", ylabel="temporary memory (MB)", xscale="log", ylim=(0, None))
    right.set(xlabel="clients at once, of 200", ylabel="ms for each client", xscale="log")
    right.set_ylim(0)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"Rounds of clients with {EACH} examples each, batches of 10")


# --- Report --------------------------------------------------------------------------------------
def check(settings: Settings, runs: Runs) -> list[dict[str, Any]]:
    """The verdicts, each printed as soon as it is there."""
    found = []
    for name in settings.chosen:
        verdict = CLAIMS[name](runs)
        line = {
            "claim": name,
            "about": (CLAIMS[name].__doc__ or "").strip(),
            "values": {key: round(float(x), 4) for key, x in verdict.values.items()},
            "thresholds": {key: bool(x) for key, x in verdict.holds.items()},
            "holds": all(verdict.holds.values()),
        }
        found.append(line)
        values = ", ".join(f"{key} {x:.4g}" for key, x in line["values"].items())
        failed = [key for key, holds in line["thresholds"].items() if not holds]
        word = "holds" if line["holds"] else f"FAILS: {', '.join(failed)}"
        print(f"{name:4} {word:8} {line['about']} {values}", file=sys.stderr)
    return found


def run(settings: Settings) -> None:
    folder = settings.out / "federated"
    if folder.exists() and not settings.resume:
        raise ValueError(f"{folder}: holds runs; add --resume to keep them, or take another --out")
    runs, begun = Runs(folder, settings.seeds), time.process_time()
    claims = check(settings, runs)
    found = growth(runs) if settings.growth else {}
    report = {
        "benchmark": "federated",
        **peers.environment(),
        "seeds": list(settings.seeds),
        "claims": claims,
        "growth": found,
        "cpu_seconds": time.process_time() - begun,
    }
    args = argparse.Namespace(out=settings.out, json=settings.json)
    peers.write("federated", json.loads(json.dumps(report)), args, draw(claims, found))


if __name__ == "__main__":
    sys.exit(console.main(Settings, run, __doc__, "federated"))
