"""Clients over a network: both of Flower's apps in one process, then as programs on loopback.

The reference is `simulation.run` on the same clients and seeds, which knows nothing of messages.
"""

import functools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import federated_toys as toys
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l4jax.federated import algorithms, clients, flower, simulation
from l4jax.federated.clients import Participation
from l4jax.federated.local import Local
from l4jax.federated.privacy import Privacy
from l4jax.federated.simulation import Settings
from l4jax.training.checkpointing import Checkpoints

LOCAL = Local(loss=toys.loss, rate=lambda number: 0.2 * 0.9**number, batch=4, epochs=2)
ROOT = pathlib.Path(__file__).resolve().parent.parent
flwr = pytest.importorskip("flwr.app")


@pytest.fixture(autouse=True)
def _task():
    """Who sends messages; Flower's programs set it when they begin."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


class Grid:
    """Flower's grid, with all clients in this process."""

    def __init__(self, app, count, change=None):
        self.app, self.change = app, change or (lambda message, node, number: message)
        self.contexts = {100 + 7 * n: self._context(100 + 7 * n, n) for n in range(count)}
        self.asked = []

    def _context(self, node, number):
        config = {"partition-id": number}
        return flwr.Context(
            run_id=1, node_id=node, node_config=config, state=flwr.RecordDict(), run_config={}
        )

    def get_node_ids(self):
        # In no order of ours.
        return sorted(self.contexts, key=lambda node: node * 31 % 17)

    def send_and_receive(self, messages, *, timeout):
        self.asked.append([m.metadata.dst_node_id for m in messages])
        replies = [self._one(message) for message in messages]
        return [reply for reply in replies if reply is not None]

    def _one(self, message):
        node = message.metadata.dst_node_id
        number = message.content["config"]["number"]
        reply = self.app(message, self.contexts[node])
        return self.change(reply, self.contexts[node].node_config["partition-id"], number)


def site(local, number, params):
    rows = toys.parts()[number]
    pool = {name: x[rows] for name, x in toys.pool().items()}
    return flower.Site(number=number, pool=pool, local=local, params=params)


def federate(local=LOCAL, *, rounds=3, change=None, params=None, seed=5, **server):
    params = toys.linear() if params is None else params
    app = flower.client_app(lambda run, node: site(local, node["partition-id"], params))
    grid = Grid(app, len(toys.SIZES), change)
    values = {"settings": Settings(rounds=rounds, seed=seed), "clients": 5, "timeout": 0.2}
    return grid, flower.run(grid, flower.Server(params=params, local=local, **values | server))


def simulated(algorithm, rounds=3, *, parts=None, params=None):
    data = clients.gather(toys.pool(), parts or toys.parts())
    start = toys.linear() if params is None else params
    return simulation.run(algorithm, start, data, settings=Settings(rounds=rounds, seed=5))


# --- In one process ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["mean", "adam", "diloco", "proximal", "part", "bfloat16", "private"]
)
def test_parameters_are_those_of_the_simulation(name):
    adam = Local(loss=toys.loss, rate=0.05, optimizer=optax.adam, batch=4, keep=True)
    outer = optax.sgd(0.7, momentum=0.9, nesterov=True)
    near = Local(loss=toys.loss, rate=0.1, batch=3, proximal=0.3)
    part = Local(loss=toys.loss, rate=0.1, batch=3, trained=lambda name: name.endswith("kernel"))
    privacy = Privacy(clip=0.05, noise=0.3)
    small = toys.linear(jnp.bfloat16) if name == "bfloat16" else None
    local, server, simulation_ = {
        "mean": (LOCAL, {}, algorithms.fedavg(LOCAL)),
        "adam": (LOCAL, {"optimizer": optax.adam(0.05)}, None),
        "diloco": (adam, {"optimizer": outer, "weights": "clients"}, algorithms.diloco(adam)),
        "proximal": (near, {}, algorithms.fedavg(near)),
        "part": (part, {}, algorithms.fedavg(part)),
        "bfloat16": (LOCAL, {}, algorithms.fedavg(LOCAL)),
        "private": (
            LOCAL,
            {"privacy": privacy},
            algorithms.fedavg(LOCAL, options=algorithms.Options(privacy=privacy)),
        ),
    }[name]
    expected = simulated(
        simulation_ or algorithms.fedavg(local, server=optax.adam(0.05)), params=small
    )
    _, found = federate(local, params=small, **server)
    moved = toys.far(expected.state.params, toys.linear())
    # One rounding to bfloat16 of each step's result may fall either way.
    assert toys.far(found.state.params, expected.state.params) <= (4e-3 if small else 1e-6) < moved
    kinds = [x.dtype for x in jax.tree.leaves(found.state.params)]
    assert kinds == [x.dtype for x in jax.tree.leaves(expected.state.params)]
    for line, other in zip(found.lines, expected.lines, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-2 if small else 1e-5)
        assert (line["clients"], line["step"]) == (5, other["step"])
        if not small:
            assert line["bytes_down"] == other["bytes_down"]


