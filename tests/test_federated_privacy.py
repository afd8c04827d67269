"""Clipping, noise and its accounting; compressed updates, what they lose, and their bytes."""

import dataclasses

import federated_toys as toys
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l4jax.federated import algorithms, clients, privacy, simulation
from l4jax.federated.algorithms import Options
from l4jax.federated.compression import Compression
from l4jax.federated.local import Local
from l4jax.federated.privacy import Privacy

LOCAL = Local(loss=toys.loss, rate=0.5, batch=5, epochs=2)
KEY = jax.random.key(0)


def one_round(algorithm, cohort=None):
    """The parameters after a round."""
    data = clients.gather(toys.pool(), toys.parts())
    cohort = cohort or clients.everybody(5)
    state = algorithm.init(toys.linear(), 5)
    return jax.jit(algorithm.round)(state, data, cohort, key=KEY, number=0)[0].params


def with_options(**options):
    return algorithms.fedavg(LOCAL, options=Options(**options))


def norm(a, b):
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)))


def test_no_client_moves_the_server_by_more_than_its_share():
    """Alone in a cohort of five, each client moves it by a fifth of the clipping norm, exactly."""
    moves, algorithm = [], with_options(privacy=Privacy(clip=0.01, noise=0.0))
    for k in range(5):
        cohort = clients.everybody(5)._replace(alive=np.arange(5) == k)
        moves.append(norm(one_round(algorithm, cohort), toys.linear()))
    np.testing.assert_allclose(moves, 0.01 / 5, rtol=1e-4)
    # One client's moves are not dispersed.
    found = jax.jit(algorithm.round)(
        algorithm.init(toys.linear(), 5),
        clients.gather(toys.pool(), toys.parts()),
        clients.everybody(5)._replace(alive=np.arange(5) == 1),
        key=KEY,
        number=0,
    )[1]
    assert float(found["dispersion"]) < 1e-4
    # What is shorter stays as it is, and all clients count alike.
    free = one_round(with_options(weights="clients"))
    loose = one_round(with_options(privacy=Privacy(clip=1e3, noise=0.0)))
    assert toys.far(loose, free) < 1e-6
    assert toys.far(free, one_round(with_options())) > 1e-4
    update = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[-4.0]])}
    found = privacy.clipped(update, 2.5)
    np.testing.assert_allclose(found["b"], [[-2.0]], rtol=1e-6)
    assert toys.far(privacy.clipped({"a": jnp.zeros(3)}, 1.0), {"a": np.zeros(3)}) == 0


def test_noise_on_the_mean_of_m_clients_is_z_clip_over_m():
    """Over 110,000 draws: a model of so many weights that no client moves."""

    def loss(params, batch, key):
        return 0.0 * jnp.sum(params["w"]) + 0.0 * jnp.sum(batch["x"])

    local = Local(loss=loss, rate=0.1)
    options = Options(privacy=Privacy(clip=0.7, noise=1.3))
    algorithm = algorithms.fedavg(local, options=options)
    params = {"w": jnp.zeros((10, 11_000))}
    data = clients.gather(toys.pool(), toys.parts())
    alive = np.array([True, True, False, True, True])
    cohort = clients.everybody(5)._replace(alive=alive)
    step = jax.jit(algorithm.round)
    state, _ = step(algorithm.init(params, 5), data, cohort, key=KEY, number=0)
    found = np.asarray(state.params["w"])
    assert found.std() == pytest.approx(1.3 * 0.7 / 5, rel=0.02)
    assert abs(found.mean()) < 1e-3
    other, _ = step(algorithm.init(params, 5), data, cohort, key=KEY, number=1)
    assert abs(np.corrcoef(found.ravel(), np.asarray(other.params["w"]).ravel())[0, 1]) < 0.02


def test_epsilon_is_dp_accountings():
    pytest.importorskip("dp_accounting", reason="needs dp-accounting: pip install l4jax[federated]")
    assert privacy.epsilon(noise=1.0, rounds=60, delta=1e-2) == pytest.approx(51.42, rel=5e-3)
    sampled = privacy.epsilon(noise=1.0, rounds=100, delta=1e-5, share=0.01)
    assert sampled == pytest.approx(1.21, rel=2e-2)


def test_what_is_no_protection_is_said():
    few = privacy.warnings(clients=10, epsilon=51.4, delta=0.1)
    assert [text.split()[0] for text in few] == ["10", "delta", "epsilon"]
    assert privacy.warnings(clients=100_000, epsilon=2.0, delta=1e-7) == []
    for arguments in ({"delta": 0.0}, {"share": 0.0}, {"rounds": 0}, {"noise": -1.0}):
        with pytest.raises(ValueError, match="delta .* and share"):
            privacy.epsilon(**{"noise": 1.0, "rounds": 3, "delta": 0.1} | arguments)
    with pytest.raises(ValueError, match="clip 0.0 must be above 0"):
        Privacy(clip=0.0, noise=1.0)


