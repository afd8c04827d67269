"""Rounds against loops written by hand, against FedJAX, and against what must be the same."""

import dataclasses
import pathlib

import federated_toys as toys
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l4jax.federated import algorithms, clients, simulation
from l4jax.federated.algorithms import Options
from l4jax.federated.clients import Cohort, Participation
from l4jax.federated.local import Client, Local
from l4jax.federated.local import mean as local_mean

KEY = jax.random.key(0)
LOCAL = Local(loss=toys.loss, rate=0.2, batch=5, epochs=2, shuffle=False)
"""Batches of 5 of clients with 4, 11, 7, 13 and 1 examples: last ones are not full."""
FEDAVG, SCAFFOLD = algorithms.fedavg(LOCAL), algorithms.scaffold(LOCAL)
EQUAL_SCAFFOLD = algorithms.scaffold(LOCAL, options=Options(weights="clients"))
DILOCO, FEDADAM = algorithms.diloco(LOCAL), algorithms.fedadam(LOCAL)


def data_of(sizes=toys.SIZES):
    return clients.gather(toys.pool(), toys.parts(sizes))


def rounds(algorithm, params, *, count=5, data=None, cohort=None):
    """The state after some rounds, and the last metrics."""
    data = data or data_of()
    state = algorithm.init(params, data.clients)
    step, found = jax.jit(algorithm.round), {}
    for number in range(count):
        cohort_ = cohort or clients.everybody(data.clients)
        state, found = step(state, data, cohort_, key=KEY, number=number)
    return state, {name: x.item() for name, x in found.items()}


# --- By hand -------------------------------------------------------------------------------------
def gradient(w, x, y):
    """Of softmax regression, [features + 1, classes], the last row the bias's."""
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    z = x @ w
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return x.T @ (p - np.eye(3)[y]) / len(x)


def by_hand(count, *, sizes=toys.SIZES, rate=0.2, batch=5, epochs=2, mu=0.0, scaffold=False):
    """FedAvg, FedProx and SCAFFOLD (option II) as plain loops in float64."""
    pool, start = toys.pool(), toys.linear()["output"]
    w = np.concatenate([start["kernel"], start["bias"][None]]).astype(float)
    c, own = np.zeros_like(w), [np.zeros_like(w) for _ in sizes]
    for _ in range(count):
        ends, changes = [], []
        for k, rows in enumerate(toys.parts(sizes)):
            v, steps = w.copy(), 0
            for _ in range(epochs):
                for i in range(0, len(rows), batch):
                    taken = rows[i : i + batch]
                    g = gradient(v, pool["x"][taken], pool["y"][taken]) + mu * (v - w)
                    if scaffold:
                        g = g + c - own[k]
                    v = v - rate * g
                    steps += 1
            ends.append(v)
            if scaffold:
                new = own[k] - c + (w - v) / (rate * steps)
                changes.append(new - own[k])
                own[k] = new
        w = sum(n * v for n, v in zip(sizes, ends, strict=True)) / sum(sizes)
        if scaffold:
            c = c + sum(n * x for n, x in zip(sizes, changes, strict=True)) / sum(sizes)
    return {"output": {"kernel": w[:-1], "bias": w[-1]}}


@pytest.mark.parametrize("block", [None, 1, 2])
def test_fedavg_is_the_loop(block):
    algorithm = algorithms.fedavg(LOCAL, options=Options(block=block))
    state, found = rounds(algorithm, toys.linear())
    assert toys.far(state.params, by_hand(5)) < 1e-6
    assert (found["clients"], found["excluded"]) == (5, 0)


def test_fedprox_is_the_loop_and_without_mu_it_is_fedavg():
    state, _ = rounds(algorithms.fedprox(LOCAL, mu=0.7), toys.linear())
    assert toys.far(state.params, by_hand(5, mu=0.7)) < 1e-6
    assert toys.far(state.params, by_hand(5)) > 1e-3
    plain, _ = rounds(FEDAVG, toys.linear())
    assert toys.same(rounds(algorithms.fedprox(LOCAL, mu=0.0), toys.linear())[0], plain)


