"""Federated algorithms as pairs: `init(params, clients)` and `round(state, data, cohort, …)`.

A round is one pure function. Clients train from the server's parameters (`local`), the server
averages how far they moved and hands the negative of that to any Optax optimizer as a gradient
(Reddi et al. 2021, "Adaptive Federated Optimization"): with `optax.sgd(1)` that is FedAvg.

    algorithm = fedavg(Local(loss=loss, rate=0.1, batch=10))
    state, cohort = algorithm.init(params, data.clients), everybody(data.clients)
    state, metrics = jax.jit(algorithm.round)(state, data, cohort, key=key, number=0)

An update that is not finite is left out and counted. Where none is left, parameters, server and
clients stay as they are, bit for bit. What a client draws at random depends on the key, the round
and its number alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from l4jax.federated import metrics
from l4jax.federated import privacy as private
from l4jax.federated.clients import Cohort, Data, everybody
from l4jax.federated.compression import Compression
from l4jax.federated.local import Client, Local, Loss, choose, joined
from l4jax.federated.mapping import over_clients
from l4jax.federated.privacy import Privacy

SERVER = 0xFFFFFFFF
"""Folded into a round's key for what the server draws; no client has this number."""


class State(NamedTuple):
    """All that goes from round to round.

    params: the server's. server: its optimizer's state. shared: what clients get beside the
    parameters. clients: what each keeps, with a leading axis of all clients.
    """

    params: Any
    server: Any
    shared: Any
    clients: Any


class Traffic(NamedTuple):
    """Bytes to and from one client in a round."""

    down: int
    up: int


class Algorithm(NamedTuple):
    """A federated algorithm.

    init: (params, number of clients) → state. round: (state, data, cohort, *, key, number) →
    (state, metrics), all numbers: loss, mean over the clients' steps; clients, whose updates were
    averaged; excluded, whose were not finite; dispersion, the clients' root mean square distance
    from their mean over the norm of the parameters. traffic: params → `Traffic`.
    """

    init: Callable[[Any, int], State]
    round: Callable[..., tuple[State, dict[str, jax.Array]]]
    traffic: Callable[[Any], Traffic]


