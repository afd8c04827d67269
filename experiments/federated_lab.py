"""Data sets and runs of `federated_vision` and of the benchmark of federated learning.

What a run of rounds leaves in a folder (`carry_out`), and how a recipe of many runs begins
(`begin`), are `federated_llama`'s too.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from flax import nnx

from experiments import leaves
from experiments.console import CONSOLE
from l4jax import paths
from l4jax.federated import (
    algorithms,
    clients,
    files,
    generated,
    mapping,
    metrics,
    networks,
    simulation,
)
from l4jax.federated.local import Local
from l4jax.training import checkpointing, tracking

Name = Literal["digits", "textures", "keywords", "mnist", "cifar10", "speech_commands"]
Study = Literal["partitions", "divergence", "emd", "sharing"]
Algorithm = Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "fedprox", "scaffold", "diloco"]
MOST_SHARED = 0.2
"""Largest β that federations have room for."""


class Values(NamedTuple):
    """What a set is trained with unless the command line says otherwise."""

    batch: int
    rate: float
    decay: float


VALUES: dict[str, Values] = {
    "digits": Values(10, 0.1, 0.995),
    "textures": Values(10, 0.05, 0.992),
    "keywords": Values(10, 0.05, 0.992),
    "mnist": Values(10, 0.01, 0.995),
    "cifar10": Values(10, 0.1, 0.992),
    "speech_commands": Values(10, 0.05, 0.992),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Leaves of the command line."""

    set: Name = "digits"
    data: str | None = None
    """Folder or .npz file of a set that is not made here."""
    out: pathlib.Path = pathlib.Path("runs/federated_vision")
    resume: bool = False
    """Keep the runs that `out` has, go on with the one that was cut, and make the others."""
    studies: tuple[Study, ...] = ("partitions", "divergence", "emd", "sharing")
    seeds: tuple[int, ...] = (0,)
    """Of partitions, initial weights and clients' batches."""
    draws: int = 3
    """Partitions of each EMD."""
    clients: int = 10
    rounds: int = 30
    epochs: int = 1
    """Passes of a client over its data in a round."""
    batch: int | None = None
    rate: float | None = None
    decay: float | None = None
    """By which the learning rate is multiplied after each round; these three by the set's own."""
    network: Literal["small", "dense", "paper"] = "small"
    """Two small convolutions; dense layers alone; or a candidate for the paper's."""
    algorithm: Algorithm = "fedavg"
    """Of clients; what is trained in one place is trained by SGD."""
    server_rate: float | None = None
    """Learning rate of the server's steps; by default the algorithm's own."""
    mu: float | None = None
    """μ of FedProx, which needs one."""
    cohorts: leaves.Cohorts = leaves.Cohorts()
    compare: bool = True
    """Train in one place beside each partition, to report in every round how far weights diverge. A
    round then takes about as much again as if all clients took part."""
    evaluate_every: int = 5
    checkpoint_every: int | None = None
    """Rounds between checkpoints of a run; by default a run that was cut begins anew."""

    def __post_init__(self) -> None:
        for name in ("draws", "clients", "rounds", "epochs", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if not self.seeds or not self.studies:
            raise ValueError("seeds and studies must each be at least one")
        if min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} must not be negative, and all different")
        batch, rate, decay = self.values
        if batch < 1 or not 0 < rate < 1e3 or not 0 < decay <= 1:
            raise ValueError(
                f"batch {batch} must be at least 1, rate {rate:g} above 0 and below 1000, decay "
                f"{decay:g} above 0 and at most 1"
            )
        if (self.data is None) == (self.set in ("mnist", "cifar10", "speech_commands")):
            raise ValueError(f"set {self.set}: --data is for mnist, cifar10 and speech_commands")
        if self.network == "paper" and self.set not in networks.PAPER:
            raise ValueError(f"network paper: there is none for {self.set}")
        self._check_rounds()

    def _check_rounds(self) -> None:
        if self.server_rate is not None and not 0 < self.server_rate < 1e3:
            raise ValueError(f"server_rate {self.server_rate:g} must be above 0 and below 1000")
        if self.server_rate is not None and self.algorithm in ("fedavg", "fedprox"):
            raise ValueError(f"server_rate: {self.algorithm} takes the clients' mean as it is")
        if (self.mu is None) == (self.algorithm == "fedprox"):
            raise ValueError(f"mu {self.mu}: it belongs to --algorithm fedprox, which needs it")
        if any(n > 1 for axis, n in self.cohorts.sizes.items() if axis != mapping.AXIS):
            raise ValueError(f"mesh {self.cohorts.mesh}: these networks lie on one device each")
        self.cohorts.check(self.clients)

    @property
    def values(self) -> Values:
        """Batch, learning rate and decay, as they are used."""
        own = VALUES[self.set]
        given = (self.batch, self.rate, self.decay)
        return Values(*(a if b is None else b for a, b in zip(own, given, strict=True)))


