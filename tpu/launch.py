"""Runs any recipe on a TPU pod: `python -m tpu.launch VERB …`.

python -m tpu.launch run gke --name scout --topology v5p:4x4x4 --image IMAGE \\
    -- pretrain --preset llama4-scout --out gs://bucket/scout

What stands after `--` is run as `python -m experiments.pretrain …` on every host. With --dry-run
nothing happens: all commands and manifests are printed instead, as a script. Exit status: 0 done, 1
failed, 2 bad usage.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from tpu.job import NAME, UsageError, check, check_recipe
from tpu.jobset import Gke
from tpu.queued import Queued
from tpu.shell import CommandError, Shell

BACKENDS = {"gke": Gke, "queued": Queued}
Recipe = tuple[str, ...]
Target = (
    Annotated[Gke, tyro.conf.subcommand("gke", prefix_name=False)]
    | Annotated[Queued, tyro.conf.subcommand("queued", prefix_name=False)]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verb:
    """What every verb has."""

    dry_run: bool = False
    """Print what would be done, as a script, and do nothing."""
    folder: pathlib.Path = pathlib.Path("runs/tpu")
    """Where every run has a folder, with its manifest and what it was started with."""

    def act(self, shell: Shell, recipe: Recipe) -> None:
        """Does it."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Create(Verb):
    """Get the chips, or find that they are there already."""

    target: Annotated[Target, tyro.conf.arg(name="")]
    """Where."""

    def act(self, shell: Shell, recipe: Recipe) -> None:
        """Creates, and remembers how; the recipe that was run stays known."""
        before, known = _before(self.folder, self.target)
        if before is not None and before != self.target:
            # The other verbs would take what is going for what is asked for now.
            self.target.check_idle(self.target.look(shell))
        _remember(shell, self.folder, self.target, known)
        self.target.create(shell)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Verb):
    """Get the chips if need be and run a recipe: what stands after `--`."""

    target: Annotated[Target, tyro.conf.arg(name="")]
    """Where."""

    def act(self, shell: Shell, recipe: Recipe) -> None:
        """Runs, and remembers what."""
        check_recipe(recipe)
        _before(self.folder, self.target)
        there = self.target.look(shell)
        self.target.check_idle(there)
        _remember(shell, self.folder, self.target, recipe)
        self.target.run(shell, self.folder / self.target.name, recipe, there, resume=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Known(Verb):
    name: Annotated[str, tyro.conf.Positional]
    """Of a run that was created or started here."""

    def recall(self) -> tuple[Gke | Queued, Recipe]:
        """What the run was started with.

        Raises:
            UsageError: there is no such run, or its file is damaged.
        """
        check("name", self.name, NAME)
        file = _file(self.folder, self.name)
        if not file.exists():
            known = sorted(f.parent.name for f in self.folder.glob(f"*/{file.name}"))
            raise UsageError(
                f"no run {self.name!r} in {self.folder}; there are: {', '.join(known) or 'none'}"
            )
        return _read(file)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status(_Known):
    """Tell how a run is."""

    def act(self, shell: Shell, recipe: Recipe) -> None:
        """Shows it."""
        self.recall()[0].status(shell)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logs(_Known):
    """Follow the output of one host."""

    slice: int = 0
    """Number of the slice."""
    worker: int = 0
    """Number of the host in its slice."""

    def act(self, shell: Shell, recipe: Recipe) -> None:
        """Follows it."""
        target, _ = self.recall()
        for option, number, end in (
            ("slice", self.slice, target.slices),
            ("worker", self.worker, target.pod.hosts_per_slice),
        ):
            if not 0 <= number < end:
                raise UsageError(f"{option} {number} must be from 0 to {end - 1}")
        target.logs(shell, self.slice, self.worker)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resume(_Known):
    """Run again what was run, from its last checkpoint."""

    def act(self, shell: Shell, recipe: Recipe) -> None:
        """Runs it with `--resume`."""
        target, recipe = self.recall()
        if not recipe:
            raise UsageError(f"{self.name} has run no recipe yet: use run")
        target.run(shell, self.folder / self.name, recipe, target.look(shell), resume=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delete(_Known):
    """End a run and give back the chips that were created for it."""

    def act(self, shell: Shell, recipe: Recipe) -> None:
        """Deletes; the local folder stays."""
        self.recall()[0].delete(shell)


VERBS: dict[str, Any] = {
    "create": Create,
    "run": Run,
    "status": Status,
    "logs": Logs,
    "resume": Resume,
    "delete": Delete,
}


def _file(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / name / "launch.json"


def _read(file: pathlib.Path) -> tuple[Gke | Queued, Recipe]:
    """What `_remember` wrote; raises UsageError if that is something else."""
    try:
        values = json.loads(file.read_text())
        if not _is(values, dict) or not values.keys() >= {"backend", "job", "recipe"}:
            raise ValueError("it has no backend, job and recipe")
        kind = BACKENDS.get(str(values["backend"]))
        if kind is None:
            raise ValueError(f"backend {values['backend']!r} must be {' or '.join(BACKENDS)}")
        if not _is(values["job"], dict) or not _is(values["recipe"], Recipe):
            raise ValueError("job must be an object, recipe a list of texts")
        target = kind(**_options(kind, values["job"]))
    except (TypeError, ValueError, UsageError) as error:
        raise UsageError(f"{file} is damaged: {error}") from None
    if target.name != file.parent.name:
        raise UsageError(f"{file} is damaged: it is of run {target.name!r}")
    return target, tuple(values["recipe"])


def _options(kind: type[Gke | Queued], values: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a target, from JSON; raises ValueError if one has another type."""
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name in hints and not _is(value, hints[name]):
            raise ValueError(f"{name} cannot be {value!r}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _is(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of a type that targets have."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint == Recipe:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    return isinstance(value, hint)


def _before(folder: pathlib.Path, target: Gke | Queued) -> tuple[Gke | Queued | None, Recipe]:
    """What is remembered of a target's name, if anything.

    Raises:
        UsageError: it is elsewhere, where it would be forgotten with all that is paid for it.
    """
    file = _file(folder, target.name)
    if not file.exists():
        return None, ()
    before, recipe = _read(file)
    if before.place != target.place:
        raise UsageError(
            f"run {target.name} is in {before.place}: take another --name, or delete it and remove "
            f"{file}"
        )
    return before, recipe


def _remember(shell: Shell, folder: pathlib.Path, target: Gke | Queued, recipe: Recipe) -> None:
    """Keeps what the other verbs will need; secrets are names only."""
    backend = next(name for name, kind in BACKENDS.items() if isinstance(target, kind))
    values = {"backend": backend, "job": dataclasses.asdict(target), "recipe": recipe}
    shell.write(_file(folder, target.name), json.dumps(values, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own, recipe = arguments[:end], tuple(arguments[end + 1 :])
    try:
        verb = tyro.extras.subcommand_cli_from_dict(
            VERBS,
            prog="python -m tpu.launch",
            description="Runs any recipe of experiments/ on a TPU pod.",
            args=own,
            config=(
                tyro.conf.FlagCreatePairsOff,
                tyro.conf.UseAppendAction,
                tyro.conf.CascadeSubcommandArgs,
                tyro.conf.OmitArgPrefixes,
            ),
        )
        if recipe and not isinstance(verb, Run):
            raise UsageError("only run takes a recipe after `--`")
        verb.act(Shell(dry=verb.dry_run), recipe)
    except KeyboardInterrupt:
        print("launch: interrupted", file=sys.stderr)
        return 130
    except (UsageError, CommandError, OSError) as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