# --- Compression ---------------------------------------------------------------------------------
def test_the_largest_entries_are_sent():
    x = {"a": jnp.array([[1.0, -5.0], [0.5, 3.0]]), "b": jnp.arange(7.0)}
    found = Compression(keep=0.5).send(x, KEY)
    assert found["a"].tolist() == [[0, -5], [0, 3]]
    assert found["b"].tolist() == [0, 0, 0, 3, 4, 5, 6]


def test_rounding_is_right_on_average_and_by_less_than_a_unit():
    x = jnp.linspace(-1, 1, 41)
    keys = jax.random.split(KEY, 4000)
    found = jax.vmap(lambda k: Compression(bits=4).send({"x": x}, k)["x"])(keys)
    assert np.abs(found - x).max() < 1 / 7
    np.testing.assert_allclose(found.mean(0), x, atol=5 / 7 / 2 / 4000**0.5)
    assert len(np.unique(np.round(np.asarray(found) * 7, 4))) == 15
    assert Compression(bits=4).send({"x": jnp.zeros(3)}, KEY)["x"].tolist() == [0, 0, 0]
    x = jnp.full(200_000, 1.0)
    assert float(Compression(bits=16).send({"x": x}, KEY)["x"].max()) <= 1


def test_with_feedback_nothing_is_lost_for_good():
    """What arrived in all rounds and what is still held back add up to all that was to be sent."""
    data = clients.gather(toys.pool(), toys.parts())
    options = Options(compression=Compression(keep=0.2, bits=4), weights="clients")
    # A loss with the same gradient everywhere: every client wants to move by -0.1 each round.
    local = Local(loss=lambda params, batch, key: jnp.sum(params["w"]), rate=0.1)
    algorithm = algorithms.fedavg(local, options=options)
    state, step = algorithm.init({"w": jnp.zeros(10)}, 5), jax.jit(algorithm.round)
    for number in range(12):
        cohort = clients.Participation(dropout=0.2).draw(5, 0, seed=1)
        state, _ = step(state, data, cohort, key=KEY, number=number)
    alive = cohort.alive
    held = np.asarray(state.clients.residual["w"])
    assert 0 < alive.sum() < 5
    assert (held[~alive] == 0).all()
    total = np.asarray(state.params["w"]) + held[alive].mean(0)
    np.testing.assert_allclose(total, -1.2, atol=1e-5)
    lossy = algorithms.fedavg(
        local,
        options=dataclasses.replace(options, compression=Compression(keep=0.2, feedback=False)),
    )
    assert lossy.init({"w": jnp.zeros(10)}, 5).clients.residual == ()


def test_bytes_are_counted_exactly():
    params = {"a": jnp.zeros((10, 10)), "b": jnp.zeros(7)}
    whole = 4 * 107
    assert Compression().bytes(params) == whole
    assert Compression(bits=8).bytes(params) == 107 + 2 * 4
    assert Compression(bits=4).bytes(params) == 50 + 4 + 2 * 4
    assert Compression(keep=0.1).bytes(params) == 11 * 8
    assert Compression(keep=0.1, bits=8).bytes(params) == 11 * 5 + 2 * 4
    plain, control = algorithms.fedavg(LOCAL), algorithms.scaffold(LOCAL)
    assert plain.traffic(params) == (whole, whole)
    assert control.traffic(params) == (2 * whole, 2 * whole)
    packed = algorithms.fedavg(LOCAL, options=Options(compression=Compression(bits=8)))
    assert packed.traffic(params) == (whole, 115)


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_round_costs_two_models_for_each_client_however_many_steps_it_has(epochs):
    data = clients.gather(toys.pool(), toys.parts())
    algorithm = algorithms.fedavg(dataclasses.replace(LOCAL, epochs=epochs))
    participation = clients.Participation(per_round=4, dropout=0.3)
    settings = simulation.Settings(rounds=6, participation=participation)
    lines = simulation.run(algorithm, toys.linear(), data, settings=settings).lines
    size = 4 * (7 * 3 + 3)
    for number, line in enumerate(lines):
        answered = int(participation.draw(5, number, seed=0).alive.sum())
        assert (line["bytes_down"], line["bytes_up"]) == (4 * size, answered * size)
        assert line["clients"] == answered


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"keep": 0.0}, "keep 0.0"), ({"bits": 1}, "bits 1"), ({"bits": 24}, "bits 24")],
)
def test_compression_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        Compression(**arguments)
    with pytest.raises(ValueError, match="no compression"):
        algorithms.scaffold(LOCAL, options=Options(compression=Compression(bits=8)))