class Examples(NamedTuple):
    """A data set, and rows of it.

    x: Float32[n h w c]. y: Int32[n]. train: to be split among clients. own: of these, for clients
    that share the others, `spare`. test: to measure on.
    """

    x: np.ndarray
    y: np.ndarray
    train: np.ndarray
    own: np.ndarray
    spare: np.ndarray
    test: np.ndarray


def examples(settings: Settings) -> Examples:
    """The data set of a run."""
    if settings.set == "digits":
        return digits()
    if settings.set in ("textures", "keywords"):
        make = generated.textures if settings.set == "textures" else generated.keywords
        train, test = make(250, seed=0), make(100, seed=1)
        place = np.tile(np.arange(250), generated.CLASSES)
        own, spare = np.flatnonzero(place < 200), np.flatnonzero(place >= 200)
        arrays = [np.concatenate([train[name], test[name]]) for name in ("x", "y")]
        return Examples(*arrays, own, own, spare, len(place) + np.arange(len(test["y"])))
    assert settings.data is not None
    found = files.read(settings.data, settings.set)
    count = len(found.y_train)
    mixed = np.random.default_rng(0).permutation(count)
    own, spare = _by_class(found.y_train, mixed, 0.8)
    return Examples(
        np.concatenate([found.x_train, found.x_test]),
        np.concatenate([found.y_train, found.y_test]),
        np.arange(count),
        own,
        spare,
        count + np.arange(len(found.y_test)),
    )


def digits() -> Examples:
    """scikit-learn's handwritten digits, 140 of each for training, 40 of those to be shared."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("digits need scikit-learn: pip install 'l4jax[federated]'") from None
    x, y = load_digits(return_X_y=True)
    rows = np.random.default_rng(0).permutation(len(y))
    by_class = [rows[y[rows] == label] for label in range(10)]
    train, own, spare, test = (
        np.concatenate([group[a:b] for group in by_class])
        for a, b in ((0, 140), (0, 100), (100, 140), (140, None))
    )
    x = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    return Examples(x, y.astype(np.int32), train, own, spare, test)


def _by_class(y: np.ndarray, rows: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows in two parts, each with the same share of every class."""
    groups = [rows[y[rows] == label] for label in np.unique(y)]
    cuts = [round(share * len(group)) for group in groups]
    first = [group[:cut] for group, cut in zip(groups, cuts, strict=True)]
    rest = [group[cut:] for group, cut in zip(groups, cuts, strict=True)]
    return np.concatenate(first), np.concatenate(rest)


