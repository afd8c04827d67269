"""Clients on other machines, by Flower (`pip install 'l4jax[federated]'`): the same local training.

Two makers give Flower its apps. What they make is described where it runs, by functions of Flower's
run and node configuration, as every process begins by loading its app:

    # app.py of a Flower app
    server = server_app(lambda run: Server(params=…, settings=…, clients=3))
    client = client_app(lambda run, node: Site(number=node["partition-id"], pool=…, …))

A client gets the server's parameters, trains by `Local`, and sends its own back with the number of
its examples ("num-examples"), as Flower's strategies and mods expect; transport, encryption and
identity are Flower's. With all clients in each round, parameters become those that
`simulation.run` reaches with the same seed, clients and optimizers, but for rounding.

Arrays travel under their dotted names, floats as float32 at least. Who sends anything else, or
uses another's number, is refused; who sends numbers that are not finite is excluded; who does not
answer in time is missing: all are counted, and the round goes on. Where nobody is left, parameters
and optimizer stay as they are.

Flower reports its use to its makers unless FLWR_TELEMETRY_ENABLED is 0, which importing this
module's apps makes the default. Flower's own programs must be started so: see `environment`.
`experiments.federated_flower` is an example, TLS included.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l4jax import paths
from l4jax.federated import privacy as private
from l4jax.federated import simulation
from l4jax.federated.algorithms import SERVER, State
from l4jax.federated.local import Client, Local, Trained, joined

LOG = logging.getLogger("flwr")
"""Flower's own, so that lines come out where its do."""
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
_ARRAYS, _CONFIG, _METRICS, _KEPT = "arrays", "config", "metrics", "optimizer"
"""Names of records in messages, the first three by Flower's convention."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """A client, where its data are."""

    number: int
    """Among all clients; what it draws at random depends on it."""
    pool: Mapping[str, Any]
    """Its own examples: arrays by name, an example in each row."""
    local: Local
    params: Any
    """A tree as the server's. Values are used of what `local` does not train, and nothing is sent
    of that; of the others, shapes and types are enough."""

    def __post_init__(self) -> None:
        lengths = {name: len(x) for name, x in self.pool.items()}
        if self.number < 0:
            raise ValueError(f"number {self.number} must not be negative")
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"arrays must have a row for each example; their lengths: {lengths}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Server:
    """What the server does."""

    params: Any
    """To begin with; a checkpoint's replace them."""
    local: Local
    """As at the clients; it says which parameters are trained, and sent."""
    settings: simulation.Settings
    """As of a simulation. `participation.per_round` draws from those that are there; dropouts and
    stragglers are not made up here."""
    clients: int
    """That must be there before the first round that is made; later ones take who is there."""
    optimizer: optax.GradientTransformation = dataclasses.field(
        default_factory=lambda: optax.sgd(1.0)
    )
    """Its gradient is the negative mean of how far clients moved; `optax.sgd(1)` is FedAvg."""
    weights: Literal["examples", "clients"] = "examples"
    """Whether a client counts by its examples, or all alike."""
    privacy: private.Privacy | None = None
    """The server clips and adds noise, and counts all clients alike; it sees single updates."""
    timeout: float = 3600.0
    """Seconds that a round waits for clients to come, and then for their answers."""
    evaluate: Callable[[Any], Mapping[str, float]] | None = None
    """A function of the server's parameters."""
    checkpoints: simulation.Checkpoints | None = None
    """To go on from the last one there, and for new ones. Clients' optimizers, where they live on
    (`Local.keep`), are Flower's to keep, and begin anew."""
    trackers: Sequence[simulation.Tracker] = ()
    """Take a line for each round: see `run`."""

    def __post_init__(self) -> None:
        rule = self.settings.participation
        if self.clients < (rule.per_round or 1) or not self.timeout > 0:
            raise ValueError(
                f"clients {self.clients} must be at least per_round, {rule.per_round or 1}, and "
                f"timeout {self.timeout:g} above 0"
            )
        if rule.dropout or rule.stragglers:
            raise ValueError("real clients drop out and straggle by themselves: set neither")


def environment(home: str | pathlib.Path) -> dict[str, str]:
    """Variables to start Flower's programs with: no telemetry, no look for updates, files in home.

    What the user has set of the first two stays.
    """
    return {**_QUIET, **os.environ, "FLWR_HOME": str(pathlib.Path(home).absolute())}


# --- Client --------------------------------------------------------------------------------------
def client_app(join: Callable[[Mapping[str, Any], Mapping[str, Any]], Site]) -> Any:
    """A Flower ClientApp that trains.

    Args:
        join: gives the site, from run and node configuration.

    Raises:
        ValueError: flwr is not installed.
    """
    app_module = _flwr()
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message: Any, context: Any) -> Any:
        content = _reply(join, message, context)
        return app_module.Message(content, reply_to=message)

    return app