class Beside(NamedTuple):
    """What is averaged beside the parameters: where the mean of these is not what is wanted.

    of: a client's trained parameters → tree of arrays. into: (parameters after the server's
    step, the mean of that) → parameters. down: parameters → bytes of it to a client.
    """

    of: Callable[[Any], Any]
    into: Callable[[Any, Any], Any]
    down: Callable[[Any], int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How rounds are carried out, and what is sent; for any algorithm."""

    weights: Literal["examples", "clients"] = "examples"
    """Whether a client counts by its examples, or all alike."""
    compression: Compression | None = None
    privacy: Privacy | None = None
    """Makes all clients count alike, and the sum be divided by the cohort's size, dropouts too."""
    block: int | None = None
    """Clients that run at once on a device, see `mapping`; None for all."""
    mesh: Any = None
    """A mesh with an axis `clients`, see `mapping.make_mesh`; None for one device."""


# --- Algorithms ----------------------------------------------------------------------------------
def fedavg(
    local: Local,
    *,
    server: optax.GradientTransformation | None = None,
    options: Options = Options(),
    beside: Beside | None = None,
) -> Algorithm:
    """Averaging of clients' weights (McMahan et al. 2017), or any optimizer on the server.

    Raises:
        ValueError: something is averaged `beside`, and the server does more than average, or
            updates are compressed or made private: the two would not belong together.
    """
    if beside and (server or options.compression or options.privacy):
        raise ValueError("what is averaged beside the parameters needs FedAvg, nothing added to it")
    return _algorithm(local, server or optax.sgd(1.0), options, control=False, beside=beside)


def fedsgd(
    loss: Loss, *, server: optax.GradientTransformation, options: Options = Options()
) -> Algorithm:
    """One gradient of each client on all its examples, averaged, and the server's step."""
    return fedavg(Local(loss=loss, rate=1.0, shuffle=False), server=server, options=options)


def fedavgm(
    local: Local, *, rate: float = 1.0, momentum: float = 0.9, options: Options = Options()
) -> Algorithm:
    """Momentum on the server (Hsu et al. 2019)."""
    return fedavg(local, server=optax.sgd(rate, momentum=momentum), options=options)


def fedadam(
    local: Local, *, rate: float = 0.01, tau: float = 1e-3, options: Options = Options()
) -> Algorithm:
    """Adam on the server (Reddi et al. 2021); with bias correction, which that paper leaves out."""
    return fedavg(local, server=optax.adam(rate, b2=0.99, eps=tau), options=options)


def fedyogi(
    local: Local, *, rate: float = 0.01, tau: float = 1e-3, options: Options = Options()
) -> Algorithm:
    """Yogi on the server (Reddi et al. 2021)."""
    return fedavg(local, server=optax.yogi(rate, b2=0.99, eps=tau), options=options)


def fedprox(local: Local, *, mu: float, options: Options = Options()) -> Algorithm:
    """Clients are held back to where the round began (Li et al. 2020, FedProx)."""
    return fedavg(dataclasses.replace(local, proximal=mu), options=options)


def diloco(
    local: Local, *, rate: float = 0.7, momentum: float = 0.9, options: Options = Options()
) -> Algorithm:
    """Many local steps of an optimizer that lives on, Nesterov outside (Douillard et al. 2023).

    All clients count alike, whatever the options say. `local.optimizer` is AdamW there.
    """
    options = dataclasses.replace(options, weights="clients")
    outer = optax.sgd(rate, momentum=momentum, nesterov=True)
    return fedavg(dataclasses.replace(local, keep=True), server=outer, options=options)


def scaffold(local: Local, *, rate: float = 1.0, options: Options = Options()) -> Algorithm:
    """Control variates take the drift out of clients' gradients (Karimireddy et al. 2020).

    Their option II: c_k⁺ = c_k − c + (w − w_k) / (η · steps), and c stays the mean of all clients'
    variates, weighted as their updates are: it moves by what the clients of a round changed.

    Raises:
        ValueError: clients use anything but plain SGD, or clipping or compression are asked for.
            The variates are then not what SCAFFOLD takes them for; with momentum and long rounds it
            is known to fall to chance on clients of one class each.
    """
    if local.optimizer is not optax.sgd or local.keep or local.proximal:
        raise ValueError(
            "SCAFFOLD needs plain SGD at the clients: optimizer optax.sgd, nothing else"
        )
    if options.compression or options.privacy:
        raise ValueError("SCAFFOLD's variates are sent as they are: no compression, no privacy")
    return _algorithm(local, optax.sgd(rate), options, control=True)


def compared(
    algorithm: Algorithm,
    central: Algorithm,
    rows: Any,
    *,
    group: Callable[[str], str] | None = None,
    view: Callable[[Any], Any] = lambda params: params,
) -> Algorithm:
    """The same, and beside it training in one place: each round reports how far they are apart.

    Rounds have as further metrics "divergence", ‖w − w_central‖ / ‖w_central‖ of everything (Zhao
    et al. 2018, eq. 2), and "divergence_NAME" of each group; not a number where central training's
    update was not. Central training begins with the same weights, and its state is part of the
    server's. What the federation does stays the same. On a mesh every group of devices does all of
    central training.

    Args:
        algorithm: of the federation.
        central: of one client: with as many steps in a round, of batches k times as large.
        rows: of the pool, that this one client has, Int[n].
        group: of a parameter, see `metrics.weight_divergence`.
        view: parameters → arrays to compare, such as weights that adapters are merged into.
    """
    one = (jnp.asarray(rows, jnp.int32)[None], jnp.asarray([len(rows)], jnp.int32))

    def init(params: Any, clients: int) -> State:
        state = algorithm.init(params, clients)
        alone = central.init(jax.tree.map(jnp.copy, params), 1)
        return state._replace(server=(state.server, alone))

    def round_(
        state: State, data: Data, cohort: Cohort, *, key: jax.Array, number: Any
    ) -> tuple[State, dict[str, jax.Array]]:
        server, beside = state.server
        inner = state._replace(server=server)
        new, found = algorithm.round(inner, data, cohort, key=key, number=number)
        own = Data(data.pool, *one)
        alone, other = central.round(beside, own, everybody(1), key=key, number=number)
        alone = choose(found["clients"] > 0, alone, beside)
        apart = metrics.divergences(view(new.params), view(alone.params), group=group)
        named = {f"divergence_{name}" if name else "divergence": x for name, x in apart.items()}
        named = {name: jnp.where(other["clients"] > 0, x, jnp.nan) for name, x in named.items()}
        return new._replace(server=(new.server, alone)), found | named

    return Algorithm(init, round_, algorithm.traffic)


# --- A round -------------------------------------------------------------------------------------
class _Common(NamedTuple):
    """What all clients of a round get."""

    params: Any
    shared: Any
    pool: Any
    key: jax.Array
    rate: Any


def _algorithm(
    local: Local,
    server: optax.GradientTransformation,
    options: Options,
    *,
    control: bool,
    beside: Beside | None = None,
) -> Algorithm:
    def init(params: Any, clients: int) -> State:
        moving, _ = local.parts(params)
        one = _Kept(
            optimizer=local.optimizer(local.rate_at(0)).init(moving) if local.keep else (),
            variate=_zeros(moving) if control else (),
            residual=_zeros(moving) if _feedback(options) else (),
        )
        stacked = jax.tree.map(lambda x: jnp.tile(x[None], (clients, *[1] * x.ndim)), one)
        shared = _zeros(moving) if control else ()
        return State(params, server.init(_wide(moving)), shared, stacked)

    def round_(
        state: State, data: Data, cohort: Cohort, *, key: jax.Array, number: Any
    ) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, number)
        common = _Common(state.params, state.shared, data.pool, key, local.rate_at(number))
        clients = _clients(local, state, data, cohort)

        def one(common: _Common, client: Client, bound: jax.Array) -> tuple[_Sums, _Kept]:
            of = beside and beside.of
            return _client(local, options, common, client, bound=bound, control=control, of=of)

        sums, kept = over_clients(one, common, clients, block=options.block, mesh=options.mesh)
        mean = _mean(sums, options, clients.id.shape[0], jax.random.fold_in(key, SERVER))
        gradient = jax.tree.map(jnp.negative, mean)
        moving, fixed = local.parts(state.params)
        updates, after = server.update(gradient, state.server, _wide(moving))
        params = joined(optax.apply_updates(moving, updates), fixed)
        if beside:
            mean = jax.tree.map(lambda x: x / jnp.maximum(sums.weight, 1), sums.beside)
            params = beside.into(params, mean)
        total = data.rows.shape[0] if options.weights == "clients" else data.sizes.sum()
        new = State(
            params,
            after,
            jax.tree.map(lambda c, more: c + more / total, state.shared, sums.shared),
            kept if cohort.ids is None else _put(state.clients, cohort.ids, kept),
        )
        return choose(sums.clients > 0, new, state), _metrics(sums, moving)

    def traffic(params: Any) -> Traffic:
        moving, _ = local.parts(params)
        whole = sum(x.nbytes for x in jax.tree.leaves(moving))
        up = options.compression.bytes(moving) if options.compression else whole
        more = beside.down(params) if beside else 0
        return Traffic((1 + control) * whole + more, up + control * whole)

    return Algorithm(init, round_, traffic)


