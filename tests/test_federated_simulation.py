"""Runs: what they write, and that a run cut anywhere goes on as if it had not been."""

import functools
import json

import federated_toys as toys
import jax
import numpy as np
import optax
import pytest
from flax import nnx

from l4jax.federated import (
    algorithms,
    clients,
    generated,
    mapping,
    networks,
    partition,
    sharing,
    simulation,
)
from l4jax.federated.algorithms import Options
from l4jax.federated.clients import Participation
from l4jax.federated.compression import Compression
from l4jax.federated.local import Local
from l4jax.federated.simulation import Settings
from l4jax.training import tracking
from l4jax.training.checkpointing import Checkpoints

LOCAL = Local(loss=toys.loss, rate=lambda number: 0.2 * 0.9**number, batch=4)
PARTICIPATION = Participation(per_round=3, dropout=0.1, stragglers=0.3)
MAKERS = {
    "momentum and feedback": algorithms.fedavg(
        LOCAL,
        server=optax.sgd(0.5, momentum=0.9),
        options=Options(compression=Compression(keep=0.5, bits=8)),
    ),
    "scaffold": algorithms.scaffold(LOCAL),
    "diloco": algorithms.diloco(Local(loss=toys.loss, rate=0.1, optimizer=optax.adam, batch=4)),
}
MESHES = {"on a mesh, beside training in one place": mapping.make_mesh(clients=2)}
ADAM = Local(loss=toys.loss, rate=0.1, optimizer=optax.adam, batch=4, keep=True)
MAKERS |= {
    name: algorithms.compared(
        algorithms.diloco(ADAM, options=Options(mesh=mesh)),
        algorithms.fedavg(ADAM),
        np.concatenate(toys.parts()),
    )
    for name, mesh in MESHES.items()
}


def data():
    return clients.gather(toys.pool(), toys.parts())


def settings(rounds, **changes):
    values = {"seed": 3, "participation": PARTICIPATION, "evaluate_every": 2, "checkpoint_every": 3}
    return Settings(rounds=rounds, **values | changes)


class Stop(Exception):
    """Comes from a tracker in place of a kill."""


class Stopper:
    def __init__(self, at):
        self.at = at

    def log(self, line):
        if line["step"] == self.at:
            raise Stop


def measure(params):
    return {"norm": float(optax.tree.norm(params))}


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_cut_anywhere_goes_on_as_if_it_had_not_been(name, tmp_path):
    algorithm, mesh = MAKERS[name], MESHES.get(name)
    go = functools.partial(
        simulation.run,
        algorithm,
        toys.linear(),
        data(),
        settings=settings(8),
        evaluate=measure,
        mesh=mesh,
    )
    whole = go()
    saved = Checkpoints(tmp_path / "checkpoints", keep=2)
    with pytest.raises(Stop):
        go(checkpoints=saved, trackers=[Stopper(4)])
    saved.settle()
    assert saved.steps() == [3]
    rest = go(checkpoints=saved)
    saved.close()
    assert toys.same(rest.state, whole.state)

    def untimed(lines):
        return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]

    assert untimed(rest.lines) == untimed(whole.lines[3:])
    assert whole.curve("norm").keys() == {2, 4, 6, 8}