# Flower's simulation pickles the app for every message. What has a name here, it takes from here,
# with what is compiled and read already.
def _reply(join: Callable[..., Site], message: Any, context: Any) -> Any:
    """What a client sends back."""
    site = _site(join, *(tuple(x.items()) for x in (context.run_config, context.node_config)))
    config = message.content[_CONFIG]
    moving, fixed = site.local.parts(site.params)
    like = jax.eval_shape(lambda x: x, moving)
    start = joined(_tree(message.content[_ARRAYS], like), fixed)
    size = len(next(iter(site.pool.values())))
    client = Client(
        id=jnp.asarray(site.number, jnp.int32),
        rows=jnp.arange(size),
        size=jnp.asarray(size, jnp.int32),
        steps=site.local.steps(jnp.asarray(size, jnp.int32)),
        alive=jnp.asarray(True),
        state=_kept(site.local, context, like),
    )
    pool = {name: jnp.asarray(x) for name, x in site.pool.items()}
    key, number = jax.random.key(config["seed"]), jnp.asarray(config["number"], jnp.int32)
    trained = jax.device_get(_train(site.local, start, client, pool, key, number))
    if site.local.keep and _finite((trained.params, trained.optimizer)):
        context.state[_KEPT] = _record(trained.optimizer)
    about = {"num-examples": size, "number": site.number, "loss": float(trained.loss)}
    flwr = _flwr()
    return flwr.RecordDict({_ARRAYS: _record(trained.params), _METRICS: flwr.MetricRecord(about)})


@functools.lru_cache(maxsize=16)
def _site(join: Callable[..., Site], run: tuple, node: tuple) -> Site:
    return join(dict(run), dict(node))


@functools.partial(jax.jit, static_argnums=0)
def _train(
    local: Local, start: Any, client: Client, pool: Any, key: jax.Array, number: jax.Array
) -> Trained:
    """A client's round; keys and learning rate are those of `algorithms`."""
    key = jax.random.fold_in(jax.random.fold_in(key, number), client.id)
    return local.train(
        start,
        client,
        pool,
        key=jax.random.split(key)[0],
        rate=local.rate_at(number),
        bound=client.steps,
        optimizer=client.state,
    )


def _kept(local: Local, context: Any, like: Any) -> Any:
    """The optimizer's state that a client has from its last round; None for a new one."""
    if not local.keep or _KEPT not in context.state:
        return None
    shapes = jax.eval_shape(lambda w: local.optimizer(local.rate_at(0)).init(w), like)
    return _tree(context.state[_KEPT], shapes)


# --- Server --------------------------------------------------------------------------------------
def server_app(serve: Callable[[Mapping[str, Any]], Server]) -> Any:
    """A Flower ServerApp that makes the rounds.

    Args:
        serve: gives the server, from the run configuration.

    Raises:
        ValueError: flwr is not installed.
    """
    _flwr()
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        run(grid, serve(context.run_config))

    return app


def run(grid: Any, server: Server) -> simulation.Result:
    """Makes the rounds that are to be made.

    A line for every round has its number as "step", from 0; "loss", mean over the clients' steps;
    "clients", whose parameters were averaged; "excluded", whose were not finite; "refused", whose
    did not fit; "missing", who did not answer, or failed; "bytes_down" and "bytes_up" of arrays;
    where it was measured, what `evaluate` gives; and "seconds".

    Args:
        grid: Flower's, to reach clients.
        server: what to do.

    Raises:
        ValueError: the checkpoint is of another seed, weighting or number of clients in a round,
            or of other trained parameters.
        NoClients: a round has nobody left. What was reached is saved first.
    """
    settings, checkpoints = server.settings, server.checkpoints
    # A checkpoint takes the place of these.
    params = jax.tree.map(jnp.copy, server.params)
    state = State(params, server.optimizer.init(_wide(server.local.parts(params)[0])), (), ())
    about = {
        "seed": settings.seed,
        "weights": server.weights,
        "per_round": settings.participation.per_round,
        "trained": list(paths.names(server.local.parts(params)[0])),
        **({"privacy": dataclasses.asdict(server.privacy)} if server.privacy else {}),
    }
    start, state = _resumed(checkpoints, about, state)
    if start and server.local.keep:
        LOG.warning("round %d: clients' optimizers begin anew, as in each of Flower's runs", start)
    step = jax.jit(functools.partial(_step, server))
    lines: list[dict[str, Any]] = []

    def save(number: int, *, wait: bool) -> None:
        if checkpoints is not None:
            checkpoints.save(number, state, {"config": about, "metrics": lines[-1:]})
            failure = checkpoints.settle() if wait else None
            if failure:
                raise OSError(f"the last checkpoint could not be written: {failure}")

    for number in range(start, settings.rounds):
        begun = time.perf_counter()
        try:
            answers, line = _ask(grid, server, state, number, first=number == start)
        except simulation.NoClients:
            save(number, wait=True)
            raise
        shares = _shares(answers, server)
        state = step(state, _mean(server, state, answers, shares, line))
        line["loss"] = float(sum(s * a.loss for s, a in zip(shares, answers, strict=True)))
        last = number + 1 == settings.rounds
        if server.evaluate is not None and (last or (number + 1) % settings.evaluate_every == 0):
            line |= server.evaluate(state.params)
        line["seconds"] = time.perf_counter() - begun
        lines.append(line)
        for tracker in server.trackers:
            tracker.log(line)
        if last or (number + 1) % settings.checkpoint_every == 0:
            save(number + 1, wait=last)
    return simulation.Result(state, lines)