JOINED, TRACED = [], []


def counted(params, batch, key):
    TRACED.append(key)
    return toys.loss(params, batch, key)


def join(run, node):
    """Found by its name, as what an app's module has."""
    JOINED.append(node["partition-id"])
    return site(Local(loss=counted, rate=0.1, batch=3), node["partition-id"], toys.linear())


def pickled_for_every_message():
    """Rounds of one client, as Flower's simulation makes them."""
    import cloudpickle
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    content = cloudpickle.dumps(flower.client_app(join))
    grid = Grid(lambda *message: cloudpickle.loads(content)(*message), 1)
    traced = []
    for rounds in (1, 3):
        server = flower.Server(
            params=toys.linear(),
            local=Local(loss=toys.loss, rate=0.1, batch=3),
            settings=Settings(rounds=rounds),
            clients=1,
            timeout=0.2,
        )
        flower.run(grid, server)
        traced.append(len(TRACED))
    assert JOINED == [0]
    assert traced[0] == traced[1] > 0


def test_an_app_that_is_pickled_for_every_message_joins_and_compiles_once():
    """In a process without the tests' type checker, which no function is pickled with."""
    pytest.importorskip("cloudpickle", reason="comes with flwr[simulation]")
    code = "import test_flower; test_flower.pickled_for_every_message()"
    folder = pathlib.Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@functools.cache
def without_client_3():
    """Two rounds of a simulation, in the second of which it is not there."""
    data, algorithm = clients.gather(toys.pool(), toys.parts()), algorithms.fedavg(LOCAL)
    state, key = algorithm.init(toys.linear(), 5), jax.random.key(5)
    for number in range(2):
        alive = np.arange(5) != (3 if number else 9)
        cohort = clients.Cohort(None, alive, np.ones(5, np.float32))
        state, _ = jax.jit(algorithm.round)(state, data, cohort, key=key, number=number)
    return state


def spoil(kind):
    """What client 3 sends in round 1 in place of what it should."""

    def change(reply, client, number):
        if (client, number) != (3, 1):
            return reply
        arrays, about = reply.content["arrays"], reply.content["metrics"]
        kernel = arrays["output.kernel"].numpy()
        if kind == "silence":
            return None
        if kind == "failure":
            node = reply.metadata.src_node_id
            asked = flwr.Message(flwr.RecordDict(), dst_node_id=node, message_type="train")
            error = flwr.Error(code=0, reason="its machine is gone")
            return flwr.Message(error, reply_to=asked)
        if kind == "name":
            arrays["output.extra"] = flwr.Array(kernel)
        elif kind == "number":
            about["number"] = 1
        elif kind == "size":
            about["num-examples"] = -4
        elif kind == "metrics":
            del reply.content["metrics"]
        elif kind == "bytes":
            whole = arrays["output.kernel"]
            whole.data = whole.data[:-9]
        else:
            bad = {
                "shape": kernel[:, :2],
                "type": kernel.astype(np.float64),
                "nan": np.where(kernel == kernel.max(), np.nan, kernel),
                "infinite": np.where(kernel == kernel.max(), np.inf, kernel),
            }[kind]
            arrays["output.kernel"] = flwr.Array(bad.astype(bad.dtype))
        return reply

    return change