def test_scaffold_is_the_loop_and_begins_as_fedavg():
    state, _ = rounds(SCAFFOLD, toys.linear())
    assert toys.far(state.params, by_hand(5, scaffold=True)) < 2e-6
    assert toys.far(state.params, by_hand(5)) > 1e-3
    first = rounds(SCAFFOLD, toys.linear(), count=1)[0].params
    assert toys.far(first, by_hand(1)) < 1e-6
    # The server's variate is the mean of the clients', weighted as their updates are.
    for weights, algorithm in ((toys.SIZES, SCAFFOLD), (None, EQUAL_SCAFFOLD)):
        state, _ = rounds(algorithm, toys.linear())
        kept = jax.tree.map(
            lambda x, w=weights: np.average(x, axis=0, weights=w), state.clients.variate
        )
        assert toys.far(kept, state.shared) < 1e-6


@pytest.mark.parametrize(("algorithm", "best"), [("fedavg", 1.0), ("scaffold", 1.0)])
def test_clients_count_by_their_examples(algorithm, best):
    """Nine examples at 0 and one at 10: their mean is 1, that of the clients 5."""
    pool = {"x": np.array([0.0] * 9 + [10.0], np.float32)}
    data = clients.gather(pool, toys.parts((9, 1)))

    def loss(params, batch, _):
        return local_mean(0.5 * (params["w"] - batch["x"]) ** 2, batch)

    local = Local(loss=loss, rate=0.1, epochs=3, shuffle=False)
    make = getattr(algorithms, algorithm)
    for options, found in ((Options(), best), (Options(weights="clients"), 5.0)):
        state, _ = rounds(make(local, options=options), {"w": jnp.zeros(())}, count=200, data=data)
        assert float(state.params["w"]) == pytest.approx(found, abs=1e-3)


def test_clients_draw_each_for_themselves():
    """Two with the same examples and a loss that follows its key."""
    pool = {"x": np.ones(2, np.float32)}

    def loss(params, batch, key):
        return local_mean(params["w"] * jax.random.normal(key) * batch["x"], batch)

    data = clients.gather(pool, [np.arange(2)] * 2)
    algorithm = algorithms.fedavg(Local(loss=loss, rate=1.0))

    def moved(client):
        cohort = Cohort(np.array([client]), np.ones(1, bool), np.ones(1, np.float32))
        state, _ = rounds(algorithm, {"w": jnp.zeros(())}, count=1, data=data, cohort=cohort)
        return float(state.params["w"])

    assert moved(0) == moved(0) != moved(1)


def test_the_loss_and_dispersion_are_what_they_say():
    local = dataclasses.replace(LOCAL, batch=None, epochs=1)
    _, found = rounds(algorithms.fedavg(local), toys.linear(), count=1)
    pool = {name: jnp.asarray(x) for name, x in toys.pool().items()}
    every = toys.loss(toys.linear(), pool | {"mask": jnp.ones(36)}, KEY)
    assert found["loss"] == pytest.approx(float(every), rel=1e-5)
    moves = [
        -0.2 * gradient(np.vstack([toys.linear()["output"]["kernel"], np.zeros(3)]), x, y)
        for x, y in ((toys.pool()["x"][p], toys.pool()["y"][p]) for p in toys.parts())
    ]
    mean = np.average(moves, axis=0, weights=toys.SIZES)
    spread = np.average([np.sum((m - mean) ** 2) for m in moves], weights=toys.SIZES)
    norm = np.linalg.norm(toys.linear()["output"]["kernel"])
    assert found["dispersion"] == pytest.approx(spread**0.5 / norm, rel=1e-3)


# --- FedJAX --------------------------------------------------------------------------------------
SERVERS = {
    "sgd": algorithms.fedavg,
    "momentum": lambda local: algorithms.fedavgm(local, rate=0.7),
    "adam": algorithms.fedadam,
    "yogi": algorithms.fedyogi,
}


@pytest.mark.parametrize(
    ("partition", "batch", "server"),
    [*(("unequal", 5, server) for server in SERVERS), ("equal", None, "sgd")],
)
def test_fedjax_gives_the_same(partition, batch, server):
    """Its release 0.0.17; tests/golden/fedjax_oracle.py wrote the file."""
    file = np.load(pathlib.Path(__file__).parent / "golden" / "fedjax.npz", allow_pickle=False)

    def read(name):
        layers = {"fc1": {}, "output": {}}
        for layer, arrays in layers.items():
            arrays |= {kind: file[f"{name}/{layer}/{kind}"] for kind in ("kernel", "bias")}
        return jax.tree.map(jnp.asarray, layers)

    data = clients.gather({"x": file["x"], "y": file["y"]}, toys.parts(file[partition].tolist()))
    local = Local(loss=toys.loss, rate=0.1, batch=batch, epochs=3, shuffle=False)
    state, _ = rounds(SERVERS[server](local), read("start"), data=data)
    assert toys.far(state.params, read(f"{partition}/{server}")) < 1e-5
    assert toys.far(state.params, read("start")) > 1e-2