class _Kept(NamedTuple):
    """What a client keeps; () where an algorithm has no use for it."""

    optimizer: Any
    variate: Any
    residual: Any


class _Sums(NamedTuple):
    """What is added up over clients; all of one type, so that one message has it all."""

    moved: Any
    """Weight × how far the parameters moved."""
    shared: Any
    weight: jax.Array
    loss: jax.Array
    square: jax.Array
    """Weight × squared norm of what moved."""
    clients: jax.Array
    excluded: jax.Array
    beside: Any
    """Weight × what is averaged beside the parameters."""


def _client(
    local: Local,
    options: Options,
    common: _Common,
    client: Client,
    *,
    bound: jax.Array,
    control: bool,
    of: Callable[[Any], Any] | None,
) -> tuple[_Sums, _Kept]:
    """A client's round: what it adds to the sums, and what it keeps."""
    start, was = common.params, client.state
    key = jax.random.fold_in(common.key, client.id)
    train_key, send_key = jax.random.split(key)
    trained = local.train(
        start,
        client,
        common.pool,
        key=train_key,
        rate=common.rate,
        bound=bound,
        optimizer=was.optimizer if local.keep else None,
        correction=_minus(common.shared, was.variate) if control else None,
    )
    moved = _minus(_wide(trained.params), _wide(local.parts(start)[0]))
    variate, residual = was.variate, was.residual
    if control:
        scale = common.rate * jnp.maximum(client.steps, 1)
        variate = jax.tree.map(
            lambda own, c, x: own - c - x / scale, was.variate, common.shared, moved
        )
    if options.compression:
        feedback = options.compression.feedback
        wanted = jax.tree.map(jnp.add, moved, residual) if feedback else moved
        moved = options.compression.send(wanted, send_key)
        residual = _minus(wanted, moved) if feedback else ()
    if options.privacy:
        moved = private.clipped(moved, options.privacy.clip)
    kept = _Kept(trained.optimizer if local.keep else (), variate, residual)
    aside = _wide(of(trained.params)) if of else ()
    sound = _finite((moved, kept, aside))
    there = client.alive & (client.steps > 0) & sound
    alike = options.weights == "clients" or options.privacy is not None
    weight = jnp.where(there, 1.0 if alike else client.size.astype(jnp.float32), 0.0)
    counts = 1.0 if options.weights == "clients" else client.size.astype(jnp.float32)
    shared = jax.tree.map(lambda x: counts * x, _minus(variate, was.variate))
    sums = _Sums(
        moved=jax.tree.map(lambda x: weight * jnp.where(there, x, 0), moved),
        shared=jax.tree.map(lambda x: jnp.where(there, x, 0), shared),
        weight=weight,
        loss=weight * jnp.where(there, trained.loss, 0),
        square=weight * jnp.where(there, optax.tree.norm(moved, squared=True), 0),
        clients=there.astype(jnp.float32),
        excluded=(client.alive & ~sound).astype(jnp.float32),
        beside=jax.tree.map(lambda x: weight * jnp.where(there, x, 0), aside),
    )
    return sums, choose(there, kept, was)