@pytest.mark.parametrize(
    ("kind", "counted", "told"),
    [
        ("shape", "refused", r"output.kernel is float32\(7, 2\), not float32\(7, 3\)"),
        ("type", "refused", r"output.kernel is float64\(7, 3\), not float32\(7, 3\)"),
        ("name", "refused", "arrays are others than here, such as output.extra"),
        ("number", "refused", "another node is number 1 too"),
        ("size", "refused", "num-examples -4 cannot be"),
        ("metrics", "refused", "needs records 'arrays' and 'metrics', has .'arrays'."),
        ("bytes", "refused", "output.kernel is no plain array"),
        ("nan", "excluded", "not finite"),
        ("infinite", "excluded", "not finite"),
        ("silence", "missing", None),
        ("failure", "missing", "its machine is gone"),
    ],
)
def test_a_client_that_sends_no_sound_update_is_counted_and_the_round_goes_on(
    kind, counted, told, caplog
):
    _, found = federate(rounds=2, change=spoil(kind))
    counts = {"refused": 0, "excluded": 0, "missing": 0}
    assert [{k: line[k] for k in counts} for line in found.lines] == [counts, counts | {counted: 1}]
    assert [line["clients"] for line in found.lines] == [5, 4]
    whole = 4 * (7 * 3 + 3)
    assert found.lines[1]["bytes_down"] == 5 * whole
    assert found.lines[1]["bytes_up"] == (4 if counted == "missing" else 5) * whole
    assert toys.far(found.state.params, without_client_3().params) < 1e-6
    assert re.search(told or "^$", caplog.text)


def test_where_all_are_gone_state_and_optimizer_stay_and_are_saved(tmp_path):
    saved = Checkpoints(tmp_path, keep=2)
    rule = optax.sgd(0.5, momentum=0.9)

    def change(reply, client, number):
        if number < 2:
            return reply
        return None if client % 2 else spoil("nan")(reply, 3, 1)

    with pytest.raises(
        simulation.NoClients, match=r"round 2: none of its 5 .*2 did not.*3 sent"
    ) as e:
        federate(rounds=6, change=change, optimizer=rule, checkpoints=saved)
    _, before = federate(rounds=2, optimizer=rule)
    assert toys.same(e.value.state, before.state)
    assert saved.latest() == 2
    _, rest = federate(rounds=4, optimizer=rule, checkpoints=saved)
    _, whole = federate(rounds=4, optimizer=rule)
    assert toys.same(rest.state, whole.state)
    assert [line["step"] for line in rest.lines] == [2, 3]
    with pytest.raises(simulation.NoClients, match="round 4: 5 of at least 6 clients"):
        federate(rounds=5, optimizer=rule, checkpoints=saved, clients=6, timeout=0.05)
    with pytest.raises(ValueError, match="another run: seed: 5 then, 6 now"):
        federate(rounds=5, optimizer=rule, checkpoints=saved, seed=6)
    saved.close()


def test_clients_are_waited_for_and_drawn():
    with pytest.raises(simulation.NoClients, match="round 0: 5 of at least 6 clients were there"):
        federate(clients=6)
    settings = Settings(rounds=4, seed=5, participation=Participation(per_round=2))
    grid, found = federate(settings=settings)
    assert [line["clients"] for line in found.lines] == [2] * 4
    assert len({tuple(nodes) for nodes in grid.asked}) > 1
    assert federate(settings=settings)[0].asked == grid.asked
    with pytest.raises(ValueError, match="set neither"):
        federate(settings=Settings(rounds=1, participation=Participation(dropout=0.1)))