# --- What must be the same -----------------------------------------------------------------------
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_one_full_step_is_central_gradient_descent_at_any_skew(dtype, tolerance):
    with jax.enable_x64(dtype == np.float64):
        params, pool = toys.linear(dtype), toys.pool()
        pool["x"] = pool["x"].astype(dtype)
        local = Local(loss=toys.loss, rate=0.3, shuffle=False)
        data = clients.gather(pool, toys.parts())
        state, _ = rounds(algorithms.fedavg(local), params, data=data)
        batch = {name: jnp.asarray(x) for name, x in pool.items()} | {"mask": jnp.ones(36)}
        for _ in range(5):
            g = jax.grad(toys.loss)(params, batch, KEY)
            params = jax.tree.map(lambda w, g: w - 0.3 * g, params, g)
        assert state.params["output"]["kernel"].dtype == dtype
        assert toys.far(state.params, params) < tolerance


def test_fedsgd_is_any_optimizer_on_the_whole_data():
    state, _ = rounds(algorithms.fedsgd(toys.loss, server=optax.adam(0.05)), toys.linear())
    params, rule = toys.linear(), optax.adam(0.05)
    moments = rule.init(params)
    batch = {name: jnp.asarray(x) for name, x in toys.pool().items()} | {"mask": jnp.ones(36)}
    for _ in range(5):
        g = jax.grad(toys.loss)(params, batch, KEY)
        updates, moments = rule.update(g, moments, params)
        params = optax.apply_updates(params, updates)
    assert toys.far(state.params, params) < 1e-5


def test_one_client_is_local_training():
    data = clients.gather(toys.pool(), toys.parts((36,)))
    local = Local(loss=toys.loss, rate=0.2, batch=36, epochs=7, shuffle=True)
    state, _ = rounds(algorithms.fedavg(local), toys.linear(), count=1, data=data)
    steps = by_hand(1, sizes=(36,), batch=36, epochs=7)
    assert toys.far(state.params, steps) < 1e-6


def test_each_epoch_shuffles_all_of_a_clients_own_examples():
    local = dataclasses.replace(LOCAL, epochs=3, shuffle=True)
    size = jnp.int32(7)
    client = Client(jnp.int32(3), jnp.arange(11), size, jnp.int32(6), jnp.bool(True), ())
    order = np.asarray(local.order(client, KEY))
    assert [sorted(row[:7]) for row in order] == [list(range(7))] * 3
    assert len({tuple(row[:7]) for row in order}) == 3
    # More rows behind its own change nothing.
    wider = client._replace(rows=jnp.arange(29))
    assert np.array_equal(np.asarray(local.order(wider, KEY))[:, :7], order[:, :7])


def test_diloco_is_nesterov_on_pseudo_gradients_and_its_inner_optimizer_lives_on():
    """With one step of SGD inside and sgd(1) outside, synchronous SGD; with Nesterov, by hand."""
    local = Local(loss=toys.loss, rate=0.1, optimizer=optax.adam, batch=5, shuffle=False)
    sizes = (9, 8, 10, 7)
    data = clients.gather(toys.pool(), toys.parts(sizes))
    algorithm = algorithms.diloco(local, options=Options(block=2))
    state, _ = rounds(algorithm, toys.linear(), count=4, data=data)
    assert state.clients.optimizer[0].count.tolist() == [8] * 4
    w, inner, velocity = toys.linear(), [None] * 4, jax.tree.map(jnp.zeros_like, toys.linear())
    rule = optax.adam(0.1)

    @jax.jit
    def step(v, moments, batch):
        updates, moments = rule.update(jax.grad(toys.loss)(v, batch, KEY), moments, v)
        return optax.apply_updates(v, updates), moments

    for _ in range(4):
        ends = []
        for k, rows in enumerate(toys.parts(sizes)):
            v, moments = w, inner[k] or rule.init(w)
            for i in (0, 5):
                taken = rows[i : i + 5]
                batch = {name: jnp.asarray(x[taken]) for name, x in toys.pool().items()}
                v, moments = step(v, moments, batch | {"mask": jnp.ones(len(taken))})
            inner[k] = moments
            ends.append(v)
        g = jax.tree.map(lambda a, *b: a - sum(b) / 4, w, *ends)
        velocity = jax.tree.map(lambda m, g: 0.9 * m + g, velocity, g)
        w = jax.tree.map(lambda a, g, m: a - 0.7 * (g + 0.9 * m), w, g, velocity)
    assert toys.far(state.params, w) < 1e-5


