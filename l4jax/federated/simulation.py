"""A federation from its first round to its last: rounds, measurements, checkpoints, resuming.

What comes out depends on the seed, the data and the algorithm alone. Interrupted anywhere and
resumed, a run gives the same numbers, but for the timing. Resuming checks data and settings; that
the algorithm is the same is up to who resumes.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from l4jax import paths
from l4jax.federated.algorithms import Algorithm, State
from l4jax.federated.clients import Cohort, Data, Participation
from l4jax.federated.mapping import place, place_rest


@runtime_checkable
class Checkpoints(Protocol):
    """Where states are kept; `training.checkpointing.Checkpoints` is one."""

    def latest(self) -> int | None:
        """Rounds made by the last one that is whole."""

    def run(self, step: int) -> Mapping[str, Any]:
        """What was saved beside the arrays."""

    def load(self, step: int, state: Any) -> Any:
        """The arrays, in the tree of `state`, whose own are freed."""

    def save(self, step: int, state: Any, run: Mapping[str, Any]) -> Any:
        """Begins to save; says what could not be saved."""

    def settle(self) -> Any:
        """Waits, and says what could not be saved."""


@runtime_checkable
class Tracker(Protocol):
    """Takes a line of metrics; `training.tracking` has some."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Takes the numbers of a round."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run goes."""

    rounds: int
    seed: int = 0
    """Of who takes part and of what clients draw."""
    participation: Participation = Participation()
    evaluate_every: int = 10
    """Rounds between measurements; one more comes at the end."""
    checkpoint_every: int = 50
    """Rounds between checkpoints; one more comes at the end."""

    def __post_init__(self) -> None:
        for name in ("rounds", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")


class Result(NamedTuple):
    """How a run ended. lines: metrics of the rounds that were made here, see `run`."""

    state: State
    lines: list[dict[str, Any]]

    def curve(self, name: str = "accuracy") -> dict[int, float]:
        """A measurement by the number of rounds made."""
        return {line["step"] + 1: line[name] for line in self.lines if name in line}


class NoClients(ValueError):
    """No client of a round came back with numbers. state: as before that round."""

    def __init__(self, message: str, state: State) -> None:
        super().__init__(message)
        self.state = state


def run(
    algorithm: Algorithm,
    params: Any,
    data: Data,
    *,
    settings: Settings,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    checkpoints: Checkpoints | None = None,
    trackers: Sequence[Tracker] = (),
    mesh: Any = None,
) -> Result:
    """Makes the rounds that are to be made.

    A line of metrics for every round has its number as "step", from 0; what `Algorithm.round`
    gives; "bytes_down" to all clients of the round, and "bytes_up" from those that answered; where
    it was measured, what `evaluate` gives; and "seconds".

    Args:
        algorithm: what to do. Runs of one algorithm on data of one shape are compiled once.
        params: to begin with; a checkpoint's replace them.
        data: of all clients.
        settings: how it goes.
        evaluate: a function of the server's parameters.
        checkpoints: to go on from the last one there, and for new ones.
        trackers: take each line.
        mesh: the algorithm's, to lay clients out on.

    Raises:
        ValueError: the checkpoint is of another federation or other settings.
        NoClients: a round has nobody left. What was reached is saved first.
    """
    data = Data(data.pool, *place((data.rows, data.sizes), mesh))
    # Copied, as rounds use their state up.
    state = jax.tree.map(jnp.copy, algorithm.init(params, data.clients))
    # All of it, so that a checkpoint's arrays come back to the devices that a round runs on.
    state = place_rest(state._replace(clients=place(state.clients, mesh)), mesh)
    identity = _identity(settings, data)
    start = None if checkpoints is None else checkpoints.latest()
    if checkpoints is not None and start is not None:
        _check_same(checkpoints.run(start)["config"], identity)
        state = checkpoints.load(start, state)
    step = jax.jit(algorithm.round, donate_argnums=0)
    key, traffic = jax.random.key(settings.seed), algorithm.traffic(params)
    lines: list[dict[str, Any]] = []

    def save(number: int) -> None:
        if checkpoints is not None:
            checkpoints.save(number, state, {"config": identity, "metrics": lines[-1:]})

    for number in range(start or 0, settings.rounds):
        begun = time.perf_counter()
        cohort = settings.participation.draw(data.clients, number, seed=settings.seed)
        state, found = step(state, data, cohort, key=key, number=number)
        line = {"step": number, **{name: x.item() for name, x in jax.device_get(found).items()}}
        if not line["clients"]:
            save(number)
            _settle(checkpoints)
            raise NoClients(_nobody(number, cohort, line), state)
        line["bytes_down"] = traffic.down * len(cohort.alive)
        line["bytes_up"] = traffic.up * int(cohort.alive.sum())
        last = number + 1 == settings.rounds
        if evaluate is not None and (last or (number + 1) % settings.evaluate_every == 0):
            line |= evaluate(state.params)
        line["seconds"] = time.perf_counter() - begun
        lines.append(line)
        for tracker in trackers:
            tracker.log(line)
        if last or (number + 1) % settings.checkpoint_every == 0:
            save(number + 1)
    _settle(checkpoints)
    return Result(state, lines)


def _identity(settings: Settings, data: Data) -> dict[str, Any]:
    """What must be the same when a run is resumed."""
    kept = dataclasses.asdict(settings)
    for name in ("rounds", "evaluate_every", "checkpoint_every"):
        kept.pop(name)
    return json.loads(json.dumps({"settings": kept, "data": data.description()}))


def _check_same(then: Any, now: Any) -> None:
    changed = list(paths.differences(then, now))
    if changed:
        raise ValueError(f"the checkpoint is of another run: {'; '.join(changed)}")


def _settle(checkpoints: Checkpoints | None) -> None:
    """Waits for the last checkpoint.

    Raises:
        OSError: it could not be written.
    """
    failure = None if checkpoints is None else checkpoints.settle()
    if failure:
        raise OSError(f"the last checkpoint could not be written: {failure}")


def _nobody(number: int, cohort: Cohort, line: Mapping[str, Any]) -> str:
    count, answered = len(cohort.alive), int(cohort.alive.sum())
    return (
        f"round {number}: none of its {count} clients is left ({count - answered} never answered, "
        f"{line['excluded']} sent numbers that are not finite); parameters and server are as before"
    )