def _resumed(
    checkpoints: simulation.Checkpoints | None, about: Mapping[str, Any], state: State
) -> tuple[int, State]:
    """Rounds that were made, and what they came to."""
    made = None if checkpoints is None else checkpoints.latest()
    if checkpoints is None or made is None:
        return 0, state
    changed = list(paths.differences(checkpoints.run(made)["config"], about))
    if changed:
        raise ValueError(f"the checkpoint is of another run: {'; '.join(changed)}")
    return made, checkpoints.load(made, state)


class _Answer(NamedTuple):
    """What came back from a client."""

    number: int
    size: int
    loss: float
    params: Any


def _ask(
    grid: Any, server: Server, state: State, number: int, *, first: bool
) -> tuple[list[_Answer], dict[str, Any]]:
    """Answers that can be averaged, in the order of clients' numbers, and the line about them."""
    nodes = _nodes(grid, server, state, number, first=first)
    cohort = server.settings.participation.draw(len(nodes), number, seed=server.settings.seed)
    nodes = nodes if cohort.ids is None else [nodes[i] for i in cohort.ids]
    flwr = _flwr()
    config = flwr.ConfigRecord({"number": number, "seed": server.settings.seed})
    moving, _ = server.local.parts(state.params)
    content = flwr.RecordDict({_ARRAYS: _record(moving), _CONFIG: config})
    messages = [flwr.Message(content, dst_node_id=n, message_type="train") for n in nodes]
    replies = list(grid.send_and_receive(messages, timeout=server.timeout))
    answers, line = _sorted(replies, jax.eval_shape(_wide, moving))
    whole = sum(x.nbytes for x in jax.tree.leaves(_wide(moving)))
    line = {"step": number, "clients": len(answers), **line}
    line["missing"] = len(nodes) - len(answers) - line["excluded"] - line["refused"]
    line |= {"bytes_down": whole * len(nodes), "bytes_up": whole * (len(nodes) - line["missing"])}
    if not answers:
        raise simulation.NoClients(
            f"round {number}: none of its {len(nodes)} clients is left ({line['missing']} did not "
            f"answer, {line['refused']} were refused, {line['excluded']} sent numbers that are not "
            "finite); parameters and server are as before",
            state,
        )
    return answers, line


def _nodes(grid: Any, server: Server, state: State, number: int, *, first: bool) -> list[int]:
    """The nodes that are there, as soon as there are enough."""
    least = server.settings.participation.per_round or 1
    if first:
        least = server.clients
    until = time.monotonic() + server.timeout
    while len(nodes := sorted(grid.get_node_ids())) < least:
        if time.monotonic() > until:
            raise simulation.NoClients(
                f"round {number}: {len(nodes)} of at least {least} clients were there after "
                f"{server.timeout:g} s; parameters and server are as before",
                state,
            )
        time.sleep(min(1.0, server.timeout / 10))
    return nodes


def _sorted(replies: Iterable[Any], like: Any) -> tuple[list[_Answer], dict[str, int]]:
    """Answers to be averaged, and how many are not; the log says why."""
    found: dict[int, _Answer] = {}
    counts = {"excluded": 0, "refused": 0}
    # By node, so that of two with one number it is always the same that counts.
    for reply in sorted(replies, key=lambda r: r.metadata.src_node_id):
        node = reply.metadata.src_node_id
        if reply.has_error():
            LOG.warning("node %d failed: %s", node, reply.error.reason)
            continue
        try:
            answer = _answer(reply.content, like)
            if answer.number in found:
                raise ValueError(f"another node is number {answer.number} too")
        except ValueError as error:
            counts["refused"] += 1
            LOG.warning("node %d is refused: %s", node, error)
            continue
        if not _finite(answer.params):
            counts["excluded"] += 1
            LOG.warning("node %d is excluded: its numbers are not finite", node)
            continue
        found[answer.number] = answer
    return [found[number] for number in sorted(found)], counts