def test_client_order_changes_nothing():
    shuffled = dataclasses.replace(LOCAL, shuffle=True)
    algorithm, data = algorithms.scaffold(shuffled), data_of()
    state, _ = rounds(algorithm, toys.linear())
    order = np.array([3, 0, 4, 2, 1])
    cohort = Cohort(order, np.ones(5, bool), np.ones(5, np.float32))
    other, _ = rounds(algorithm, toys.linear(), data=data, cohort=cohort)
    assert toys.far(state, other) < 1e-5


# --- Who takes part ------------------------------------------------------------------------------
def test_a_sampled_round_is_the_round_of_those_clients():
    ids = np.array([1, 3], np.int32)
    cohort = Cohort(ids, np.ones(2, bool), np.ones(2, np.float32))
    state, found = rounds(FEDAVG, toys.linear(), count=1, cohort=cohort)
    rows = [toys.parts()[k] for k in ids]
    alone, _ = rounds(FEDAVG, toys.linear(), count=1, data=clients.gather(toys.pool(), rows))
    assert found["clients"] == 2
    assert toys.far(state.params, alone.params) < 1e-6


def test_scaffold_keeps_the_variates_of_those_who_are_away():
    cohort = Cohort(np.array([1, 3]), np.array([True, False]), np.ones(2, np.float32))
    state, _ = rounds(SCAFFOLD, toys.linear(), count=1, cohort=cohort)
    sizes = [float(jnp.abs(x).sum()) for x in state.clients.variate["output"]["kernel"]]
    assert [x > 0 for x in sizes] == [False, True, False, False, False]
    share = toys.SIZES[1] / sum(toys.SIZES)
    change = jax.tree.map(lambda x: x[1] * share, state.clients.variate)
    assert toys.far(state.shared, change) < 1e-7


def test_stragglers_send_what_they_have():
    """A client with half its effort has made the first half of its steps, rounded up."""
    effort = np.array([1, 0.5, 1, 0.17, 1], np.float32)
    cohort = Cohort(None, np.ones(5, bool), effort)
    state, _ = rounds(FEDAVG, toys.linear(), count=1, cohort=cohort)
    ends = []
    for k, steps in enumerate((2, 3, 4, 2, 2)):
        v = np.vstack([toys.linear()["output"]["kernel"], np.zeros(3)]).astype(float)
        rows = toys.parts()[k]
        batches = [rows[i : i + 5] for i in range(0, len(rows), 5)] * 2
        for taken in batches[:steps]:
            v = v - 0.2 * gradient(v, toys.pool()["x"][taken], toys.pool()["y"][taken])
        ends.append(v)
    mean = np.average(ends, axis=0, weights=toys.SIZES)
    assert toys.far(state.params["output"], {"kernel": mean[:-1], "bias": mean[-1]}) < 1e-6


@pytest.mark.parametrize("algorithm", [FEDAVG, SCAFFOLD, DILOCO])
def test_an_update_that_is_not_finite_is_left_out_and_counted(algorithm):
    pool = toys.pool()
    pool["x"][4 + 3] = np.nan  # of client 1
    broken = clients.gather(pool, toys.parts())
    state, found = rounds(algorithm, toys.linear(), count=2, data=broken)
    assert (found["clients"], found["excluded"]) == (4, 1)
    alive = np.array([True, False, True, True, True])
    cohort = Cohort(None, alive, np.ones(5, np.float32))
    other, found = rounds(algorithm, toys.linear(), count=2, cohort=cohort)
    assert (found["clients"], found["excluded"]) == (4, 0)
    assert toys.same(state, other)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("reason", ["away", "not finite"])
@pytest.mark.parametrize("algorithm", [FEDADAM, SCAFFOLD])
def test_a_round_without_clients_changes_not_a_bit(algorithm, reason):
    data = data_of()
    state, _ = rounds(algorithm, toys.linear(), count=2)
    cohort, pool = clients.everybody(5), toys.pool()
    if reason == "away":
        cohort = cohort._replace(alive=np.zeros(5, bool))
    else:
        pool["x"][:] = np.inf
        data = clients.gather(pool, toys.parts())
    after, found = jax.jit(algorithm.round)(state, data, cohort, key=KEY, number=2)
    assert toys.same(after, state)
    assert found["clients"] == 0
    assert found["excluded"] == (0 if reason == "away" else 5)
    settings = simulation.Settings(
        rounds=3, participation=Participation(dropout=1.0 if reason == "away" else 0.0)
    )
    with pytest.raises(simulation.NoClients, match="round 0: none of its 5 clients is left") as e:
        simulation.run(algorithm, toys.linear(), data, settings=settings)
    assert toys.same(e.value.state, algorithm.init(toys.linear(), 5))


