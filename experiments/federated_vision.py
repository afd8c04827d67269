"""Federated learning where clients differ in what they see: Zhao et al. (2018) on small data.

    python -m experiments.federated_vision                          # digits, about a minute
    python -m experiments.federated_vision --set textures --rounds 60 --seeds 0 1
    python -m experiments.federated_vision --set mnist --data DIR --network paper --rounds 500

Splits a data set among clients, evenly, two classes each and one class each, and trains by FedAvg
(or another --algorithm, with sampled clients, smaller or private updates: --help has them) against
SGD with batches K times larger; measures by how much weights diverge, in every round and by layer,
and against the EMD; and what a small set does that all clients share (β, α), warm-up included,
beside training on that set alone.

digits: scikit-learn's 1,797 handwritten digits of 8 × 8, beside the library. textures, keywords:
generated, no real data. mnist, cifar10, speech_commands: from --data, a folder of the published
files or an .npz file of arrays (`l4jax.federated.files`). Batches, epochs, learning rates and decay
are the paper's for the last three. Its networks were recalled, not read (--network paper).

Writes `config.json`, a folder for each run under `runs/` (`metrics.jsonl`, a line for each round),
`report.json`, `results.md` with all numbers of the studies asked for, and their figures. --resume
keeps runs that are there, and what `report.json` has of other studies.
"""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable
from typing import Any

import matplotlib.figure
import numpy as np

from experiments import console, federated_lab
from experiments.console import CONSOLE
from experiments.federated_lab import Lab, Settings
from l4jax.federated import drawing, metrics, partition, sharing
from l4jax.training import checkpointing

LEVELS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1, 0.0)
"""IID shares that the EMD is varied by."""
BETAS = (0.025, 0.05, 0.1, 0.2)
ALPHAS = (0.1, 0.2, 0.5, 1.0)
WARM_BETAS = (0.05, 0.1)
"""Of the study of α."""
WARM = 50
"""Epochs of warm-up and of training on the shared set alone."""
FREE = frozenset(("resume", "out", "checkpoint_every", "studies"))
"""Leaves that may change when a run is resumed."""
Report = dict[str, Any]


def run(settings: Settings) -> Report:
    """Makes the studies, and writes what they found."""
    lab = Lab(settings)
    # What cannot be split is refused before anything is left in the folder.
    for rows in (lab.examples.train, lab.examples.own):
        splits(lab, settings.seeds[0], rows)
    private = settings.cohorts.guarantee(settings.clients, settings.rounds)
    federated_lab.begin(settings, free=FREE)
    CONSOLE.print(
        f"{settings.set}: {len(lab.examples.train)} examples to train on, "
        f"{len(lab.examples.test)} to test; network: {lab.network.provenance}",
        highlight=False,
    )
    for text in private.get("warnings", ()):
        console.say(f"privacy: {text}")
    made: dict[str, Callable[[Lab], Report]] = {
        "partitions": partitions,
        "divergence": divergence,
        "emd": emd,
        "sharing": shares,
    }
    report = {name: made[name](lab) for name in settings.studies}
    if private:
        report["privacy"] = private
    federated_lab.record(settings.out, report)
    checkpointing.write(settings.out / "results.md", table(settings, lab, report))
    print(table(settings, lab, report))
    return report


# --- Studies -------------------------------------------------------------------------------------
def splits(lab: Lab, seed: int, rows: np.ndarray) -> dict[str, partition.Partition]:
    """The paper's three partitions of some rows."""
    count, y = lab.settings.clients, lab.examples.y[rows]
    found = {
        "IID": partition.uniform(len(rows), count, seed=seed),
        "2 classes each": partition.classes(y, count, each=2, seed=seed),
        "1 class each": partition.classes(y, count, each=1, seed=seed),
    }
    return {name: [rows[part] for part in parts] for name, parts in found.items()}


