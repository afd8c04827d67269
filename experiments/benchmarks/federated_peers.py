"""Rounds a second of FedAvg on digits, beside FedJAX and Flower's simulation.

Ten clients of two digits each, batches of 10, one pass a round, in dense layers and in small
convolutions: the same data, loss, learning rate and JAX for all. Ours is the compiled round, with
all clients at once, one after the other, and as many at once as `mapping.block_size` says, and a
whole `simulation.run`, with its metrics. FedJAX compiles a step and calls it for every batch of
every client; Flower's simulation hands clients to processes (Ray), and runs our own local function
in them. Everyone takes turns; the first rounds, which compile, do not count.

FedJAX's release of 2023 does not work with current JAX, its repository does:

    pip install '.[federated]' 'flwr[simulation]' git+https://github.com/google/fedjax
    python -m experiments.benchmarks.federated_peers
    python -m experiments.benchmarks.federated_peers --peers fedjax

Writes `federated_peers.json` and `federated_peers.png` under --out. Claims, whose thresholds were
set before: P1, dense layers at least 5 times FedJAX; P2, convolutions at least as fast as FedJAX
with all clients at once and 1.5 times one after the other; P3, dense layers at least 20 times
Flower.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import console, federated_lab, federated_vision
from experiments.benchmarks import peers
from experiments.console import CONSOLE
from l4jax.federated import algorithms, clients, flower, mapping, simulation
from l4jax.federated.local import Local

Networks = Literal["dense", "small"]
RATE = 0.1
Contestant = Callable[[int], None]
"""Makes so many rounds, to their end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Leaves of the command line."""

    peers: tuple[Literal["fedjax", "flower"], ...] = ("fedjax", "flower")
    rounds: int = 40
    """That are timed at a stretch."""
    repetitions: int = 5
    """Stretches of each."""
    flower_rounds: int = 6
    """Of Flower's simulation; the first two do not count."""
    out: pathlib.Path = pathlib.Path("runs/benchmarks")
    json: bool = False
    """Print only the report."""

    def __post_init__(self) -> None:
        if min(self.rounds, self.repetitions, self.flower_rounds - 2) < 1:
            raise ValueError("rounds and repetitions must be at least 1, flower_rounds 3")


class Federation:
    """Digits of ten clients, and FedAvg on a network."""

    def __init__(self, network: Networks) -> None:
        self.lab = federated_lab.Lab(federated_lab.Settings(network=network))
        splits = federated_vision.splits(self.lab, 0, self.lab.examples.train)
        self.parts = splits["2 classes each"]
        self.data = clients.gather(self.lab.pool, self.parts)
        self.params, self.batched = self.lab.params(0), network == "dense"

    @property
    def local(self) -> Local:
        """What a client does."""
        return Local(loss=self.lab.loss, rate=RATE, batch=10)

    def algorithm(self, block: int | None) -> algorithms.Algorithm:
        """FedAvg with so many clients at once."""
        return algorithms.fedavg(self.local, options=algorithms.Options(block=block))


# --- Contestants ---------------------------------------------------------------------------------
def ours(federation: Federation, block: int | None) -> Contestant:
    """The compiled round."""
    algorithm, everybody = federation.algorithm(block), clients.everybody(10)
    step, key = jax.jit(algorithm.round), jax.random.key(0)
    state = algorithm.init(federation.params, 10)

    def rounds(count: int) -> None:
        nonlocal state
        for number in range(count):
            state, _ = step(state, federation.data, everybody, key=key, number=number)
        jax.block_until_ready(state)

    return rounds


def whole(federation: Federation) -> Contestant:
    """A simulation, with a line of metrics for each round."""
    block = mapping.block_size(federation.params, batched=federation.batched)
    algorithm = federation.algorithm(block)

    def rounds(count: int) -> None:
        settings = simulation.Settings(rounds=count)
        simulation.run(algorithm, federation.params, federation.data, settings=settings)

    return rounds


def fedjax(federation: Federation) -> Contestant:
    """FedJAX's federated averaging, its default back end."""
    try:
        import fedjax
    except ImportError as error:
        raise ValueError(
            f"{error}: pip install git+https://github.com/google/fedjax, or leave it out of --peers"
        ) from None
    loss = federation.lab.loss

    def gradient(params: Any, batch: Mapping[str, Any], key: jax.Array) -> Any:
        filled = {**batch, "mask": jnp.ones(len(batch["y"]))}
        return jax.grad(lambda w: loss(w, filled, key))(params)

    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        gradient,
        fedjax.optimizers.sgd(RATE),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=10, num_epochs=1),
    )
    pool = {name: np.asarray(x) for name, x in federation.lab.pool.items()}
    sets = [
        fedjax.ClientDataset({name: x[part] for name, x in pool.items()})
        for part in federation.parts
    ]
    state = algorithm.init(federation.params)

    def rounds(count: int) -> None:
        nonlocal state
        for number in range(count):
            keys = jax.random.split(jax.random.PRNGKey(number), len(sets))
            there = [(b"%d" % k, x, keys[k]) for k, x in enumerate(sets)]
            state, _ = algorithm.apply(state, there)
        jax.block_until_ready(state.params)

    return rounds