def _answer(content: Any, like: Any) -> _Answer:
    """Reads a reply.

    Raises:
        ValueError: it is not what a client sends.
    """
    arrays, metrics = content.array_records.get(_ARRAYS), content.metric_records.get(_METRICS)
    if arrays is None or metrics is None:
        raise ValueError(f"needs records {_ARRAYS!r} and {_METRICS!r}, has {sorted(content)}")
    about = {name: metrics.get(name) for name in ("number", "num-examples", "loss")}
    number, size, loss = about.values()
    if not isinstance(number, int) or not isinstance(size, int) or not isinstance(loss, float):
        raise ValueError(f"needs two whole numbers and a loss, has {about}")
    if number < 0 or not 0 < size < 1 << 31:
        raise ValueError(f"number {number} and num-examples {size} cannot be")
    return _Answer(number, size, loss if math.isfinite(loss) else 0.0, _tree(arrays, like))


def _shares(answers: Sequence[_Answer], server: Server) -> list[np.float32]:
    """Of each client in the mean."""
    alike = server.weights == "clients" or server.privacy
    counts = [1.0 if alike else float(a.size) for a in answers]
    return [np.float32(x / sum(counts)) for x in counts]


def _mean(
    server: Server,
    state: State,
    answers: Sequence[_Answer],
    shares: Sequence[np.float32],
    line: Mapping[str, Any],
) -> Any:
    """How far clients moved on average, as the server sees it."""
    start = jax.tree.map(np.asarray, _wide(server.local.parts(state.params)[0]))
    moved = [jax.tree.map(lambda x, was: np.asarray(x) - was, a.params, start) for a in answers]
    rule = server.privacy
    if rule:
        asked = sum(line[x] for x in ("clients", "excluded", "refused", "missing"))
        moved = [private.clipped(x, rule.clip) for x in moved]
        shares = [np.float32(1 / asked)] * len(moved)
    mean = jax.tree.map(lambda *xs: sum(s * x for s, x in zip(shares, xs, strict=True)), *moved)
    if not rule:
        return mean
    key = jax.random.fold_in(jax.random.key(server.settings.seed), line["step"])
    key = jax.random.fold_in(key, SERVER)
    return rule.noisy(mean, asked, key)


def _step(server: Server, state: State, mean: Any) -> State:
    """The server's step, as in `algorithms`."""
    gradient = jax.tree.map(jnp.negative, mean)
    moving, fixed = server.local.parts(state.params)
    updates, after = server.optimizer.update(gradient, state.server, _wide(moving))
    return State(joined(optax.apply_updates(moving, updates), fixed), after, (), ())


# --- Arrays over the network ---------------------------------------------------------------------
def _record(tree: Any) -> Any:
    """A Flower record of a tree's arrays; small floats become float32, which NumPy can name."""
    arrays = jax.device_get(jax.tree.leaves(_wide(tree)))
    array = _flwr().Array
    named = zip(paths.names(tree), arrays, strict=True)
    return _flwr().ArrayRecord({name: array(np.asarray(x)) for name, x in named})


def _tree(record: Any, like: Any) -> Any:
    """The tree of a record, with the types of `like`.

    Raises:
        ValueError: names, shapes or types are not those that `_record` gives of such a tree.
    """
    leaves, structure = jax.tree.flatten(like)
    names = paths.names(like)
    if set(record) != set(names):
        some = sorted(set(record) ^ set(names))[:3]
        raise ValueError(f"its arrays are others than here, such as {', '.join(some)}")
    found = []
    for name, leaf in zip(names, leaves, strict=True):
        try:
            x = record[name].numpy()
        except (ValueError, TypeError, EOFError, OSError) as error:
            raise ValueError(f"{name} is no plain array: {error}") from None
        wanted = _wire(leaf.dtype)
        if x.shape != leaf.shape or x.dtype != wanted:
            raise ValueError(f"{name} is {x.dtype}{x.shape}, not {wanted}{leaf.shape}")
        found.append(x.astype(leaf.dtype))
    return jax.tree.unflatten(structure, found)


def _wire(dtype: Any) -> Any:
    floating = jnp.issubdtype(dtype, jnp.floating)
    return jnp.promote_types(dtype, jnp.float32) if floating else np.dtype(dtype)


def _wide(tree: Any) -> Any:
    """As it travels, and as the server's optimizer sees it."""
    return jax.tree.map(lambda x: x.astype(_wire(x.dtype)), tree)


def _finite(tree: Any) -> bool:
    return all(bool(np.isfinite(np.asarray(x, np.float64)).all()) for x in jax.tree.leaves(tree))


def _flwr() -> Any:
    """`flwr.app`, with telemetry off unless the user wants it.

    Raises:
        ValueError: flwr is not installed.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import flwr.app
    except ImportError:
        raise ValueError("Flower is needed: pip install 'l4jax[federated]'") from None
    return flwr.app