def test_what_a_site_has_must_be_examples():
    with pytest.raises(ValueError, match=r"their lengths: \{'x': 0\}"):
        flower.Site(number=0, pool={"x": np.zeros((0, 2))}, local=LOCAL, params={})


# --- Without Flower, and quietly -----------------------------------------------------------------
def test_without_flower_one_line_says_what_to_install():
    code = (
        "import sys; sys.modules['flwr'] = None\n"
        "from l4jax.federated import flower\n"
        "try: flower.client_app(None)\n"
        "except ValueError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "Flower is needed: pip install 'l4jax[federated]'\n"


@pytest.mark.parametrize(("given", "expected"), [(None, "0"), ("1", "1")])
def test_telemetry_is_off_unless_it_is_wanted(given, expected, tmp_path):
    code = (
        "from l4jax.federated import flower; flower.server_app(None)\n"
        "from flwr.supercore import telemetry; print(telemetry.FLWR_TELEMETRY_ENABLED)\n"
        "print(flower.environment('x')['FLWR_TELEMETRY_ENABLED'])"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("FLWR_")}
    env |= {"HOME": str(tmp_path)} | ({"FLWR_TELEMETRY_ENABLED": given} if given else {})
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [expected, expected]
    assert not list(tmp_path.iterdir())


# --- As programs ---------------------------------------------------------------------------------
def program(folder, name, *options):
    command = [sys.executable, "-m", "experiments.federated_flower", "--out", str(folder / name)]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "HOME": str(folder), "XLA_FLAGS": ""}
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen([*command, *options], cwd=ROOT, env=env, stdout=log, stderr=log)


def crash(node):
    """As if its machine lost power: Flower's programs have a group of their own."""
    for child in pathlib.Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split():
        os.killpg(int(child), signal.SIGKILL)
    node.kill()


@pytest.mark.slow
def test_rounds_over_loopback_are_the_simulations_and_outlive_a_client(tmp_path):
    from experiments import federated_flower

    port = ["--port", "18471"]
    nodes = [
        program(
            tmp_path, f"c{n}", "--role=client", f"--number={n}", f"--node-port={18472 + n}", *port
        )
        for n in range(3)
    ]
    server = program(tmp_path, "s", "--clients=3", "--rounds=4", "--timeout=75", *port)
    file = tmp_path / "s" / "metrics.jsonl"
    try:
        until = time.monotonic() + 240
        while not file.exists() or len(file.read_text().splitlines()) < 2:
            assert server.poll() is None, (tmp_path / "s.log").read_text()[-3000:]
            assert time.monotonic() < until, (tmp_path / "s.log").read_text()[-3000:]
            time.sleep(0.2)
        crash(nodes[2])  # early in the third round, which has begun
        assert server.wait(300) == 0, (tmp_path / "s.log").read_text()[-3000:]
    finally:
        for process in (*nodes, server):
            process.terminate()
        for process in (*nodes, server):
            process.wait(60)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["clients"] for line in lines] == [3, 3, 2, 2]
    assert [line["missing"] for line in lines][:3] == [0, 0, 1]
    assert not (tmp_path / ".flwr").exists()
    run = {"clients": 3, "rounds": 4, "epochs": 1, "seed": 0, "network": "dense"}
    lab = federated_flower.laboratory(run)
    data = clients.gather(lab.pool, federated_flower.split(run))
    algorithm = algorithms.fedavg(federated_flower.local(run))
    state, key = algorithm.init(lab.params(0), 3), jax.random.key(0)
    for number in range(4):
        cohort = clients.Cohort(
            None, np.arange(3) < (3 if number < 2 else 2), np.ones(3, np.float32)
        )
        state, _ = algorithm.round(state, data, cohort, key=key, number=number)
    saved = Checkpoints(tmp_path / "s" / "checkpoints", keep=2)
    like = algorithms.State(lab.params(1), optax.sgd(1.0).init(lab.params(1)), (), ())
    found = saved.load(4, like)
    saved.close()
    assert toys.far(found.params, state.params) < 1e-5
    assert toys.far(found.params, lab.params(0)) > 0.1
