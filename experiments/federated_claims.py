"""What federated learning should do here, each with its threshold; `benchmarks.federated` checks.

S1 to S10 and S14 are about digits, S11 to S13 about generated textures and keywords, S15 about a
tiny Scout on generated languages, S16 about adapters, P4 about bytes. Thresholds were set before
this was written, from runs of other code.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.stats
from flax import nnx

from experiments import federated_lab, federated_text, federated_vision
from experiments.federated_lab import Lab
from l4jax.config import Execution
from l4jax.federated import (
    adapters,
    algorithms,
    clients,
    generated,
    language,
    metrics,
    partition,
    sharing,
    simulation,
)
from l4jax.federated.local import Local
from l4jax.models.llama4 import Llama
from l4jax.training import objectives


class Verdict(NamedTuple):
    """What a claim came to: numbers by name, and for each a condition in words that it meets."""

    values: dict[str, float]
    holds: dict[str, bool]


# --- What runs -----------------------------------------------------------------------------------
class Runs:
    """The runs of all claims, each made once.

    Args:
        out: a folder for them; those that are there already are not made again.
        seeds: of digits; of textures and keywords the first two.
    """

    def __init__(self, out: pathlib.Path, seeds: tuple[int, ...]) -> None:
        self.out, self.seeds = out, seeds
        self._labs: dict[str, Lab] = {}

    def lab(self, name: str) -> Lab:
        """By name: digits, 100 rounds; dense, digits on dense layers; textures; keywords."""
        if name not in self._labs:
            values: dict[str, Any] = {"rounds": 100 if name == "digits" else 60}
            values |= {"set": "digits", "network": "dense"} if name == "dense" else {"set": name}
            self._labs[name] = Lab(federated_lab.Settings(out=self.out / name, **values))
        return self._labs[name]

    def split(self, lab: Lab, kind: str, seed: int, *, own: bool = False) -> list[np.ndarray]:
        """One of the paper's partitions."""
        rows = lab.examples.own if own else lab.examples.train
        return federated_vision.splits(lab, seed, rows)[kind]

    def curve(self, lab: Lab, kind: str, seed: int) -> dict[int, float]:
        """Accuracy by round on one of the paper's partitions."""
        return lab.curve(f"{kind[0]}-{seed}", self.split(lab, kind, seed), seed=seed)

    def central(self, lab: Lab, seed: int) -> dict[int, float]:
        """Accuracy by epoch of SGD with ten times the batch."""
        algorithm = lab.large_batches()
        return lab.curve(f"sgd-{seed}", [lab.examples.train], seed=seed, algorithm=algorithm)

    def shared(
        self, lab: Lab, seed: int, beta: float, *, alpha: float = 1.0, warm: bool = False
    ) -> dict[int, float]:
        """Accuracy by round of clients of one class, each with a share of G."""
        parts = self.split(lab, "1 class each", seed, own=True)
        name, start = f"share-{beta:g}-{alpha:g}-{warm}-{seed}", None
        if beta:
            y, of_all = lab.examples.y, self._shared_set(lab, seed, beta)
            parts, _ = sharing.share(parts, of_all, labels=y, alpha=alpha, seed=seed)
        if warm:
            start, _ = lab.centrally(of_all, seed=seed, epochs=federated_vision.WARM)
        return lab.curve(name, parts, seed=seed, start=start)

    def alone(self, lab: Lab, seed: int, beta: float) -> float:
        """Accuracy after training on G alone."""
        return lab.centrally(self._shared_set(lab, seed, beta), seed=seed, epochs=200)[1]

    def _shared_set(self, lab: Lab, seed: int, beta: float) -> np.ndarray:
        size = sharing.size_of(beta, self.split(lab, "1 class each", seed, own=True))
        return sharing.draw(lab.examples.y, lab.examples.spare, size=size, seed=seed)

    def mean(self, one: Callable[[int], float], *, generated: bool = False) -> float:
        """Over the seeds."""
        seeds = self.seeds[:2] if generated else self.seeds
        return float(np.mean([one(seed) for seed in seeds]))