def flower_seconds(rounds: int) -> list[float]:
    """Seconds of each round of Flower's simulation but the first two; dense layers."""
    try:
        import flwr.simulation
        import ray  # noqa: F401 - what the simulation runs on
    except ImportError as error:
        raise ValueError(
            f"{error}: pip install 'flwr[simulation]', or leave flower out of --peers"
        ) from None
    from experiments.benchmarks import federated_peers as here  # the name that workers know, too

    lines: list[Mapping[str, Any]] = []
    with tempfile.TemporaryDirectory() as home:
        # The workers are processes of their own and import this module.
        os.environ.update(flower.environment(home))
        root = str(pathlib.Path(__file__).resolve().parents[2])
        os.environ["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
        flwr.simulation.run_simulation(
            server_app=flower.server_app(functools.partial(_serve, rounds, lines)),
            client_app=flower.client_app(here.join),
            num_supernodes=10,
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
        )
    if len(lines) < rounds:
        raise ValueError(f"Flower's simulation made {len(lines)} of {rounds} rounds")
    return [line["seconds"] for line in lines[2:]]


@functools.cache
def _dense() -> Federation:
    return Federation("dense")


def _serve(rounds: int, lines: list[Mapping[str, Any]], _: Mapping[str, Any]) -> flower.Server:
    federation = _dense()

    class Kept:
        """A tracker that keeps lines."""

        def log(self, line: Mapping[str, Any]) -> None:
            lines.append(line)

    return flower.Server(
        params=federation.params,
        local=federation.local,
        settings=simulation.Settings(rounds=rounds),
        clients=10,
        trackers=[Kept()],
    )


def join(_: Mapping[str, Any], node: Mapping[str, Any]) -> flower.Site:
    """A client of Flower's simulation."""
    federation, number = _dense(), int(node["partition-id"])
    rows = federation.parts[number]
    return flower.Site(
        number=number,
        pool={name: np.asarray(x)[rows] for name, x in federation.lab.pool.items()},
        local=federation.local,
        params=federation.params,
    )


# --- Report --------------------------------------------------------------------------------------
def measure(settings: Settings, network: Networks) -> dict[str, float]:
    """Best rounds a second of everyone on a network."""
    federation = Federation(network)
    block = mapping.block_size(federation.params, batched=federation.batched)
    contestants = {
        "all clients at once": ours(federation, None),
        "one after the other": ours(federation, 1),
        f"as chosen ({block} at once)": ours(federation, block),
        "whole simulation": whole(federation),
    }
    if "fedjax" in settings.peers:
        contestants["FedJAX"] = fedjax(federation)
    for rounds in contestants.values():
        rounds(2)
    stretches = {
        name: functools.partial(rounds, settings.rounds) for name, rounds in contestants.items()
    }
    timed = peers.alternate(stretches, settings.repetitions)
    found = {name: settings.rounds / x["seconds_best"] for name, x in timed.items()}
    for name, speed in found.items():
        CONSOLE.print(f"{network:6} {name:26} {speed:8.1f} rounds/s", highlight=False)
    return found


def claims(found: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Claim, threshold, value and verdict."""
    dense, small = found["dense"], found["small"]
    rows: list[tuple[str, str, float, float]] = []
    if "FedJAX" in dense:
        best = max(dense["all clients at once"], dense["one after the other"])
        rows = [
            ("P1", "dense layers / FedJAX", best / dense["FedJAX"], 5.0),
            ("P2", "all at once / FedJAX", small["all clients at once"] / small["FedJAX"], 1.0),
            ("P2", "in turn / FedJAX", small["one after the other"] / small["FedJAX"], 1.5),
        ]
    if "Flower" in dense:
        rows.append(("P3", "simulation / Flower", dense["whole simulation"] / dense["Flower"], 20))
    return [
        {"claim": name, "about": what, "value": x, "threshold": least, "holds": x >= least}
        for name, what, x, least in rows
    ]


def run(settings: Settings) -> None:
    found = {network: measure(settings, network) for network in ("dense", "small")}
    if "flower" in settings.peers:
        found["dense"]["Flower"] = 1 / statistics.median(flower_seconds(settings.flower_rounds))
    verdicts = claims(found)
    for x in verdicts:
        word = "holds" if x["holds"] else "FAILS"
        CONSOLE.print(
            f"{x['claim']} {word} {x['about']} {x['value']:.2f}, at least {x['threshold']:g}",
            highlight=False,
        )
    report = {
        "benchmark": "federated_peers",
        **peers.environment(),
        "rounds_per_second": found,
        "claims": verdicts,
    }
    titles = {"dense": "dense layers", "small": "convolutions"}
    figure = peers.bars(
        "FedAvg on digits, ten clients of two classes",
        {titles[name]: x for name, x in found.items()},
        unit="rounds per second",
    )
    args = argparse.Namespace(out=settings.out, json=settings.json)
    peers.write("federated_peers", report, args, figure)


if __name__ == "__main__":
    sys.exit(console.main(Settings, run, __doc__, "federated_peers"))
