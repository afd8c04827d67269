"""Runs on TPU VMs, got as a queued resource, by gcloud over SSH.

On every host the recipe runs in the background, so that a lost connection doesn't end it. This
process follows the first host; as a dead host ends all others, that one shows every failure.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shlex
import time
from typing import Any, ClassVar

from tpu.job import PROJECT, ROOT, ZONE, Job, There, UsageError, check
from tpu.shell import CommandError, Shell

_RUNTIMES = {"v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
"""https://cloud.google.com/tpu/docs/runtimes; TPU7x is had by GKE only."""
_CODE = ("l4jax", "experiments", "tpu", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
_LOST = ("FAILED", "SUSPENDED", "SUSPENDING", "DELETING")
"""States of a queued resource that never gets, or no longer has, its chips."""
_DISCONNECTED = 255
"""Exit status of ssh itself."""
_SECONDS = 30.0
"""Between two looks at the queue, and before another try to connect."""
_RECONNECT = 5

_INSTALL = """\
set -euo pipefail
mkdir -p {folder}
tar --extract --gzip --file {archive} --directory {folder}
cd {folder}
python3 -m pip install --quiet --user uv
[ -e .venv ] || python3 -m uv venv --quiet --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[tpu]'
"""
_START = """\
#!/usr/bin/env bash
# Starts the recipe on this host, in the background. What still runs of an earlier attempt is ended
# first: it would keep the chips.
set -euo pipefail
cd "$(dirname "$0")"
if [ -e pid ]; then kill -KILL -- "-$(cat pid)" 2>/dev/null || true; fi
if [ -e log ]; then mv log log.before; fi
rm -f status
{exports}
setsid bash -c '"$@"; echo $? > status' recipe {command} "$@" < /dev/null > log 2>&1 &
echo $! > pid
"""
_ALIVE = 'cd {folder} && kill -0 "$(cat pid)" && echo alive'
# A host that was lost meanwhile has neither the process nor its exit status.
_FOLLOW = 'cd {folder} && tail -n +1 --pid="$(cat pid)" -F log; exit "$(cat status || echo 1)"'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Queued(Job):
    """TPU VMs without Kubernetes, by a queued resource."""

    secret_pattern: ClassVar[str] = r"([A-Za-z0-9_-]{1,255})(?::(latest|\d+))?"
    secret_form: ClassVar[str] = "SECRET[:VERSION]"

    project: str
    """Google Cloud project."""
    zone: str
    """Zone of the chips."""
    runtime: str | None = None
    """TPU software version; the generation's own by default."""
    service_account: str | None = None
    """E-mail address of the service account of the VMs."""

    def __post_init__(self) -> None:
        """Checks everything.

        Raises:
            UsageError: an option is wrong.
        """
        super().__post_init__()
        check("project", self.project, PROJECT)
        check("zone", self.zone, ZONE)
        if self.pod.generation.name not in _RUNTIMES:
            raise UsageError(
                f"{self.topology}: queued resources have {', '.join(_RUNTIMES)}; "
                f"{self.pod.generation.name} is had by GKE"
            )
        for option, pattern in (("runtime", r"[\w.-]+"), ("service_account", r"[\w.-]+@[\w.-]+")):
            value = getattr(self, option)
            if value is not None and re.fullmatch(pattern, value, re.ASCII) is None:
                raise UsageError(f"{option} {value!r} has characters that no {option} has")

    @property
    def place(self) -> str:
        """Where the run is; a name means another run elsewhere."""
        return f"queued resources in {self.zone}, project {self.project}"

    @property
    def _nodes(self) -> list[str]:
        """Names of the slices, as gcloud gives them."""
        if self.slices == 1:
            return [self.name]
        return [f"{self.name}-{number}" for number in range(self.slices)]

    @property
    def _folder(self) -> str:
        """Of the code on every host, relative to the home directory."""
        return f"l4jax-{self.name}"

    # --- Capacity ----------------------------------------------------------------------------
    def create(self, shell: Shell) -> bool:
        """Waits for the queued resource, asking for it if need be; whether it did.

        Raises:
            CommandError: it exists with other slices, fails, or a command does.
        """
        return self._acquire(shell, self._state(shell))

    def _acquire(self, shell: Shell, state: str) -> bool:
        if state in _LOST:
            shell.note(f"{self.name} is {state}: asking for it anew")
            self.delete(shell)
            state = ""
        if state:
            shell.note(f"{self.name} is there already")
        else:
            shell.run(*self._request())
        new = not state
        if shell.dry:
            shell.note("wait until its state is ACTIVE")
            return new
        while (seen := self._state(shell)) != "ACTIVE":
            if not seen or seen in _LOST:
                raise CommandError(f"queued resource {self.name} is {seen or 'gone'}")
            if seen != state:
                shell.note(f"{self.name} is {seen}")
            state = seen
            time.sleep(_SECONDS)
        return new

    def _state(self, shell: Shell) -> str:
        """Of the queued resource; empty if there is none."""
        text = shell.ask(*self._resource("describe"), "--format=json")
        if not text:
            return ""
        found = json.loads(text)
        nodes = found["tpu"]["nodeSpec"]
        kind, count = nodes[0]["node"]["acceleratorType"], _count(nodes)
        if (kind, count) != (self.pod.accelerator_type, self.slices):
            raise CommandError(
                f"queued resource {self.name} exists with {count} × {kind}, not {self.slices} × "
                f"{self.pod.accelerator_type}; delete it or take another --name"
            )
        return str(found["state"]["state"])

    def _resource(self, verb: str) -> tuple[str, ...]:
        return (
            *("gcloud", "compute", "tpus", "queued-resources", verb, self.name),
            *(f"--project={self.project}", f"--zone={self.zone}"),
        )

    def _request(self) -> list[str]:
        argv = [
            *self._resource("create"),
            f"--accelerator-type={self.pod.accelerator_type}",
            f"--runtime-version={self.runtime or _RUNTIMES[self.pod.generation.name]}",
        ]
        if self.slices == 1:
            argv.append(f"--node-id={self.name}")
        else:
            argv += [f"--node-count={self.slices}", f"--node-prefix={self.name}"]
        if self.capacity != "on-demand":
            argv.append(f"--{self.capacity}")
        if self.service_account is not None:
            argv.append(f"--service-account={self.service_account}")
        return argv

    # --- Runs --------------------------------------------------------------------------------
    def look(self, shell: Shell) -> There:
        """Finds what there is of this name."""
        state = self._state(shell)
        alive = state == "ACTIVE" and shell.ask(*self._ssh(_ALIVE + " || true"))
        return There(state, "going" if alive else "")

    def run(
        self,
        shell: Shell,
        folder: pathlib.Path,
        recipe: tuple[str, ...],
        there: There,
        resume: bool,
    ) -> None:
        """Runs the recipe on every host and stays until it is done, restarting it as need be.

        Args:
            shell: runs the commands.
            folder: for the code that goes to the hosts.
            recipe: module of `experiments` and its arguments.
            there: what `look` found.
            resume: whether to go on at the last checkpoint; what still goes is followed then.

        Raises:
            CommandError: a run of this name is still going, the recipe keeps failing, or a command
                fails.
        """
        if not resume:
            self.check_idle(there)
        if there.run != "going":
            self._acquire(shell, there.capacity)
            self._install(shell, folder, recipe)
            self._start(shell, resume and "--resume" not in recipe)
        restarts = 0
        while status := self._follow(shell):
            if status == 2:
                raise CommandError("the recipe refuses its arguments (exit status 2)")
            if restarts == self.max_restarts:
                raise CommandError(f"exit status {status} after {restarts} restarts")
            restarts += 1
            shell.note(f"exit status {status}; restart {restarts} of {self.max_restarts}")
            if self.create(shell):
                self._install(shell, folder, recipe)
            self._start(shell, "--resume" not in recipe)

    def _install(self, shell: Shell, folder: pathlib.Path, recipe: tuple[str, ...]) -> None:
        """Copies the code to all hosts and installs it there."""
        archive = f"l4jax-{self.name}.tar.gz"
        shell.write(folder / "start.sh", self._start_script(recipe))
        shell.run(
            *("tar", "--create", "--gzip", f"--file={folder / archive}", "--exclude=__pycache__"),
            *(f"--directory={folder.absolute()}", "start.sh", f"--directory={ROOT}", *_CODE),
        )
        for node in self._nodes:
            shell.run(
                *("gcloud", "compute", "tpus", "tpu-vm", "scp", str(folder / archive), f"{node}:"),
                *("--worker=all", f"--project={self.project}", f"--zone={self.zone}", "--quiet"),
            )
            shell.run(*self._ssh(_INSTALL.replace("{archive}", archive), node, "all"))

    def _start_script(self, recipe: tuple[str, ...]) -> str:
        name, *arguments = recipe
        lines = [f"export {k}={shlex.quote(v)}" for k, v in self.environment.items()]
        for variable, match in self.secrets.items():
            fetch = f"gcloud secrets versions access {match[2] or 'latest'} --secret={match[1]}"
            # Exporting apart from fetching: a failure to fetch must not go unseen.
            lines.append(f'{variable}="$({fetch} --project={self.project})"')
            lines.append(f"export {variable}")
        command = (".venv/bin/python", "-m", f"experiments.{name}", *arguments)
        return _START.format(exports="\n".join(lines), command=shlex.join(command))

    def _start(self, shell: Shell, resume: bool) -> None:
        command = "bash {folder}/start.sh" + (" --resume" if resume else "")
        for node in self._nodes:
            shell.run(*self._ssh(command, node, "all"))

    def _follow(self, shell: Shell) -> int:
        """Shows the first host's output; the recipe's exit status."""
        for _ in range(_RECONNECT):
            status = shell.status(*self._ssh(_FOLLOW))
            if status != _DISCONNECTED:
                break
            time.sleep(_SECONDS)
        return status

    def _ssh(self, command: str, node: str | None = None, worker: str = "0") -> tuple[str, ...]:
        return (
            *("gcloud", "compute", "tpus", "tpu-vm", "ssh", node or self._nodes[0]),
            *(f"--worker={worker}", f"--project={self.project}", f"--zone={self.zone}", "--quiet"),
            f"--command={command.replace('{folder}', self._folder)}",
        )

    def status(self, shell: Shell) -> None:
        """Shows the state of the queued resource and the last lines of output."""
        shell.run(*self._resource("describe"), "--format=value(state.state)")
        shell.run(*self._ssh("tail -n 5 {folder}/log"))

    def logs(self, shell: Shell, slice_index: int, worker: int) -> None:
        """Follows the output of one host."""
        node = self._nodes[slice_index]
        shell.run(*self._ssh("tail -n +1 -F {folder}/log", node, str(worker)))

    def delete(self, shell: Shell) -> None:
        """Ends the run and gives the chips back."""
        shell.run(*self._resource("delete"), "--force", "--quiet")


def _count(nodes: list[dict[str, Any]]) -> int:
    """Slices of a queued resource."""
    many = nodes[0].get("multisliceParams")
    return int(many["nodeCount"]) if many else len(nodes)