last = federated_vision.last
KINDS = {"iid": "IID", "two": "2 classes each", "one": "1 class each"}


# --- Claims --------------------------------------------------------------------------------------
def s1(runs: Runs) -> Verdict:
    """IID FedAvg, 100 rounds: as good as SGD with ten times the batch."""
    iid = runs.mean(lambda seed: last(runs.curve(runs.lab("digits"), "IID", seed)))
    sgd = runs.mean(lambda seed: last(runs.central(runs.lab("digits"), seed)))
    return Verdict(
        {"IID": iid, "SGD": sgd},
        {"IID ≥ .975": iid >= 0.975, "IID ≥ SGD − .015": iid >= sgd - 0.015},
    )


def s2(runs: Runs) -> Verdict:
    """After 20 rounds skew costs much."""
    at = {
        name: runs.mean(lambda seed, kind=kind: runs.curve(runs.lab("digits"), kind, seed)[20])
        for name, kind in KINDS.items()
    }
    return Verdict(
        at,
        {
            "IID ≥ .96": at["iid"] >= 0.96,
            "2 classes from .80 to .95": 0.80 <= at["two"] <= 0.95,
            "1 class ≤ .75": at["one"] <= 0.75,
            "gap ≥ .20": at["iid"] - at["one"] >= 0.20,
        },
    )


def s3(runs: Runs) -> Verdict:
    """After 100 rounds it costs little on data as easy as these."""
    at = {
        name: runs.mean(lambda seed, kind=kind: last(runs.curve(runs.lab("digits"), kind, seed)))
        for name, kind in KINDS.items()
    }
    two, one = at["iid"] - at["two"], at["iid"] - at["one"]
    return Verdict(
        {"2 classes lose": two, "1 class loses": one},
        {"2 classes .005 to .05": 0.005 <= two <= 0.05, "1 class .03 to .15": 0.03 <= one <= 0.15},
    )


def s4(runs: Runs) -> Verdict:
    """5 % shared, after 20 rounds."""
    gain = runs.mean(
        lambda seed: (
            runs.shared(runs.lab("digits"), seed, 0.05)[20]
            - runs.shared(runs.lab("digits"), seed, 0.0)[20]
        )
    )
    return Verdict({"gain": gain}, {"gain ≥ .20": gain >= 0.20})


def s5(runs: Runs) -> Verdict:
    """5 % shared, after 100 rounds, against training on the shared set alone."""
    lab = runs.lab("digits")
    gain = runs.mean(lambda s: last(runs.shared(lab, s, 0.05)) - runs.alone(lab, s, 0.05))
    return Verdict({"ahead by": gain}, {"≥ .05": gain >= 0.05})


def s6(runs: Runs) -> Verdict:
    """After 40 rounds accuracy does not fall with β."""
    betas = (0.0, 0.025, 0.05, 0.1, 0.2)
    at = [
        runs.mean(lambda seed, beta=beta: runs.shared(runs.lab("digits"), seed, beta)[40])
        for beta in betas
    ]
    falls = max(a - b for a, b in zip(at[:-1], at[1:], strict=True))
    values = {f"β {beta:g}": x for beta, x in zip(betas, at, strict=True)}
    return Verdict(values, {"falls by ≤ .01": falls <= 0.01})


def s7(runs: Runs) -> Verdict:
    """A warm-up with β .1, α .5 against none with β .05, α 1, after 20 rounds."""
    warm = runs.mean(lambda s: runs.shared(runs.lab("digits"), s, 0.1, alpha=0.5, warm=True)[20])
    cold = runs.mean(lambda s: runs.shared(runs.lab("digits"), s, 0.05)[20])
    return Verdict({"warm": warm, "cold": cold}, {"warm ≥ cold + .01": warm >= cold + 0.01})