def test_another_federation_is_refused_and_told_apart(tmp_path):
    saved = Checkpoints(tmp_path / "checkpoints", keep=2)
    algorithm = MAKERS["momentum and feedback"]
    simulation.run(algorithm, toys.linear(), data(), settings=settings(3), checkpoints=saved)
    pool, sizes = toys.pool(), (4, 11, 6, 14, 1)
    touched = pool | {"x": pool["x"] + 1}
    for other, changed, message in (
        (clients.gather(pool, toys.parts(sizes)), settings(5), "data.largest_client: 13 then, 14"),
        (clients.gather(pool, toys.parts((4, 11, 7, 13))), settings(5), "data.clients: 5 then, 4"),
        (clients.gather(touched, toys.parts()), settings(5), "data.pool.x: '.*' then, '.*' now"),
        (data(), settings(5, seed=4), "settings.seed: 3 then, 4 now"),
        (
            data(),
            settings(5, participation=Participation()),
            "settings.participation.dropout: 0.1 then, 0.0 now",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            simulation.run(algorithm, toys.linear(), other, settings=changed, checkpoints=saved)
    swapped = [part[::-1] if k == 1 else part for k, part in enumerate(toys.parts())]
    with pytest.raises(ValueError, match=r"another run: data.partition: '\w+' then, '\w+' now$"):
        simulation.run(
            algorithm,
            toys.linear(),
            clients.gather(pool, swapped),
            settings=settings(5),
            checkpoints=saved,
        )
    # More rounds of the same is what resuming is for.
    result = simulation.run(
        algorithm, toys.linear(), data(), settings=settings(5), checkpoints=saved
    )
    assert [line["step"] for line in result.lines] == [3, 4]
    saved.close()


def test_lines_go_to_trackers_as_they_come(tmp_path):
    class Written:
        def __init__(self):
            self.lines = tracking.Lines(tmp_path / "metrics.jsonl", below=0)

        def log(self, line):
            self.lines.write(line)

    written = Written()
    result = simulation.run(
        MAKERS["scaffold"],
        toys.linear(),
        data(),
        settings=settings(4),
        evaluate=measure,
        trackers=[written],
    )
    written.lines.close()
    found = tracking.read(tmp_path / "metrics.jsonl")
    assert found == json.loads(json.dumps(result.lines))
    assert [("norm" in line) for line in found] == [False, True, False, True]


def test_a_round_with_nobody_ends_the_run_where_it_stood(tmp_path):
    saved = Checkpoints(tmp_path / "checkpoints", keep=2)
    rule = Participation(per_round=1, dropout=0.7)
    # Somebody answers in two rounds, and nobody in the third.
    seed = next(
        s
        for s in range(99)
        if [bool(rule.draw(5, n, seed=s).alive.any()) for n in range(3)] == [True, True, False]
    )
    algorithm = MAKERS["momentum and feedback"]
    with pytest.raises(simulation.NoClients, match="round 2: none of its 1 clients is left") as e:
        simulation.run(
            algorithm,
            toys.linear(),
            data(),
            settings=settings(9, participation=rule, seed=seed),
            checkpoints=saved,
        )
    before = simulation.run(
        algorithm, toys.linear(), data(), settings=settings(2, participation=rule, seed=seed)
    )
    assert toys.same(e.value.state, before.state)
    assert saved.latest() == 2
    saved.close()


# --- Networks and generated data -----------------------------------------------------------------
@pytest.mark.parametrize("name", networks.PAPER)
def test_the_papers_networks_have_named_layers_and_say_where_they_are_from(name):
    network = networks.PAPER[name]
    module = nnx.eval_shape(lambda: networks.Classifier(network, rngs=nnx.Rngs(0)))
    params, apply = networks.functional(module)
    dense = [f"fc{n}" for n in range(1, 1 + len(network.dense))]
    assert list(params) == ["conv1", "conv2", *dense, "output"]
    assert jax.eval_shape(apply, params, np.zeros((2, *network.shape), np.float32)).shape == (2, 10)
    assert "recalled" in network.provenance or "not known" in network.provenance
    if name == "mnist":
        assert sum(x.size for x in jax.tree.leaves(params)) == 1_663_370


@pytest.mark.parametrize("kernel", [3, 5, 2])
def test_patches_give_xlas_convolution(kernel):
    layer = networks.Convolution(kernel, 3, 4, rngs=nnx.Rngs(1))
    layer.bias[...] = jax.numpy.arange(4.0)
    x = np.random.default_rng(0).standard_normal((2, 7, 5, 3)).astype(np.float32)
    expected = jax.lax.conv_general_dilated(
        x, layer.kernel[...], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = layer(jax.numpy.asarray(x))
    np.testing.assert_allclose(found, expected + np.arange(4), atol=1e-5)


def test_odd_inputs_are_pooled_whole():
    x = np.arange(15, dtype=np.float32).reshape(1, 3, 5, 1)
    assert networks._pool(jax.numpy.asarray(x))[0, ..., 0].tolist() == [[6, 8, 9], [11, 13, 14]]


@pytest.mark.parametrize("make", [generated.textures, generated.keywords])
def test_generated_classes_can_be_told_apart(make):
    """By the nearest class mean, better than by chance; seeds draw other examples of the same."""
    train, test = make(12, seed=0), make(12, seed=1)
    assert np.array_equal(train["y"], np.repeat(np.arange(10), 12))
    assert np.array_equal(train["x"], make(12, seed=0)["x"])
    assert not np.array_equal(train["x"], test["x"])
    means = train["x"].reshape(10, 12, -1).mean(1)
    distance = ((test["x"].reshape(120, 1, -1) - means) ** 2).sum(-1)
    assert np.mean(distance.argmin(1) == test["y"]) > 0.25
    with pytest.raises(ValueError, match="each 0"):
        make(0, seed=0)


def test_skew_costs_accuracy_and_a_little_sharing_wins_much_of_it_back():
    """The effect itself, on a generated set that a network of dense layers learns in seconds."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(10), 60)
    x = (np.eye(10)[y] + 0.25 * rng.standard_normal((600, 10))).astype(np.float32)
    pool = {"x": x[:, :, None, None], "y": y.astype(np.int32)}
    own, spare = (
        np.flatnonzero(np.isin(np.arange(600) % 60, range(*r))) for r in ((40,), (40, 50))
    )
    test = np.flatnonzero(np.arange(600) % 60 >= 50)
    network = networks.Network(shape=(10, 1, 1), convolutions=(), dense=(32,))
    params, apply = networks.functional(networks.Classifier(network, rngs=nnx.Rngs(0)))
    accuracy = networks.accuracy(apply, pool["x"][test], pool["y"][test])
    local = Local(loss=networks.classification(apply), rate=0.3, batch=10, epochs=3)
    algorithm = algorithms.fedavg(local)

    def reach(parts):
        result = simulation.run(
            algorithm,
            params,
            clients.gather(pool, parts),
            settings=Settings(rounds=2),
            evaluate=accuracy,
        )
        return result.curve()[2]

    split = partition.classes(y[own], 10, each=1, seed=0)
    skewed = [own[part] for part in split]
    shared = sharing.draw(y, spare, size=sharing.size_of(0.05, skewed), seed=0)
    after, _ = sharing.share(skewed, shared, labels=y, alpha=1.0, seed=0)
    iid, alone, helped = (
        reach(p) for p in ([own[p] for p in partition.uniform(400, 10, seed=0)], skewed, after)
    )
    assert iid - alone > 0.3
    assert helped - alone > 0.2
