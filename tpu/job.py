"""What both backends need to know of a run, checked before anything is paid for."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import ClassVar, Literal, NamedTuple

from l4jax.planning import chips
from tpu.flags import libtpu_init_args
from tpu.shell import CommandError

ROOT = pathlib.Path(__file__).resolve().parent.parent

NAME = r"[a-z]([-a-z0-9]{0,30}[a-z0-9])?"
LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
PROJECT = r"([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]"
REGION = r"[a-z]+-[a-z]+\d+"
ZONE = rf"{REGION}-[a-z]"
VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
RULES = {
    NAME: "1 to 32 small letters, digits and '-', beginning with a letter, not ending with '-'",
    LABEL: "1 to 63 small letters, digits and '-', neither beginning nor ending with '-'",
    PROJECT: "a project id such as my-project-123",
    ZONE: "a zone such as us-east5-a",
    VARIABLE: "letters, digits and '_', not beginning with a digit",
}
_SECRET_LIKE = re.compile(
    r"secret|passw(or)?d|passphrase|credential|api_?key|token_?\d*$|(^|_|private)key_?\d*$",
    re.IGNORECASE,
)
_REACHABLE = r"[a-z][a-z0-9+.-]*://.+|/.+"
"""A URL, or an absolute path, where a shared file system may be mounted."""


class UsageError(Exception):
    """Options that are wrong or do not go together."""


class There(NamedTuple):
    """What there is already of a name."""

    capacity: str = ""
    """State of the queued resource, if any."""
    run: Literal["", "going", "ended"] = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run and the slices that it runs on."""

    secret_pattern: ClassVar[str]
    """Of what --secret-env gives as a variable's value."""
    secret_form: ClassVar[str]
    """The same for people."""

    name: str
    """Of the run, its files and what is created for it."""
    topology: str
    """One slice, such as v5p:4x4x4 or v6e:16x16."""
    slices: int = 1
    """Equal slices, joined by the data centre's network."""
    capacity: Literal["on-demand", "spot", "reserved"] = "on-demand"
    """How the chips are paid for; spot ones can be taken away at any time."""
    max_restarts: int = 10
    """Restarts from the last checkpoint after failures; preemptions on GKE don't count."""
    env: tuple[str, ...] = ()
    """NAME=VALUE in the recipe's environment; may be repeated."""
    secret_env: tuple[str, ...] = ()
    """A variable whose value the host fetches itself, so that it is nowhere written down; may be
    repeated. GKE: NAME=KUBERNETES_SECRET:KEY. TPU VMs: NAME=SECRET_MANAGER_SECRET[:VERSION]."""

    def __post_init__(self) -> None:
        """Checks everything.

        Raises:
            UsageError: an option is wrong.
        """
        check("name", self.name, NAME)
        try:
            chips.parse(self.topology, slices=self.slices)
        except ValueError as error:
            raise UsageError(str(error)) from None
        if self.max_restarts < 0:
            raise UsageError(f"max_restarts {self.max_restarts} must not be negative")
        for name in self.variables:
            if _SECRET_LIKE.search(name):
                raise UsageError(f"{name} looks like a secret: use --secret-env, not --env")
        if twice := self.variables.keys() & self.secrets.keys():
            raise UsageError(f"{min(twice)} is given by both --env and --secret-env")

    @property
    def pod(self) -> chips.Topology:
        """The parsed topology."""
        return chips.parse(self.topology, slices=self.slices)

    @property
    def variables(self) -> dict[str, str]:
        """What --env says."""
        return _pairs(self.env)

    @property
    def secrets(self) -> dict[str, re.Match[str]]:
        """What --secret-env says, each value matched with `secret_pattern`.

        Raises:
            UsageError: one has another form. What was given is not repeated: it may be the secret
                itself, and end with "=" as base64 does.
        """
        found: dict[str, re.Match[str]] = {}
        for text in self.secret_env:
            name, _, value = text.partition("=")
            named = value.strip("=") and re.fullmatch(VARIABLE, name, re.ASCII)
            match = re.fullmatch(self.secret_pattern, value, re.ASCII)
            if not named or match is None:
                option = f"secret_env {name}" if named else "secret_env"
                raise UsageError(f"{option} must have the form NAME={self.secret_form}")
            if name in found:
                raise UsageError(f"secret_env {name} is given twice")
            found[name] = match
        return found

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the recipe that are no secret; --env may replace ours."""
        return {"LIBTPU_INIT_ARGS": libtpu_init_args(self.pod), **self.variables}

    def check_idle(self, there: There) -> None:
        """Raises CommandError if a run of this name is still going."""
        if there.run == "going":
            raise CommandError(f"run {self.name} is still going; follow its logs or delete it")


def check(option: str, value: str, pattern: str) -> None:
    """Raises UsageError if a value does not match the whole pattern."""
    if re.fullmatch(pattern, value, re.ASCII) is None:
        raise UsageError(f"{option} {value!r} must be {RULES[pattern]}")


def check_recipe(recipe: tuple[str, ...]) -> None:
    """Refuses what would fail on the pod.

    Args:
        recipe: name of a module of `experiments`, and its arguments.

    Raises:
        UsageError: there is no such recipe, or it has no --out that every host can reach.
    """
    if not recipe:
        raise UsageError("say what to run after `--`: a recipe of experiments/ and its arguments")
    name, *arguments = recipe
    folder = ROOT / "experiments"
    file = folder.joinpath(*name.split("."))
    if not re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)*", name, re.ASCII) or not (
        file.with_suffix(".py").exists() or (file / "__main__.py").exists()
    ):
        files = (f.relative_to(folder).with_suffix("") for f in folder.rglob("*.py"))
        known = sorted(".".join(f.parts) for f in files if not f.name.startswith("_"))
        raise UsageError(f"no recipe {name!r} in experiments/; there are {', '.join(known)}")
    out = ""
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        option, equals, value = argument.partition("=")
        if option == "--out":
            out = value if equals else following
    if re.fullmatch(_REACHABLE, out) is None:
        raise UsageError(
            "give the recipe an --out that every host can reach, such as gs://bucket/run: a "
            "restart looks there for the last checkpoint"
        )


def _pairs(texts: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"env {text!r} must have the form NAME=VALUE")
        check("env name", name, VARIABLE)
        if name in pairs:
            raise UsageError(f"env {name} is given twice")
        pairs[name] = value
    return pairs