@functools.cache
def _mixtures(runs: Runs) -> tuple[list[float], list[metrics.Divergence]]:
    """EMD and divergence of seven mixtures: means over seeds, and every single divergence."""
    lab, emds, found = runs.lab("digits"), [], []
    train = lab.examples.train
    for level in federated_vision.LEVELS:
        for seed in runs.seeds:
            y = lab.examples.y[train]
            parts = [train[x] for x in partition.mixture(y, 10, iid=level, seed=seed)]
            emds.append(metrics.mean_emd(metrics.histograms(parts, lab.examples.y)))
            found.append(lab.divergence(parts, seed=seed))
    return emds, found


def _averages(runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    emds, found = _mixtures(runs)
    shape = (len(federated_vision.LEVELS), -1)
    totals = np.array([x.total for x in found])
    return np.reshape(emds, shape).mean(1), totals.reshape(shape).mean(1)


def s8(runs: Runs) -> Verdict:
    """Divergence after full-batch steps against EMD, seven mixtures."""
    emds, totals = _averages(runs)
    spearman = float(scipy.stats.spearmanr(emds, totals).statistic)
    pearson = float(scipy.stats.pearsonr(emds, totals).statistic)
    ratio = float(totals[-1] / totals[0])
    return Verdict(
        {"Spearman": spearman, "Pearson": pearson, "divergence at 1.8 / at 0": ratio},
        {
            "Spearman ≥ .95": spearman >= 0.95,
            "Pearson ≥ .93": pearson >= 0.93,
            "ratio ≥ 5": ratio >= 5,
        },
    )


def s9(runs: Runs) -> Verdict:
    """The same with clients of one, two, three and five classes, and IID ones, beside mixtures."""
    lab = runs.lab("digits")
    train, y = lab.examples.train, lab.examples.y
    emds, totals = (list(x) for x in _averages(runs))
    for each in (1, 2, 3, 5, 10):
        emd, total = [], []
        for seed in runs.seeds:
            if each == 10:
                split = partition.uniform(len(train), 10, seed=seed)
            else:
                split = partition.classes(y[train], 10, each=each, seed=seed)
            parts = [train[x] for x in split]
            emd.append(metrics.mean_emd(metrics.histograms(parts, y)))
            total.append(lab.divergence(parts, seed=seed).total)
        emds.append(np.mean(emd))
        totals.append(np.mean(total))
    spearman = float(scipy.stats.spearmanr(emds, totals).statistic)
    return Verdict({"Spearman": spearman}, {"Spearman ≥ .85": spearman >= 0.85})


def s10(runs: Runs) -> Verdict:
    """The output layer diverges most, at every EMD."""
    _, found = _mixtures(runs)
    shape = (len(federated_vision.LEVELS), -1)
    layers = {
        name: np.reshape([x.groups[name] for x in found], shape).mean(1) for name in found[0].groups
    }
    others = np.max([x for name, x in layers.items() if name != "output"], 0)
    least = float(np.min(layers["output"] / others))
    return Verdict({"output / next, at least": least}, {"above 1": least > 1})


def _generated(runs: Runs, name: str) -> dict[str, float]:
    """Means of rounds 40 to 60."""
    lab = runs.lab(name)

    def late(curve: dict[int, float]) -> float:
        return float(np.mean([x for at, x in curve.items() if at >= 40]))

    mean = functools.partial(runs.mean, generated=True)
    found = {
        key: mean(lambda seed, kind=kind: late(runs.curve(lab, kind, seed)))
        for key, kind in KINDS.items()
    }
    found["shared"] = mean(lambda seed: late(runs.shared(lab, seed, 0.05)))
    found["alone"] = mean(lambda seed: runs.alone(lab, seed, 0.05))
    return found


def s11(runs: Runs) -> Verdict:
    """Textures: skew costs as much as on natural images."""
    at = _generated(runs, "textures")
    two, one = at["iid"] - at["two"], at["iid"] - at["one"]
    return Verdict(
        {"IID": at["iid"], "2 classes lose": two, "1 class loses": one},
        {
            "IID ≥ .78": at["iid"] >= 0.78,
            "2 classes .10 to .28": 0.10 <= two <= 0.28,
            "1 class .40 to .60": 0.40 <= one <= 0.60,
        },
    )


def s12(runs: Runs) -> Verdict:
    """Textures: 5 % shared."""
    at = _generated(runs, "textures")
    gain, ahead = at["shared"] - at["one"], at["shared"] - at["alone"]
    return Verdict(
        {"gain": gain, "ahead of the shared set alone": ahead},
        {"gain ≥ .22": gain >= 0.22, "ahead ≥ .15": ahead >= 0.15},
    )


def s13(runs: Runs) -> Verdict:
    """Keywords: skew, and 5 % shared."""
    at = _generated(runs, "keywords")
    loss, gain = at["iid"] - at["one"], at["shared"] - at["one"]
    return Verdict(
        {"IID": at["iid"], "1 class loses": loss, "5 % shared gains": gain},
        {"loses ≥ .15": loss >= 0.15, "gains ≥ .10": gain >= 0.10},
    )


def s14(runs: Runs) -> Verdict:
    """Dense layers, one class each, 60 rounds: what servers' optimizers and variates win."""
    lab = runs.lab("dense")
    values = lab.settings.values
    local = Local(loss=lab.loss, rate=lambda n: values.rate * values.decay**n, batch=values.batch)
    makers = {
        "FedAvg": algorithms.fedavg(local),
        "FedAvgM": algorithms.fedavgm(local, rate=0.3),
        "Nesterov": algorithms.diloco(local),
        "FedAdam": algorithms.fedadam(local),
        "SCAFFOLD": algorithms.scaffold(local),
    }
    at = {}
    for name, algorithm in makers.items():
        at[name] = runs.mean(
            lambda seed, name=name, algorithm=algorithm: last(
                lab.curve(
                    f"{name}-{seed}",
                    runs.split(lab, "1 class each", seed),
                    seed=seed,
                    algorithm=algorithm,
                )
            )
        )
    base = at["FedAvg"]
    holds = {f"{name} above FedAvg": at[name] > base for name in ("FedAvgM", "Nesterov", "FedAdam")}
    return Verdict(at, holds | {"SCAFFOLD ≥ FedAvg + .03": at["SCAFFOLD"] >= base + 0.03})


def _languages(seed: int) -> federated_text.Texts:
    """Four languages, 600 texts of 48 words each: 64 to measure on, 168 to be shared."""
    found = generated.languages(4, 600, length=48, vocabulary=32, seed=seed)
    place, rows = np.tile(np.arange(600), 4), np.arange(2400)
    return federated_text.Texts(
        names=("a", "b", "c", "d"),
        pool={"tokens": found["tokens"]},
        domain=found["y"],
        own=rows[place >= 232],
        spare=rows[(place >= 64) & (place < 232)],
        test=[rows[(place < 64) & (found["y"] == k)] for k in range(4)],
        others=np.zeros(0, int),
    )


def s15(runs: Runs) -> Verdict:
    """A tiny Scout on four languages, 16 rounds of 20 steps: skew costs much, replay wins back."""
    config = federated_text.twin(32)
    at: dict[str, list[float]] = {}
    for seed in runs.seeds:
        lab = federated_text.Lab(
            federated_text.Settings(
                out=runs.out / "languages" / str(seed), seed=seed, rounds=16, batch=8, rate=3e-3
            ),
            _languages(seed),
            Llama(config, execution=Execution(), rngs=nnx.Rngs(seed)),
        )
        parts = {"one": lab.texts.by_domain, "iid": lab.iid(), "sync": [lab.texts.own]}
        parts |= {f"ρ {rho:g}": lab.mixed(rho)[0] for rho in (0.1, 0.25)}
        for name, rows in parts.items():
            curve = lab.run(name, rows).curve
            at.setdefault(name, []).append(curve[16])
    loss = {name: float(np.mean(x)) for name, x in at.items()}
    gap = loss["one"] - loss["iid"]
    closed = {name: (loss["one"] - loss[name]) / gap for name in ("ρ 0.1", "ρ 0.25")}
    return Verdict(
        loss | {f"{name} closes": x for name, x in closed.items()},
        {
            "IID ≤ synchronous + .10": loss["iid"] <= loss["sync"] + 0.10,
            "one language ≥ IID + .30": gap >= 0.30,
            "ρ .10 closes ≥ .25": closed["ρ 0.1"] >= 0.25,
            "ρ .25 closes ≥ .60": closed["ρ 0.25"] >= 0.60,
        },
    )


def s16(runs: Runs) -> Verdict:
    """Adapters with a frozen: the server's product is the mean of the clients', by examples."""
    found = _languages(runs.seeds[0])
    model = Llama(federated_text.twin(32), execution=Execution(), rngs=nnx.Rngs(0))
    lab = federated_text.Lab(federated_text.Settings(), found, model)
    network = lab.network("freeze_a", rank=4)
    local = Local(
        loss=language.loss(network.of, objectives.next_token()), rate=0.1, batch=8, shuffle=False
    )
    parts = [part[: 8 * (k + 1)] for k, part in enumerate(found.by_domain)]
    algorithm = adapters.fedavg(local, "freeze_a", clients=4, options=algorithms.Options(block=1))

    def products(parts: list[np.ndarray]) -> list[np.ndarray]:
        data, cohort = clients.gather(lab.pool, parts, width=32), clients.everybody(len(parts))
        state = algorithm.init(network.params, len(parts))
        after, _ = jax.jit(algorithm.round)(state, data, cohort, key=jax.random.key(0), number=0)
        return [np.asarray(x) for x in adapters.products(after.params)]

    each = [products([part]) for part in parts]
    sizes = [len(part) for part in parts]
    mean = [np.average(xs, axis=0, weights=sizes) for xs in zip(*each, strict=True)]
    pairs = list(zip(products(parts), mean, strict=True))
    far = max(float(np.abs(a - b).max()) for a, b in pairs)
    most = max(float(np.abs(b).max()) for _, b in pairs)
    return Verdict({"off by": far, "largest": most}, {"≤ 1e-6": far <= 1e-6, "not 0": most > 1e-5})


def p4(runs: Runs) -> Verdict:
    """Bytes of a round, at 4 and 16 steps: two models for each client, however many steps."""
    lab = runs.lab("dense")
    size = sum(x.nbytes for x in jax.tree.leaves(lab.params(0)))
    counted = []
    for epochs in (1, 4):
        algorithm = algorithms.fedavg(Local(loss=lab.loss, rate=0.1, batch=35, epochs=epochs))
        parts = runs.split(lab, "IID", 0)
        settings = simulation.Settings(rounds=2)
        line = simulation.run(
            algorithm, lab.params(0), lab.federation(parts), settings=settings
        ).lines[-1]
        counted.append(line["bytes_down"] + line["bytes_up"])
    holds = {"2 K |θ| bytes": counted[0] == 20 * size, "whatever the steps": len(set(counted)) == 1}
    return Verdict({"bytes": counted[0], "model": size}, holds)


CLAIMS: dict[str, Callable[[Runs], Verdict]] = {
    **{f"S{n}": f for n, f in enumerate((s1, s2, s3, s4, s5, s6, s7), 1)},
    **{f"S{n}": f for n, f in enumerate((s8, s9, s10, s11, s12, s13, s14, s15, s16), 8)},
    "P4": p4,
}
