"""The digits of `federated_vision` with clients in processes or on machines of their own: Flower.

    python -m experiments.federated_flower                      # the server: waits for two clients
    python -m experiments.federated_flower --role client --number 0         # each client
    python -m experiments.federated_flower --role client --number 1

On several machines, each with this repository and `pip install 'l4jax[federated]'`, traffic must be
encrypted. A folder has `ca.crt`, `server.pem`, `server.key` for the server; clients need `ca.crt`:

    openssl req -x509 -newkey rsa:4096 -nodes -days 365 -keyout ca.key -out ca.crt -subj /CN=l4jax
    openssl req -newkey rsa:4096 -nodes -keyout server.key -out server.csr -subj /CN=HOST
    echo subjectAltName=DNS:HOST,IP:127.0.0.1 > names
    openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 \
        -extfile names -out server.pem

    python -m experiments.federated_flower --host 0.0.0.0 --tls DIR
    python -m experiments.federated_flower --role client --number 0 --host HOST --tls DIR

Whoever may reach the server's port may start runs there, and a client does what the server's app
says: Flower's `--enable-supernode-auth` and `--trusted-entities` are for networks that are not your
own. Each round starts processes: give a client minutes of work in it.

Trains by FedAvg on clients of two digits each, or of more where they are fewer than five. The
server ends when the rounds are made; it writes `metrics.jsonl`, a line for each round, and
`checkpoints`, from which --resume goes on, with more --rounds if asked. What runs is `app/`, a
Flower app that it writes there: begin your own with a copy. A client is ended by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import ipaddress
import json
import os
import pathlib
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from experiments import console, federated_lab
from l4jax.federated import flower, partition, simulation
from l4jax.federated.local import Local
from l4jax.training import checkpointing, tracking

ROOT = pathlib.Path(__file__).resolve().parent.parent
APP = """\"\"\"What Flower loads on the server and at each client.\"\"\"

from experiments import federated_flower
from l4jax.federated import flower

server = flower.server_app(federated_flower.serve)
client = flower.client_app(federated_flower.join)
"""
PROJECT = """[project]
name = "digits"
version = "1.0.0"
license = "Apache-2.0"
dependencies = ["l4jax[federated]"]

[tool.flwr.app]
publisher = "l4jax"

[tool.flwr.app.components]
serverapp = "app:server"
clientapp = "app:client"

[tool.flwr.app.config]
"""


FREE = frozenset(
    ("resume", "out", "role", "host", "port", "tls", "number", "node_port", "rounds", "timeout")
)
"""Leaves that may change when a run is resumed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Leaves of the command line."""

    role: Literal["server", "client"] = "server"
    out: pathlib.Path = pathlib.Path("runs/federated_flower")
    host: str = "127.0.0.1"
    """Where the server listens, or where a client finds it."""
    port: int = 18080
    """Of the server."""
    tls: pathlib.Path | None = None
    """Folder of certificates; without it only this machine can be served."""
    number: int = 0
    """Of a client, from 0; it must be its own."""
    node_port: int | None = None
    """That a client's processes talk to each other by; by default 18090 and its number."""
    resume: bool = False
    """Go on with the rounds that `out` has."""
    clients: int = 2
    """That the server waits for; the digits are split among so many."""
    rounds: int = 3
    epochs: int = 1
    seed: int = 0
    network: Literal["small", "dense"] = "dense"
    timeout: float = 600.0
    """Seconds that a round waits for its clients."""

    def __post_init__(self) -> None:
        if self.clients < 1 or self.rounds < 1 or self.epochs < 1:
            raise ValueError(
                f"clients {self.clients}, rounds {self.rounds} and epochs {self.epochs} must be "
                "at least 1"
            )
        if self.number < 0 or not 0 < self.port < 1 << 16 or not self.timeout > 0:
            raise ValueError(
                f"number {self.number} must not be negative, port {self.port} be one, and timeout "
                f"{self.timeout:g} above 0"
            )
        if not self.tls and not _loopback(self.host):
            raise ValueError(f"host {self.host}: other machines need --tls DIR")


# --- What runs -----------------------------------------------------------------------------------
def serve(run: Mapping[str, Any]) -> flower.Server:
    """The server of a run."""
    out, lab = pathlib.Path(run["out"]), laboratory(run)
    saved = checkpointing.Checkpoints(out / "checkpoints", keep=2)
    lines = tracking.Lines(out / "metrics.jsonl", below=saved.latest() or 0)
    return flower.Server(
        params=lab.params(run["seed"]),
        local=local(run),
        settings=settings(run),
        clients=run["clients"],
        timeout=float(run["timeout"]),
        evaluate=lab.accuracy,
        checkpoints=saved,
        trackers=[_Told(lines)],
    )


def join(run: Mapping[str, Any], node: Mapping[str, Any]) -> flower.Site:
    """A client of a run."""
    lab, number = laboratory(run), node["partition-id"]
    parts = split(run)
    if not 0 <= number < len(parts):
        raise ValueError(f"client {number}: there are {len(parts)}, counted from 0")
    return flower.Site(
        number=number,
        pool={name: x[parts[number]] for name, x in lab.pool.items()},
        local=local(run),
        params=lab.params(0),
    )


def laboratory(run: Mapping[str, Any]) -> federated_lab.Lab:
    """Data and network of a run."""
    return _laboratory(run["clients"], run["network"])


@functools.cache
def _laboratory(clients: int, network: Any) -> federated_lab.Lab:
    return federated_lab.Lab(federated_lab.Settings(clients=clients, network=network))