def partitions(lab: Lab) -> Report:
    """Accuracy by round for each partition, and for SGD in one place."""
    s, train = lab.settings, lab.examples.train
    runs: dict[str, list[dict[int, float]]] = {}
    apart: dict[str, dict[str, dict[int, list[float]]]] = {}
    for seed in s.seeds:
        for name, parts in splits(lab, seed, train).items():
            if seed == s.seeds[0]:
                counts = metrics.histograms(parts, lab.examples.y)
                figure = drawing.heat_map(counts, np.unique(lab.examples.y).tolist(), title=name)
                _save(s, figure, f"clients_{_slug(name)}")
            algorithm = lab.compared if s.compare else lab.algorithm()
            run = f"{_slug(name)}-{seed}"
            runs.setdefault(name, []).append(lab.curve(run, parts, seed=seed, algorithm=algorithm))
            for layer, values in lab.apart(run).items():
                points = apart.setdefault(layer, {}).setdefault(name, {})
                for number, value in values.items():
                    points.setdefault(number, []).append(value)
        algorithm = lab.large_batches()
        name = f"SGD, batch {s.clients * s.values.batch}"
        curve = lab.curve(f"sgd-{seed}", [train], seed=seed, algorithm=algorithm)
        runs.setdefault(name, []).append(curve)
    title = f"{s.set}: {s.algorithm}, {s.clients} clients, B = {s.values.batch}, E = {s.epochs}"
    _save(s, drawing.curves(runs, title=title, dashed=name), "accuracy")
    report = {"accuracy": runs, "last": {x: [last(c) for c in cs] for x, cs in runs.items()}}
    if not apart:
        return report
    title = f"{s.set}: weight divergence from training in one place, by layer"
    _save(s, drawing.against(apart, xlabel="round", title=title), "divergence_by_round")
    return report | {"divergence": apart}


def divergence(lab: Lab) -> Report:
    """How far each layer goes from central training in a round of full-batch steps."""
    found: dict[str, list[metrics.Divergence]] = {}
    for seed in lab.settings.seeds:
        for name, parts in splits(lab, seed, lab.examples.train).items():
            found.setdefault(name, []).append(lab.divergence(parts, seed=seed))
    groups = {
        name: {layer: float(np.mean([x.groups[layer] for x in xs])) for layer in xs[0].groups}
        for name, xs in found.items()
    }
    title = f"{lab.settings.set}: weight divergence after one round of full-batch steps"
    _save(lab.settings, drawing.bars(groups, title=title), "divergence")
    totals = {name: [x.total for x in xs] for name, xs in found.items()}
    return {"layers": groups, "total": totals}