def _clients(local: Local, state: State, data: Data, cohort: Cohort) -> Client:
    """The clients of a cohort, with what they have."""
    rows, sizes, kept = data.rows, data.sizes, state.clients
    ids = jnp.arange(rows.shape[0]) if cohort.ids is None else jnp.asarray(cohort.ids)
    if cohort.ids is not None:
        rows, sizes, kept = jax.tree.map(lambda x: x[ids], (rows, sizes, kept))
    alive = jnp.asarray(cohort.alive)
    steps = jnp.ceil(local.steps(sizes) * jnp.asarray(cohort.effort)).astype(jnp.int32)
    return Client(ids, rows, sizes, jnp.where(alive, steps, 0), alive, kept)


def _mean(sums: _Sums, options: Options, size: int, key: jax.Array) -> Any:
    """How far the clients moved on average, as the server sees it."""
    if options.privacy is None:
        return jax.tree.map(lambda x: x / jnp.maximum(sums.weight, 1), sums.moved)
    mean = jax.tree.map(lambda x: x / size, sums.moved)
    return options.privacy.noisy(mean, size, key)


def _metrics(sums: _Sums, params: Any) -> dict[str, jax.Array]:
    weight = jnp.maximum(sums.weight, 1)
    mean = jax.tree.map(lambda x: x / weight, sums.moved)
    spread = sums.square / weight - optax.tree.norm(mean, squared=True)
    norm = optax.tree.norm(_wide(params))
    return {
        "loss": sums.loss / weight,
        "clients": sums.clients.astype(jnp.int32),
        "excluded": sums.excluded.astype(jnp.int32),
        "dispersion": jnp.sqrt(jnp.maximum(spread, 0)) / jnp.maximum(norm, 1e-12),
    }


def _put(all_clients: Any, ids: Any, kept: Any) -> Any:
    return jax.tree.map(lambda x, new: x.at[jnp.asarray(ids)].set(new), all_clients, kept)


def _minus(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.subtract, a, b)


def _feedback(options: Options) -> bool:
    return options.compression is not None and options.compression.feedback


def _wide(tree: Any) -> Any:
    """In float32 at least: averages and the server's state lose nothing to a small type."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _zeros(params: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, _wide(params))


def _finite(tree: Any) -> jax.Array:
    found = [
        jnp.all(jnp.isfinite(x))
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    return jnp.all(jnp.stack(found))