def test_small_types_are_averaged_in_float32():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toys.linear())
    state, _ = rounds(algorithms.fedavgm(LOCAL), params, count=2)
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(state.server)} == {"float32"}


# --- Refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: algorithms.scaffold(dataclasses.replace(LOCAL, optimizer=optax.adam)),
            "SCAFFOLD needs plain SGD",
        ),
        (lambda: algorithms.scaffold(dataclasses.replace(LOCAL, proximal=1.0)), "plain SGD"),
        (lambda: dataclasses.replace(LOCAL, batch=0), "batch 0"),
        (lambda: dataclasses.replace(LOCAL, proximal=-1.0), "proximal -1"),
        (lambda: Participation(per_round=0), "per_round 0"),
        (lambda: Participation(dropout=1.5), "dropout 1.5"),
        (lambda: Participation(least_effort=0.0), "least_effort 0"),
        (lambda: Participation(per_round=6).draw(5, 0, seed=0), "per_round 6 exceeds the 5"),
    ],
)
def test_what_does_not_go_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_cohorts_depend_on_the_round_alone():
    rule = Participation(per_round=7, dropout=0.3, stragglers=0.5, least_effort=0.2)
    many = [rule.draw(20, number, seed=1) for number in range(200)]
    assert all(len(set(c.ids.tolist())) == 7 for c in many)
    again = rule.draw(20, 150, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(many[150], again, strict=True))
    ids = np.concatenate([c.ids for c in many])
    assert np.bincount(ids, minlength=20).min() > 40
    assert np.mean([c.alive.mean() for c in many]) == pytest.approx(0.7, abs=0.05)
    effort = np.concatenate([c.effort for c in many])
    assert np.mean(effort < 1) == pytest.approx(0.5, abs=0.05)
    assert effort.min() >= 0.2


# --- Weight divergence in every round ------------------------------------------------------------
def test_rounds_say_how_far_weights_are_from_central_trainings():
    """Against the two trained apart from each other, in blocks, with clients that do not answer."""
    local = Local(loss=toys.loss, rate=lambda number: 0.2 * 0.9**number, batch=4)
    alone = algorithms.fedavg(dataclasses.replace(local, batch=20))
    plain = algorithms.fedavgm(local, options=Options(block=2))
    rows = np.concatenate(toys.parts())
    pair = algorithms.compared(plain, alone, rows, group=lambda name: name.split(".")[-1])
    data = clients.gather(toys.pool(), toys.parts())
    one = clients.gather(toys.pool(), [rows])
    states = [
        algorithm.init(toys.linear(), x.clients)
        for algorithm, x in ((pair, data), (plain, data), (alone, one))
    ]
    seen = []
    for number in range(4):
        cohort = clients.everybody(len(toys.SIZES))
        alive = np.arange(len(toys.SIZES)) != number
        given = [(data, cohort._replace(alive=alive))] * 2 + [(one, clients.everybody(1))]
        made = [
            jax.jit(algorithm.round)(state, *more, key=KEY, number=number)
            for algorithm, state, more in zip((pair, plain, alone), states, given, strict=True)
        ]
        states = [state for state, _ in made]
        assert toys.same(states[0].params, states[1].params)
        ours, theirs = (jax.device_get(state.params["output"]) for state in states[1:])
        norms = {
            part: (np.linalg.norm(ours[part] - theirs[part]), np.linalg.norm(theirs[part]))
            for part in ("kernel", "bias")
        }
        found = made[0][1]
        for part, (apart, size) in norms.items():
            assert found[f"divergence_{part}"] == pytest.approx(apart / size, rel=1e-4)
        total = np.hypot(*(x[0] for x in norms.values())) / np.hypot(
            *(x[1] for x in norms.values())
        )
        assert found["divergence"] == pytest.approx(total, rel=1e-4)
        seen.append(total)
    assert min(seen) > 1e-3
    # Nobody answers: central training does not go on either.
    nobody = cohort._replace(alive=np.zeros(len(toys.SIZES), bool))
    after, found = jax.jit(pair.round)(states[0], data, nobody, key=KEY, number=4)
    assert toys.same(after, states[0])
    assert found["divergence"] == pytest.approx(seen[-1], rel=1e-4)
