"""Texts and runs of `federated_llama` and of the claims about language models."""

from __future__ import annotations

import dataclasses
import pathlib
import sysconfig
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments import federated_lab, leaves
from experiments.console import CONSOLE, told
from l4jax import checkpoints, lora, presets
from l4jax.config import Execution, TextConfig
from l4jax.data import conversations, pipeline, sources, tokenizing
from l4jax.data import tokenizer as tokenizers
from l4jax.data.tokenizer import Tokenizer
from l4jax.federated import adapters, algorithms, clients, language, sharing, simulation
from l4jax.federated.local import Local
from l4jax.models.llama4 import Llama
from l4jax.training import objectives, tracking

Study = Literal["rounds", "divergence", "replay", "diloco", "lora"]
Server = Literal["fedavg", "diloco"]
PACKAGES = ("asyncio", "email", "multiprocessing", "xml")
"""Of the standard library: the clients where nobody brings data."""
VOCABULARY = 512
"""Of the tokenizer that is trained then, on other modules."""
OTHERS = 60
"""Such modules."""
HELD_OUT, SPARE = 0.12, 0.2
"""Shares of a domain: of its documents to measure on; of its other rows for a shared set."""
MEASURED = 16
"""Most held-out rows of a domain."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Leaves of the command line."""

    data: tuple[str, ...] = ()
    """Files, folders or patterns, one for each client; by default packages of the standard
    library."""
    init: str | None = None
    """The checkpoint to start from, in any format, with its tokenizer; by default a tiny twin of
    Scout that has read other modules of the standard library."""
    tokenizer: str | None = None
    """File or folder, if it is not beside the checkpoint."""
    out: pathlib.Path = pathlib.Path("runs/federated_llama")
    resume: bool = False
    """Keep the runs that `out` has, go on with the one that was cut, and make the others."""
    studies: tuple[Study, ...] = ("rounds", "divergence", "replay", "diloco")
    seed: int = 0
    rounds: int = 6
    steps: int = 20
    """Of each client in a round: H."""
    batch: int = 4
    """Rows of a client's step."""
    length: int = 128
    """Tokens of a row."""
    rows: int = 400
    """Most rows of a client."""
    warm_rounds: int = 4
    """Rounds in one place, on other modules, that the default model has behind it."""
    rate: float = 5e-3
    """Learning rate of the clients' AdamW, whose moments live on from round to round."""
    weight_decay: float = 0.01
    server: Server = "fedavg"
    """What the server does with the clients' mean: takes it, or DiLoCo's Nesterov steps."""
    outer_rate: float = 0.7
    outer_momentum: float = 0.9
    """Of DiLoCo's outer steps."""
    replay: float = 0.0
    """Share ρ of a set of all domains in every client's data, in the run whose model is saved."""
    rank: int = 0
    """Rank of adapters (LoRA); 0 trains the whole model."""
    alpha: float = 16.0
    """Adapters are scaled by alpha / rank."""
    adapt: tuple[str, ...] = ("*.attention.*",)
    """Which weights have adapters, by patterns on their names."""
    rule: adapters.Rule = "exact"
    """How adapters are averaged: cheap and biased, a frozen, or exact."""
    cohorts: leaves.Cohorts = leaves.Cohorts()
    compare: bool = True
    """Train in one place beside the clients by domain and the IID ones, to report in every round
    how far each part of the model diverges. A round then takes about as much again as if all
    clients took part, and a second model with its optimizer, in memory and in checkpoints."""

    def __post_init__(self) -> None:
        for name in ("rounds", "steps", "batch", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.length < 2 or self.rank < 0 or self.warm_rounds < 0:
            raise ValueError(
                f"length {self.length} must be at least 2, rank {self.rank} and warm_rounds "
                f"{self.warm_rounds} not negative"
            )
        if not 0 <= self.replay < 1:
            raise ValueError(f"replay {self.replay} must be at least 0 and below 1")
        if not 0 < self.rate < 1e3:
            raise ValueError(f"rate {self.rate} must be above 0 and below 1000")
        if self.data and not self.init:
            raise ValueError(
                "data of your own needs a model to start from: give --init, such as "
                "runs/pretrain/model of experiments.pretrain"
            )
        if len(self.data) == 1 or len(set(self.data)) < len(self.data):
            raise ValueError("data: give at least two paths, each once, as each is a client's")
        if not self.studies:
            raise ValueError("studies must be at least one")
        self._check_rule()

    def _check_rule(self) -> None:
        exact = bool(self.rank) and self.rule == "exact"
        if exact and self.server != "fedavg":
            raise ValueError("rule exact is for averages: use --server fedavg, or another --rule")
        if (exact or "lora" in self.studies) and not self.cohorts.plain:
            raise ValueError(
                "rule exact, which study lora has too, is for updates sent as they are: leave "
                "--keep, --bits and --clip out, or use another --rule"
            )


# --- Texts ---------------------------------------------------------------------------------------
class Texts(NamedTuple):
    """Rows of tokens, and whose they are.

    names: of the domains. pool: arrays of all rows, see `language`. domain: of each row, Int[n]; 0
    of others. own: rows of the clients. spare: of all domains, for a shared set. test: held-out
    rows of each domain. others: of no domain, to begin with.
    """

    names: tuple[str, ...]
    pool: dict[str, np.ndarray]
    domain: np.ndarray
    own: np.ndarray
    spare: np.ndarray
    test: list[np.ndarray]
    others: np.ndarray

    @property
    def by_domain(self) -> list[np.ndarray]:
        """A client for every domain."""
        return [self.own[self.domain[self.own] == k] for k in range(len(self.names))]


def texts(settings: Settings) -> tuple[Texts, Tokenizer]:
    """The texts of a run, and its tokenizer."""
    root, others = pathlib.Path(sysconfig.get_paths()["stdlib"]), list[str]()
    if settings.data:
        found = {path: sources.Source(path) for path in settings.data}
    else:
        found = {
            name: sources.Source(str(root / name / "**" / "*.py"), format="text")
            for name in PACKAGES
        }
        files = sorted(root.glob("[a-z]*.py"))
        order = np.random.default_rng(0).permutation(len(files))[:OTHERS]
        others = [files[i].read_text(encoding="utf-8", errors="replace") for i in order]
    path = settings.tokenizer or settings.init
    with told("Reading and tokenizing texts"):
        bpe = tokenizers.load(path) if path else tokenizers.train(others, vocab_size=VOCABULARY)
        encode, report = conversations.Documents(bpe), sources.Report()
        records = {name: (x.value for x in it.records(report)) for name, it in found.items()}
        documents = {name: _tokens(values, encode) for name, values in records.items()}
        rest = _tokens(({"text": text} for text in others), encode)
    return _divided(documents, rest, settings), bpe


def _tokens(values: Any, encode: Any) -> list[list[int]]:
    store = tokenizing.encoded(values, encode)
    return [np.asarray(store[i].tokens).tolist() for i in range(len(store))]


def _divided(
    documents: dict[str, list[list[int]]], rest: list[list[int]], settings: Settings
) -> Texts:
    """Documents as rows: some documents of each domain are held out, some rows spare."""
    pieces, domain, kinds = list[dict[str, np.ndarray]](), list[int](), list[str]()
    rng = np.random.default_rng(settings.seed)

    def add(chosen: Sequence[list[int]], number: int, most: int) -> int:
        rows = _rows(chosen, settings.length, most)
        pieces.append(rows)
        count = len(rows["tokens"])
        domain.extend([number] * count)
        return count

    for number, (name, own) in enumerate(documents.items()):
        if len(own) < 2:
            raise ValueError(f"{name}: has {len(own)} documents; at least 2 are needed, 1 held out")
        own = [own[i] for i in rng.permutation(len(own))]
        cut = max(1, round(HELD_OUT * len(own)))
        kinds += [f"test {number}"] * add(own[:cut], number, MEASURED)
        count = add(own[cut:], number, settings.rows)
        spare = round(SPARE * count)
        kinds += rng.permutation(["spare"] * spare + ["own"] * (count - spare)).tolist()
    if rest:
        kinds += ["others"] * add(rest, 0, 10**9)
    pool = {key: np.concatenate([x[key] for x in pieces]) for key in pieces[0]}
    place = {kind: np.flatnonzero(np.array(kinds) == kind) for kind in set(kinds)}
    nothing, short = np.zeros(0, int), tuple(pathlib.Path(name).stem for name in documents)
    return Texts(
        short if len(set(short)) == len(short) else tuple(documents),
        pool,
        np.array(domain),
        place["own"],
        place.get("spare", nothing),
        [place[f"test {number}"] for number in range(len(documents))],
        place.get("others", nothing),
    )


def _rows(documents: Sequence[list[int]], length: int, most: int) -> dict[str, np.ndarray]:
    """Documents one after the other in whole rows, at most so many."""
    count = min(sum(map(len, documents)) // length, most)
    if not count:
        raise ValueError(f"length {length}: some documents have fewer tokens together")
    batches = pipeline.packed(documents, length=length, batch_size=count, seed=None, repeat=False)
    return {name: np.asarray(x) for name, x in next(iter(batches)).items()}


# --- Runs ----------------------------------------------------------------------------------------
def twin(vocabulary: int, *, width: int = 64) -> TextConfig:
    """A twin of Scout with a chunked and a global layer, both routed, to learn within a minute."""
    tiny = presets.tiny(presets.llama4_scout())
    return dataclasses.replace(
        tiny, num_layers=2, embed_dim=width, vocab_size=vocabulary, pattern=tiny.pattern[-2:]
    )


class Network(NamedTuple):
    """A model as clients train it.

    of: parameters → model. rule: of its adapters, if it has some.
    """

    params: Any
    of: Callable[[Any], Llama]
    rule: adapters.Rule | None


class Run(NamedTuple):
    """What a run came to.

    curve: mean held-out loss by round. bytes: sent and got by all clients in all rounds. apart:
    weight divergence by group and round, of everything as "all"; empty where it was not compared.
    """

    params: Any
    curve: dict[int, float]
    bytes: int
    apart: dict[str, dict[int, float]]


class Lab:
    """Makes runs of one model on the same texts; what is alike is compiled once."""

    def __init__(self, settings: Settings, found: Texts, model: Llama) -> None:
        self.settings, self.texts, self.model = settings, found, model
        self.clients = len(found.names)
        settings.cohorts.check(self.clients)
        self.pool = {name: jnp.asarray(x) for name, x in found.pool.items()}
        # One width for all that is trained in one place, one for all that is federated.
        self._widths = (
            max(len(found.own), len(found.others)),
            max(map(len, found.by_domain)) + len(found.spare),
        )
        self._runs: dict[str, Run] = {}
        self._algorithms: dict[Any, tuple[algorithms.Algorithm, Any]] = {}
        self._pairs: dict[algorithms.Algorithm, algorithms.Algorithm] = {}
        self._learn = objectives.next_token(balance=0.01)

    def network(self, rule: adapters.Rule | None = None, rank: int = 0) -> Network:
        """The model itself, or with adapters."""
        if rule is None:
            return Network(*language.functional(self.model), None)
        s = self.settings
        key = jax.random.key(s.seed)
        adapted = lora.apply(self.model, s.adapt, rank=rank, alpha=s.alpha, key=key)
        return Network(*language.functional(adapted), rule)

    def chosen(self) -> Network:
        """What the settings say is trained."""
        return self.network(self.settings.rule if self.settings.rank else None, self.settings.rank)

    def run(  # noqa: PLR0913 - what is trained, on what, how, how long
        self,
        name: str,
        parts: Sequence[np.ndarray],
        *,
        network: Network | None = None,
        server: Server = "fedavg",
        steps: int | None = None,
        rounds: int | None = None,
        compare: bool = False,
    ) -> Run:
        """A run by its name; one that is in `out` already is read. Of one part it is central."""
        if name in self._runs:
            return self._runs[name]
        s, network = self.settings, network or self.chosen()
        alone, steps = len(parts) == 1, steps or s.steps
        cohorts = self._cohorts(alone)
        algorithm, evaluate = self._algorithm(network, server, steps, alone)
        if compare:
            algorithm = self._compared(algorithm, network, steps)
        folder = s.out / "runs" / name
        params = federated_lab.carry_out(
            folder,
            algorithm,
            network.params,
            clients.gather(self.pool, parts, width=self._widths[not alone]),
            settings=simulation.Settings(
                rounds=rounds or s.rounds,
                seed=s.seed,
                participation=cohorts.participation,
                evaluate_every=1,
                checkpoint_every=1,
            ),
            evaluate=evaluate,
            resumable=True,
            mesh=cohorts.make_mesh(),
        )
        lines = tracking.read(folder / "metrics.jsonl")
        curve = {line["step"] + 1: line["eval_loss"] for line in lines}
        CONSOLE.print(f"{name:24} {list(curve.values())[-1]:.3f}", highlight=False)
        sent = sum(line["bytes_down"] + line["bytes_up"] for line in lines)
        self._runs[name] = Run(params, curve, sent, federated_lab.apart(lines, language.GROUPS))
        return self._runs[name]

    def warm(self, rounds: int) -> None:
        """Trains the model in one place on texts that are nobody's."""
        if rounds and len(self.texts.others):
            run = self.run("warm-up", [self.texts.others], network=self.network(), rounds=rounds)
            self.model = self.network().of(run.params)

    def iid(self) -> list[np.ndarray]:
        """As many clients, each with rows of all domains."""
        rows = np.random.default_rng(self.settings.seed).permutation(self.texts.own)
        return np.array_split(rows, self.clients)

    def mixed(self, rho: float) -> tuple[list[np.ndarray], sharing.Report | None]:
        """A client for every domain, with a set of all domains as a share ρ of its rows, about."""
        parts, found = self.texts.by_domain, self.texts
        if not rho:
            return parts, None
        size = round(rho / (1 - rho) * np.mean([len(part) for part in parts]))
        seed = self.settings.seed
        shared = sharing.draw(found.domain, found.spare, size=size, seed=seed)
        return sharing.share(parts, shared, labels=found.domain, alpha=1.0, seed=seed)

    def measure(self, network: Network) -> Callable[[Any], dict[str, float]]:
        """A function of parameters: held-out loss of each domain, and the mean of these."""
        objective = objectives.next_token()

        @jax.jit
        def loss(params: Any, batch: Any) -> jax.Array:
            return objective(network.of(params), language.with_mask(batch))[1]["loss"]

        def evaluate(params: Any) -> dict[str, float]:
            losses = [float(loss(params, batch)) for batch in self._held_out()]
            by_name = zip(self.texts.names, losses, strict=True)
            return {"eval_loss": float(np.mean(losses))} | {
                f"eval_loss_{name}": x for name, x in by_name
            }

        return evaluate

    def loads(self) -> np.ndarray | None:
        """Assignments to each expert on held-out text of each domain, Int[k l e]."""
        measure = jax.jit(
            lambda batch: self._learn(self.model, language.with_mask(batch))[1].get("expert_load")
        )
        found = [measure(batch) for batch in self._held_out()]
        return None if found[0] is None else np.stack([np.asarray(x) for x in found])

    def trained_bytes(self, network: Network) -> int:
        """Bytes of what is trained, and sent."""
        algorithm, _ = self._algorithm(network, "fedavg", self.settings.steps, alone=False)
        return algorithm.traffic(network.params).up

    def _held_out(self) -> Any:
        """A batch of each domain, all of one shape."""
        most = max(map(len, self.texts.test))
        for rows in self.texts.test:
            filled = np.pad(rows, (0, most - len(rows)), mode="edge")
            mask = (np.arange(most) < len(rows)).astype(np.float32)
            yield {name: x[filled] for name, x in self.pool.items()} | {"mask": mask}

    def _algorithm(
        self, network: Network, server: Server, steps: int, alone: bool
    ) -> tuple[algorithms.Algorithm, Any]:
        key = (network.rule, server, steps, alone)
        if key in self._algorithms:
            return self._algorithms[key]
        s = self.settings
        local = Local(
            loss=language.loss(network.of, self._learn),
            rate=s.rate,
            optimizer=lambda rate: optax.chain(
                optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=s.weight_decay)
            ),
            # As many rows a step in one place as all clients have together.
            batch=s.batch * (self.clients if alone else 1),
            draws=steps,
            keep=True,
        )
        made = self._server(local, network.rule, server, alone)
        self._algorithms[key] = made, self.measure(network)
        return self._algorithms[key]

    def _compared(
        self, algorithm: algorithms.Algorithm, network: Network, steps: int
    ) -> algorithms.Algorithm:
        """Beside training in one place; what is compared is the model with its adapters merged."""

        if algorithm not in self._pairs:
            central, _ = self._algorithm(network, "fedavg", steps, alone=True)
            group = language.groups(self.model).__getitem__
            self._pairs[algorithm] = algorithms.compared(
                algorithm, central, self.texts.own, group=group, view=adapters.merged
            )
        return self._pairs[algorithm]

    def _cohorts(self, alone: bool) -> leaves.Cohorts:
        """What is trained in one place has one client, that is always there and sends all."""
        return leaves.Cohorts() if alone else self.settings.cohorts

    def _server(
        self, local: Local, rule: adapters.Rule | None, server: Server, alone: bool
    ) -> algorithms.Algorithm:
        s, outer = self.settings, None
        options = self._cohorts(alone).options(block=1, weights="clients")
        if server == "diloco" and not alone:
            outer = optax.sgd(s.outer_rate, momentum=s.outer_momentum, nesterov=True)
        if rule is None:
            return algorithms.fedavg(local, server=outer, options=options)
        # With one client there is nothing to be wrong about.
        rule = "factors" if alone and rule == "exact" else rule
        return adapters.fedavg(local, rule, server=outer, options=options, clients=self.clients)


def start(settings: Settings, tokenizer: Tokenizer) -> Llama:
    """The model that a run begins with, before it is warmed up."""
    if settings.init:
        execution = Execution()
        return checkpoints.load(settings.init, vision=False, dtype="float32", execution=execution)
    return Llama(twin(tokenizer.vocab_size), execution=Execution(), rngs=nnx.Rngs(settings.seed))
