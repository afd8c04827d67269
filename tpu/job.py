"""What both backends need to know of a run, checked before anything is paid for."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Literal

from l4jax.planning import chips
from tpu.flags import libtpu_init_args

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
_SECRET_LIKE = re.compile(r"token|secret|password|passwd|credential|api_?key", re.IGNORECASE)


class UsageError(Exception):
    """Options that are wrong or do not go together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run and the slices that it runs on."""

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
        if twice := self.variables.keys() & _pairs("secret_env", self.secret_env).keys():
            raise UsageError(f"{min(twice)} is given by both --env and --secret-env")

    @property
    def pod(self) -> chips.Topology:
        """The parsed topology."""
        return chips.parse(self.topology, slices=self.slices)

    @property
    def variables(self) -> dict[str, str]:
        """What --env says."""
        return _pairs("env", self.env)

    def secrets(self, value: str, meaning: str) -> dict[str, re.Match[str]]:
        """What --secret-env says, each value matched with the pattern `value`.

        Raises:
            UsageError: one has another form; `meaning` is the right one.
        """
        found = {}
        for name, text in _pairs("secret_env", self.secret_env).items():
            match = re.fullmatch(value, text)
            if match is None:
                # The text is not repeated: it may be the secret itself, given by mistake.
                raise UsageError(f"secret_env {name} must have the form NAME={meaning}")
            found[name] = match
        return found

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the recipe that are no secret; --env may replace ours."""
        return {"LIBTPU_INIT_ARGS": libtpu_init_args(self.pod), **self.variables}


def check(option: str, value: str, pattern: str) -> None:
    """Raises UsageError if a value does not match the whole pattern."""
    if re.fullmatch(pattern, value, re.ASCII) is None:
        raise UsageError(f"{option} {value!r} must be {RULES[pattern]}")


def check_recipe(recipe: tuple[str, ...]) -> None:
    """Refuses what would fail on the pod.

    Args:
        recipe: name of a module of `experiments`, and its arguments.

    Raises:
        UsageError: there is no such recipe, or it has no --out.
    """
    if not recipe:
        raise UsageError("say what to run after `--`: a recipe of experiments/ and its arguments")
    name, *arguments = recipe
    folder = ROOT / "experiments"
    file = folder.joinpath(*name.split("."))
    if not re.fullmatch(rf"{VARIABLE}(\.{VARIABLE})*", name, re.ASCII) or not (
        file.with_suffix(".py").exists() or (file / "__main__.py").exists()
    ):
        files = (f.relative_to(folder).with_suffix("") for f in folder.rglob("*.py"))
        known = sorted(".".join(f.parts) for f in files if not f.name.startswith("_"))
        raise UsageError(f"no recipe {name!r} in experiments/; there are {', '.join(known)}")
    if not any(argument.split("=")[0] == "--out" for argument in arguments):
        raise UsageError(
            "give the recipe an --out that every host can reach, such as gs://bucket/run: a "
            "restart looks there for the last checkpoint"
        )


def _pairs(option: str, texts: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"{option} {text!r} must have the form NAME=VALUE")
        check(f"{option} name", name, VARIABLE)
        if name in pairs:
            raise UsageError(f"{option} {name} is given twice")
        pairs[name] = value
    return pairs