def emd(lab: Lab) -> Report:
    """Divergence and accuracy against the EMD, several draws of each."""
    s, train = lab.settings, lab.examples.train
    diverged: dict[float, list[float]] = {}
    reached: dict[float, list[float]] = {}
    for level in LEVELS:
        for seed in range(s.draws):
            split = partition.mixture(lab.examples.y[train], s.clients, iid=level, seed=seed)
            parts = [train[part] for part in split]
            counts = metrics.histograms(parts, lab.examples.y)
            at = round(metrics.mean_emd(counts), 2)
            diverged.setdefault(at, []).append(lab.divergence(parts, seed=seed).total)
            rounds = max(s.rounds // 2, 1)
            curve = lab.curve(f"emd-{at}-{seed}", parts, seed=seed, rounds=rounds)
            reached.setdefault(at, []).append(last(curve))
    panels = {
        "weight divergence": {"mixtures": diverged},
        f"accuracy after {rounds} rounds": {"mixtures": reached},
    }
    title = f"{s.set}: mean ± s.d. of {s.draws} draws"
    _save(s, drawing.against(panels, xlabel="EMD (L1)", title=title), "emd")
    return {"divergence": diverged, "accuracy": reached, "rounds": rounds}


def shares(lab: Lab) -> Report:
    """Accuracy against β, with the shared set alone beside it, and against α after a warm-up."""
    s, y = lab.settings, lab.examples.y
    by_beta: dict[float, list[float]] = {}
    alone: dict[float, list[float]] = {}
    emds: dict[float, float] = {}
    by_alpha: dict[str, dict[float, list[float]]] = {f"β = {b:g}": {} for b in WARM_BETAS}
    levels: dict[str, list[float]] = {}
    rhos: dict[float, float] = {}
    for seed in s.seeds:
        parts = splits(lab, seed, lab.examples.own)["1 class each"]
        emds[0.0] = metrics.mean_emd(metrics.histograms(parts, y))
        by_beta.setdefault(0.0, []).append(last(lab.curve(f"beta-0-{seed}", parts, seed=seed)))
        for beta in BETAS:
            size = sharing.size_of(beta, parts)
            shared = sharing.draw(y, lab.examples.spare, size=size, seed=seed)
            share = functools.partial(sharing.share, parts, shared, labels=y, seed=seed)
            after, found = share(alpha=1.0)
            emds[beta], rhos[beta] = found.emd_after, float(found.rho.mean())
            curve = lab.curve(f"beta-{beta:g}-{seed}", after, seed=seed)
            by_beta.setdefault(beta, []).append(last(curve))
            warm, accuracy = lab.centrally(shared, seed=seed, epochs=WARM)
            alone.setdefault(beta, []).append(accuracy)
            if beta not in WARM_BETAS:
                continue
            levels.setdefault(f"warm-up, β = {beta:g}", []).append(accuracy)
            for alpha in ALPHAS:
                name = f"alpha-{beta:g}-{alpha:g}-{seed}"
                curve = lab.curve(name, share(alpha=alpha)[0], seed=seed, start=warm)
                by_alpha[f"β = {beta:g}"].setdefault(alpha, []).append(last(curve))
    title = f"{s.set}: 1 class each, after {s.rounds} rounds"
    panels = {"accuracy": {"with a share of all (α = 1)": by_beta, "the shared set alone": alone}}
    figure = drawing.against(panels, xlabel="β = |G| / |D|", title=title, second=("EMD", emds))
    _save(s, figure, "beta")
    means = {name: float(np.mean(values)) for name, values in levels.items()}
    figure = drawing.against({"accuracy": by_alpha}, xlabel="α", title=title, levels=means)
    _save(s, figure, "alpha")
    return {
        "beta": by_beta,
        "shared_alone": alone,
        "emd": emds,
        "rho": rhos,
        "alpha": by_alpha,
        "warm_up": levels,
    }


def last(curve: dict[int, float]) -> float:
    """The mean of the last three measurements: with skewed clients single ones swing widely."""
    return float(np.mean(list(curve.values())[-3:]))


# --- Results -------------------------------------------------------------------------------------
def table(settings: Settings, lab: Lab, report: Report) -> str:
    """All numbers in Markdown, with what they are of."""
    s, v = settings, settings.values
    command = shlex.join(["python", "-m", "experiments.federated_vision", *sys.argv[1:]])
    origin = "generated, no real data" if s.set in ("textures", "keywords") else "real data"
    lines = [
        f"`{command}`",
        "",
        f"{s.set} ({origin}), network {s.network} ({lab.network.provenance}), seeds "
        f"{', '.join(map(str, s.seeds))}, {s.clients} clients, {s.algorithm}, {s.rounds} rounds, "
        f"B {v.batch}, E {s.epochs}, learning rate {v.rate:g} × {v.decay:g}^round. Accuracies are "
        "means of the last three measurements.",
        "",
        "| what | mean | each seed or draw |",
        "|---|---|---|",
    ]
    rows: dict[str, list[float]] = {}
    if report.get("privacy", {}).get("epsilon") is not None:
        rows[f"ε of privacy after {s.rounds} rounds, δ {s.cohorts.delta:g}"] = [
            report["privacy"]["epsilon"]
        ]
    if "partitions" in report:
        rows |= {f"accuracy, {x}": ys for x, ys in report["partitions"]["last"].items()}
    if "divergence" in report:
        rows |= {f"divergence, {x}": ys for x, ys in report["divergence"]["total"].items()}
    if "emd" in report:
        found = report["emd"]
        for kind in ("divergence", "accuracy"):
            rows |= {f"{kind} at EMD {x:.2f}": ys for x, ys in sorted(found[kind].items())}
    if "sharing" in report:
        found = report["sharing"]
        for beta, ys in found["beta"].items():
            about = f", ρ {found['rho'][beta]:.2f}" if beta else ""
            rows[f"accuracy, β {beta:g}, EMD {found['emd'][beta]:.2f}{about}"] = ys
        rows |= {
            f"accuracy, shared set alone, β {b:g}": y for b, y in found["shared_alone"].items()
        }
        for beta, points in found["alpha"].items():
            rows |= {f"accuracy, warm-up, {beta}, α {a:g}": ys for a, ys in points.items()}
    for name, values in rows.items():
        digits = 4 if name.startswith("divergence") else 3
        each = ", ".join(f"{x:.{digits}f}" for x in values)
        lines.append(f"| {name} | {np.mean(values):.{digits}f} | {each} |")
    return "\n".join(lines) + "\n"


def _slug(name: str) -> str:
    return name.lower().replace(" ", "_")


def _save(settings: Settings, figure: matplotlib.figure.Figure, name: str) -> None:
    federated_lab.save(settings.out, figure, name)


if __name__ == "__main__":
    sys.exit(console.main(Settings, run, __doc__, "federated_vision"))