def split(run: Mapping[str, Any]) -> Sequence[Any]:
    """Rows of each client: those of two digits, or of more where clients are few."""
    lab, clients = laboratory(run), run["clients"]
    rows, each = lab.examples.train, max(2, -(-10 // clients))
    parts = partition.classes(lab.examples.y[rows], clients, each=each, seed=run["seed"])
    return [rows[part] for part in parts]


def local(run: Mapping[str, Any]) -> Local:
    """What a client does in a round."""
    values = federated_lab.VALUES["digits"]
    return Local(
        loss=laboratory(run).loss,
        rate=lambda number: values.rate * values.decay**number,
        batch=values.batch,
        epochs=run["epochs"],
    )


def settings(run: Mapping[str, Any]) -> simulation.Settings:
    """Of the rounds."""
    return simulation.Settings(
        rounds=run["rounds"], seed=run["seed"], evaluate_every=1, checkpoint_every=1
    )


class _Told:
    """Writes each line, and says it in the log."""

    def __init__(self, lines: tracking.Lines) -> None:
        self._lines = lines

    def log(self, line: Mapping[str, Any]) -> None:
        """Takes a line."""
        self._lines.write(line)
        flower.LOG.info("%s", json.dumps(line))


# --- Flower's programs ---------------------------------------------------------------------------
def run(settings: Settings) -> None:
    if settings.role == "client":
        _client(settings)
    else:
        _server(settings)


def _server(s: Settings) -> None:
    """Serves one run."""
    federated_lab.begin(s, free=FREE)
    home, app = _home(s), s.out / "app"
    for folder in (home, app):
        folder.mkdir(parents=True, exist_ok=True)
    checkpointing.write(app / "app.py", APP)
    checkpointing.write(app / "pyproject.toml", PROJECT + _toml(_configuration(s)))
    place = "127.0.0.1" if s.host == "0.0.0.0" else s.host
    link: dict[str, Any] = {"address": f"{place}:{s.port}", "insecure": s.tls is None}
    security = ["--insecure"]
    if s.tls is not None:
        tls = s.tls.resolve()
        link["root-certificates"] = str(tls / "ca.crt")
        files = {"ca-certfile": "ca.crt", "certfile": "server.pem", "keyfile": "server.key"}
        security = [f"--ssl-{name}={tls / file}" for name, file in files.items()]
    text = f'[superlink]\ndefault = "here"\n\n[superlink.here]\n{_toml(link)}'
    checkpointing.write(home / "config.toml", text)
    listen = [f"--host={s.host}", f"--port={s.port}", "--disable-runtime-dependency-installation"]
    with _program("flower-superlink", [*security, *listen], s) as superlink:
        _start(s, app, superlink)


def _start(s: Settings, app: pathlib.Path, superlink: subprocess.Popen) -> None:
    """Submits the run as soon as the server listens, and follows it to its end."""
    command = [_where("flwr"), "run", str(app.resolve()), "here", "--stream"]
    for _ in range(30):
        if superlink.poll() is not None:
            raise OSError(f"flower-superlink ended at once, with status {superlink.returncode}")
        done = subprocess.run(command, env=_environment(s), cwd=s.out, check=False)
        if done.returncode == 0:
            break
        time.sleep(1)
    made = len(tracking.read(s.out / "metrics.jsonl"))
    if made < s.rounds:
        raise ValueError(f"the run ended after {made} of {s.rounds} rounds; its log says why")


def _client(s: Settings) -> None:
    """Serves as a client until it is ended."""
    security = ["--insecure"]
    if s.tls is not None:
        security = [f"--root-certificates={s.tls.resolve() / 'ca.crt'}"]
    port = 18090 + s.number if s.node_port is None else s.node_port
    options = [f"--superlink={s.host}:{s.port}", f"--port={port}"]
    node = [f"--node-config=partition-id={s.number}"]
    _home(s).mkdir(parents=True, exist_ok=True)
    with _program("flower-supernode", [*security, *options, *node], s) as supernode:
        status = supernode.wait()
        raise OSError(f"flower-supernode ended with status {status}")


@contextlib.contextmanager
def _program(name: str, options: Sequence[str], s: Settings) -> Iterator[subprocess.Popen]:
    """One of Flower's programs, which ends with what it has started."""
    command = [_where(name), *options]
    # A group of its own: Flower's programs start others, which must not outlive them.
    process = subprocess.Popen(command, env=_environment(s), cwd=s.out, start_new_session=True)
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)


def _home(s: Settings) -> pathlib.Path:
    """Where Flower keeps its own files: each program has a place."""
    return s.out / ("flower" if s.role == "server" else f"flower-{s.number}")


def _where(name: str) -> str:
    """A program of this Python's environment."""
    file = pathlib.Path(sysconfig.get_path("scripts")) / name
    if not file.exists():
        raise ValueError(f"{name} is not there: pip install 'l4jax[federated]'")
    return str(file)


def _environment(s: Settings) -> dict[str, str]:
    found = flower.environment(_home(s))
    known = [str(ROOT), *filter(None, [found.get("PYTHONPATH")])]
    # Each round is a new process: what one compiles, the next ones read.
    compiled = {"JAX_COMPILATION_CACHE_DIR": str((s.out / "compiled").resolve())}
    # Flower's programs start others by their names.
    programs = [sysconfig.get_path("scripts"), *filter(None, [found.get("PATH")])]
    paths = {"PYTHONPATH": os.pathsep.join(known), "PATH": os.pathsep.join(programs)}
    return {**compiled, **found, **paths}


def _configuration(s: Settings) -> dict[str, Any]:
    """What server and clients must agree on."""
    names = ("clients", "rounds", "epochs", "seed", "network", "timeout")
    return {"out": str(s.out.resolve()), **{name: getattr(s, name) for name in names}}


def _toml(values: Mapping[str, Any]) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def _loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


if __name__ == "__main__":
    sys.exit(console.main(Settings, run, __doc__, "federated_flower"))