# --- Runs ----------------------------------------------------------------------------------------
class Lab:
    """Makes runs on one data set and network; what is alike is compiled once."""

    def __init__(self, settings: Settings, found: Examples | None = None) -> None:
        self.settings, self.examples = settings, found or examples(settings)
        y = self.examples.y
        self.pool = {"x": jnp.asarray(self.examples.x), "y": jnp.asarray(y)}
        shape = self.examples.x.shape[1:]
        classes = len(np.unique(y))
        sizes = {"convolutions": ()} if settings.network == "dense" else {}
        self.network = networks.Network(shape=shape, classes=classes, **sizes)
        if settings.network == "paper":
            self.network = dataclasses.replace(networks.PAPER[settings.set], shape=shape)
        _, self.apply = networks.functional(self._module(0))
        self.loss = networks.classification(self.apply)
        test = self.examples.test
        self.accuracy = networks.accuracy(self.apply, self.examples.x[test], y[test])
        # Room for the largest shared set, so that every federation has the same shape.
        most = round(len(self.examples.own) * MOST_SHARED)
        self.width = -(-len(self.examples.train) // settings.clients) + most
        self._algorithms: dict[tuple, algorithms.Algorithm] = {}
        values = settings.values
        self._rate = lambda number: values.rate * values.decay**number
        self._clients = self._chosen()
        central = self.large_batches()
        self.compared = algorithms.compared(self._clients, central, self.examples.train)

    def params(self, seed: int) -> Any:
        """Initial weights."""
        return networks.functional(self._module(seed))[0]

    def federation(self, parts: Sequence[np.ndarray]) -> clients.Data:
        """Clients with these rows."""
        width = max(self.width, *map(len, parts)) if len(parts) > 1 else None
        return clients.gather(self.pool, parts, width=width)

    def algorithm(self) -> algorithms.Algorithm:
        """What the settings say."""
        return self._clients

    def large_batches(self) -> algorithms.Algorithm:
        """SGD in one place, with as many examples in a step as all clients have together."""
        s = self.settings
        return self._fedavg(rate=self._rate, batch=s.clients * s.values.batch, epochs=s.epochs)

    def curve(  # noqa: PLR0913 - what is trained, on what, from where, how long
        self,
        name: str,
        parts: Sequence[np.ndarray],
        *,
        seed: int,
        algorithm: algorithms.Algorithm | None = None,
        start: Any = None,
        rounds: int | None = None,
    ) -> dict[int, float]:
        """Accuracy by round of a run; one that is in `out` already is read."""
        settings = self.settings
        rounds = rounds or settings.rounds
        folder = self._folder(name)
        file = folder / "metrics.jsonl"
        if not _done(file, rounds):
            self._train(folder, parts, seed, algorithm or self.algorithm(), start, rounds)
        lines = tracking.read(file)
        found = {line["step"] + 1: line["accuracy"] for line in lines if "accuracy" in line}
        CONSOLE.print(f"{name:32} {list(found.values())[-1]:.3f}", highlight=False)
        return found

    def apart(self, name: str) -> dict[str, dict[int, float]]:
        """`apart` of a run of `compared`, by layer."""
        return apart(tracking.read(self._folder(name) / "metrics.jsonl"), self.params(0))

    def _folder(self, name: str) -> pathlib.Path:
        return self.settings.out / "runs" / name

    def _train(  # noqa: PLR0913 - as above
        self,
        folder: pathlib.Path,
        parts: Sequence[np.ndarray],
        seed: int,
        algorithm: algorithms.Algorithm,
        start: Any,
        rounds: int,
    ) -> None:
        settings = self.settings
        cohorts = settings.cohorts if len(parts) > 1 else leaves.Cohorts()
        carry_out(
            folder,
            algorithm,
            self.params(seed) if start is None else start,
            self.federation(parts),
            settings=simulation.Settings(
                rounds=rounds,
                seed=seed,
                participation=cohorts.participation,
                evaluate_every=min(settings.evaluate_every, rounds),
                checkpoint_every=settings.checkpoint_every or rounds,
            ),
            evaluate=self.accuracy,
            resumable=settings.checkpoint_every is not None,
            mesh=cohorts.make_mesh(),
        )

    def centrally(self, rows: np.ndarray, *, seed: int, epochs: int) -> tuple[Any, float]:
        """Weights and accuracy after training on some rows in one place, at a constant rate."""
        values = self.settings.values
        result = simulation.run(
            self._fedavg(rate=values.rate, batch=values.batch, epochs=1),
            self.params(seed),
            self.federation([rows]),
            settings=simulation.Settings(rounds=epochs, seed=seed, checkpoint_every=epochs),
        )
        return result.state.params, self.accuracy(result.state.params)["accuracy"]

    def divergence(self, parts: Sequence[np.ndarray], *, seed: int) -> metrics.Divergence:
        """After as many full-batch steps as a round has, from the same weights; no noise in it."""
        values, found = self.settings.values, []
        steps = -(-sum(map(len, parts)) // (len(parts) * values.batch))
        data = clients.gather(self.pool, parts)
        # Rounds of one full-batch step are central training, and need no client with all examples.
        for epochs, rounds in ((steps, 1), (1, steps)):
            algorithm = self._fedavg(rate=values.rate, batch=None, epochs=epochs)
            settings = simulation.Settings(rounds=rounds, checkpoint_every=rounds)
            run = simulation.run(algorithm, self.params(seed), data, settings=settings)
            found.append(jax.device_get(run.state.params))
        return metrics.weight_divergence(*found)

    def _chosen(self) -> algorithms.Algorithm:
        s = self.settings
        local = Local(loss=self.loss, rate=self._rate, batch=s.values.batch, epochs=s.epochs)
        options = s.cohorts.options(block=self._block())
        given = {"rate": s.server_rate, "mu": s.mu}
        given = {name: x for name, x in given.items() if x is not None}
        return getattr(algorithms, s.algorithm)(local, options=options, **given)

    def _fedavg(self, **values: Any) -> algorithms.Algorithm:
        """One for each set of values: what is alike is compiled once."""
        key = tuple((name, None if callable(x) else x) for name, x in values.items())
        if key not in self._algorithms:
            self._algorithms[key] = algorithms.fedavg(
                Local(loss=self.loss, **values), options=algorithms.Options(block=self._block())
            )
        return self._algorithms[key]

    def _block(self) -> int | None:
        return mapping.block_size(self.params(0), batched=not self.network.convolutions)

    def _module(self, seed: int) -> networks.Classifier:
        return networks.Classifier(self.network, rngs=nnx.Rngs(seed))


# --- Folders --------------------------------------------------------------------------------------
def begin(settings: Any, *, free: frozenset[str]) -> None:
    """Makes the folder of a recipe; it must be new, or of the same settings.

    Args:
        settings: leaves, among them `out` and `resume`.
        free: names of leaves that may differ from those before.

    Raises:
        ValueError: the folder holds a run that is not to be resumed, or another one.
    """
    file = settings.out / "config.json"
    now = json.loads(json.dumps(dataclasses.asdict(settings), default=str))
    if file.exists():
        if not settings.resume:
            raise ValueError(f"{settings.out}: holds a run; add --resume, or choose another --out")
        changed = list(paths.differences(json.loads(file.read_text()), now, free=free))
        if changed:
            raise ValueError(f"{settings.out}: holds another run: {'; '.join(changed)}")
    settings.out.mkdir(parents=True, exist_ok=True)
    checkpointing.write(file, json.dumps(now, indent=1) + "\n")


def carry_out(  # noqa: PLR0913 - what is trained, on what, from where, how, and what it leaves
    folder: pathlib.Path,
    algorithm: algorithms.Algorithm,
    params: Any,
    data: clients.Data,
    *,
    settings: simulation.Settings,
    evaluate: Any,
    resumable: bool,
    mesh: Any = None,
) -> Any:
    """Makes the rounds of a run that are missing; the parameters after the last.

    Args:
        folder: gets `metrics.jsonl`, and `checkpoints/` of a run that is resumable.
        algorithm: see `simulation.run`, as for the other arguments.
        params: to begin with.
        data: of the clients.
        settings: how it goes.
        evaluate: what is measured.
        resumable: whether to go on with the last checkpoint, and to make some.
        mesh: the algorithm's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved = checkpointing.Checkpoints(folder / "checkpoints", keep=1) if resumable else None
    begun = (saved.latest() if saved else None) or 0
    lines = tracking.Lines(folder / "metrics.jsonl", below=begun)
    trackers: list[Any] = [_Written(lines)]
    if CONSOLE.is_terminal:
        trackers.append(tracking.Bar(CONSOLE, settings.rounds, begun))
    try:
        return simulation.run(
            algorithm,
            params,
            data,
            settings=settings,
            evaluate=evaluate,
            checkpoints=saved,
            trackers=trackers,
            mesh=mesh,
        ).state.params
    finally:
        for tracker in trackers:
            tracker.close()
        if saved:
            saved.close()


def apart(lines: Sequence[Mapping[str, Any]], groups: Iterable[str]) -> dict[str, dict[int, float]]:
    """Weight divergence by group and round, of everything as "all"; {} if it was not compared."""
    names = {"divergence": "all"} | {f"divergence_{x}": x for x in groups}
    found = {
        group: {line["step"] + 1: line[name] for line in lines if name in line}
        for name, group in names.items()
    }
    return {group: values for group, values in found.items() if values}


def save(folder: pathlib.Path, figure: matplotlib.figure.Figure, name: str) -> None:
    """Writes a figure."""
    with checkpointing.appearing(folder / f"{name}.png") as file:
        figure.savefig(file, dpi=120, format="png")


def record(folder: pathlib.Path, report: Mapping[str, Any]) -> None:
    """Writes these studies into `report.json`, beside others that it has of the same run."""
    file = folder / "report.json"
    earlier = json.loads(file.read_text()) if file.exists() else {}
    checkpointing.write(file, json.dumps({**earlier, **_named(report)}, indent=1) + "\n")


def _named(report: Any) -> Any:
    """With texts for keys, as JSON has them."""
    if isinstance(report, Mapping):
        return {str(name): _named(x) for name, x in report.items()}
    return [_named(x) for x in report] if isinstance(report, list) else report


class _Written:
    """Lines, as a tracker."""

    def __init__(self, lines: tracking.Lines) -> None:
        self._lines = lines
        self.close = lines.close

    def log(self, line: Mapping[str, Any]) -> None:
        """Writes a line."""
        self._lines.write(line)


def _done(file: pathlib.Path, rounds: int) -> bool:
    lines = tracking.read(file)
    return bool(lines) and lines[-1]["step"] + 1 == rounds
