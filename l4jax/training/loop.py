"""The loop of every recipe: it trains, writes down, saves, goes on where it was, and goes back.

Steps count from 0 in lines of metrics; a checkpoint's number is how many updates were made. What a
run computes depends on its settings and data alone: killed at any moment and resumed, it writes the
same lines as it would have, but for the timing (`tracking.TIMING`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from etils import epath
from rich.console import Console

from l4jax.paths import differences
from l4jax.training import tracking
from l4jax.training.checkpointing import Checkpoints, Failure, fingerprints
from l4jax.training.hooks import Hook, Moment, profile
from l4jax.training.signals import SAVE, STOP, Agreed, signals
from l4jax.training.trainer import Batch, State, Training, spread

FREE = frozenset(
    ("out", "resume", "export", "mesh", "workers", "keep", "keep_best", "checkpoint_every")
) | frozenset(
    ("checkpoint_minutes", "evaluate_every", "on_nonfinite", "profile_at", "tensorboard", "wandb")
)
"""Names of configuration leaves, and of whole sections, that may change when a run is resumed."""
PATIENCE = 100
"""Updates in a row that may be skipped before a run gives up."""
_CHUNK = 1024
"""Steps whose learning rates are computed together, so that the device is asked once for them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run goes."""

    steps: int
    """Updates in all."""
    checkpoint_every: int | None = 500
    """Steps between checkpoints; one more comes at the end, and when the run is stopped."""
    checkpoint_minutes: float | None = None
    """Most minutes between checkpoints."""
    keep: int = 2
    """How many of the last checkpoints stay."""
    keep_best: str | None = None
    """The checkpoint where this metric (such as eval_loss) is smallest stays too; with "-" before
    the name, where it is largest."""
    evaluate_every: int | None = None
    """Steps between evaluations, of recipes that hold data out."""
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """What to do where the loss or the gradient is not finite: go on with the next batch, the
    parameters left as they were, or end the run."""
    spike: float | None = None
    """Standard deviations above the mean of the last losses from which on a loss is a spike. The
    run then goes back to its last checkpoint that came by `checkpoint_every`, and on with the batch
    after the spike's (Chowdhery et al. 2022, PaLM, §5.1)."""
    spike_window: int = 100
    """Losses that this mean and deviation are of."""
    rewinds: int = 3
    """How often a run goes back at most; later spikes are only logged."""
    profile_at: int | None = None
    """Step from which on three updates are profiled."""
    tensorboard: bool = False
    """Whether to write event files for TensorBoard."""
    wandb: str | None = None
    """Project on Weights & Biases."""

    def __post_init__(self) -> None:
        for name in ("steps", "checkpoint_every", "evaluate_every", "profile_at", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        for name in ("checkpoint_minutes", "spike"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} {value} must be above 0")
        if self.spike_window < 2:
            raise ValueError(f"spike_window {self.spike_window} must be at least 2")
        if self.spike is not None and self.checkpoint_every is None:
            raise ValueError("spike needs checkpoint_every: there would be nothing to go back to")


class Result(NamedTuple):
    """How a run ended.

    step: updates made. last: the last line of metrics; empty in processes other than the first.
    """

    step: int
    ended: Literal["finished", "stopped", "out of data"]
    last: dict[str, Any]


class Diverged(RuntimeError):
    """The loss or the gradient is not finite, and the settings say to stop."""


@dataclasses.dataclass
class _Seen:
    """What the loop remembers of the lines so far; it is in every checkpoint."""

    applied: int = 0
    """Updates that were not skipped: what the schedule counts."""
    skipping_since: int | None = None
    rewinds: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)


class _Pending(NamedTuple):
    """A step whose metrics are still on the device."""

    step: int
    metrics: Mapping[str, jax.Array]
    begun: float
    shape: tuple[int, int] | None


def fit(
    training: Training,
    batches: Iterable[Batch],
    out: epath.PathLike,
    *,
    settings: Settings,
    schedule: optax.Schedule | None = None,
    hooks: Sequence[Hook] = (),
    resume: bool = False,
    console: Console | None = None,
) -> Result:
    """Trains to the end, or until the process is told to stop (SIGTERM, Ctrl-C).

    Under `out` it writes `metrics.jsonl`, a line for each step as soon as it is known;
    `events.jsonl`, what was out of the ordinary; `checkpoints/STEP`; and `tensorboard/`. What it
    finds there as `config.json` goes into every checkpoint, and a run that is resumed must have the
    same, but for `FREE`.

    Args:
        training: what to train; its state is replaced by a checkpoint's on resuming. Frozen
            parameters are not in checkpoints: make them as the first run did.
        batches: its iterator has `get_state()` and `set_state(…)`, as those of Grain have. Of
            several processes each gives its own rows (`distributed.local_rows`) of the same
            batches.
        out: made if missing; a gs:// address too. All processes must reach it.
        settings: how the run goes.
        schedule: learning rate by update, to be written down.
        hooks: see `hooks`.
        resume: go on after the last checkpoint in `out`, if there is one.
        console: for progress, if it is a terminal, and events; standard error by default.

    Raises:
        ValueError: `out` holds a run and `resume` is false; or what is resumed differs in
            configuration, arrays or frozen parameters; or the batches cannot say where they are.
        Diverged: see `Settings.on_nonfinite`.
    """
    console = console or Console(stderr=True)
    with contextlib.ExitStack() as stack:
        run = _Run(training, batches, epath.Path(out), settings, schedule, console)
        stack.callback(run.close)
        run.begin(hooks, resume=resume)
        stack.enter_context(signals(run.told))
        return run.go()


class _Run:
    """The state of `fit` and its parts."""

    def __init__(
        self,
        training: Training,
        batches: Iterable[Batch],
        out: epath.Path,
        settings: Settings,
        schedule: optax.Schedule | None,
        console: Console,
    ) -> None:
        if settings.on_nonfinite == "skip" and not training.update.guard:
            raise ValueError("on_nonfinite 'skip' needs a Training with guard=True")
        self.training, self.out, self.settings, self.console = training, out, settings, console
        self.data: Any = iter(batches)
        if not hasattr(self.data, "get_state"):
            raise ValueError(
                f"{type(self.data).__name__} has no get_state: batches must say where they are, as "
                "Grain's iterators do, or the run could not be resumed"
            )
        self.step, self.seen, self.last = 0, _Seen(), dict[str, Any]()
        self.pending: _Pending | None = None
        self.first = jax.process_index() == 0
        self.told, self.agreed = threading.Event(), Agreed()
        self.rates = _Rates(schedule)
        self.lines: list[tracking.Lines] = []
        self.trackers: list[tracking.Tracker] = []
        self.model = training.model.config
        self.checkpoints = Checkpoints(
            out / "checkpoints",
            keep=settings.keep,
            keep_best=settings.keep_best,
            every=settings.checkpoint_every,
        )
        self.saved_at = time.monotonic()
        self.frozen: dict[str, int] = {}
        self.hooks: list[Hook] = []

    # --- Beginning and end -----------------------------------------------------------------------
    def begin(self, hooks: Sequence[Hook], *, resume: bool) -> None:
        """Takes up the last checkpoint, if there is one, and opens the files."""
        settings, file = self.settings, self.out / "config.json"
        given = json.loads(file.read_text()) if self.first and file.exists() else {}
        self.config = given or {"settings": json.loads(json.dumps(dataclasses.asdict(settings)))}
        self.frozen = fingerprints(self.training.update.parts(self.training.state.params)[1])
        start = self.checkpoints.latest()
        if start is not None:
            if not resume:
                raise ValueError(
                    f"{self.out}: holds a run of {start} steps; resume it, or choose another folder"
                )
            self._check_same(start)
            self._load(start)
        self.hooks = list(hooks)
        if settings.profile_at:
            self.hooks.append(profile(str(self.out / "profile"), after=settings.profile_at))
        if not self.first:
            return
        file = self.out / "metrics.jsonl"
        if start:
            before = [line for line in tracking.read(file) if line["step"] < start]
            self.last = before[-1] if before else {}
        self.lines = [
            tracking.Lines(file, below=self.step),
            tracking.Lines(self.out / "events.jsonl", below=None if start else 0),
        ]
        if settings.tensorboard:
            folder = str(self.out / "tensorboard")
            self.trackers.append(tracking.TensorBoard(folder, step=self.step))
        if settings.wandb:
            name = f"{self.out.name}-{hashlib.sha256(str(self.out).encode()).hexdigest()[:8]}"
            self.trackers.append(
                tracking.WandB(settings.wandb, name=name, folder=str(self.out), config=self.config)
            )
        if start:
            self._event("resume", f"going on after {start} steps")
        if self.console.is_terminal:
            self.trackers.append(tracking.Bar(self.console, settings.steps, self.step))

    def go(self) -> Result:
        """Trains to the end."""
        ended: Literal["finished", "stopped", "out of data"] = "finished"
        while self.step < self.settings.steps:
            batch = next(self.data, None)
            if batch is None:
                if self._settle(()):
                    ended = "out of data"
                    break
                continue
            self._update(batch)
            if self.agreed.found == STOP:
                ended = "stopped"
                break
        self._save()
        self._report(self.checkpoints.close())
        if self.first and self.step not in self.checkpoints.steps():
            raise OSError(
                f"step {self.step} could not be saved; the last checkpoint in {self.out} is of "
                f"step {self.checkpoints.latest()}"
            )
        if ended != "finished":
            self._event(ended, f"ended after {self.step} steps: {ended}")
        return Result(self.step, ended, self.last)

    def close(self) -> None:
        """Waits for a checkpoint that is being written, and closes the files."""
        self._report(self.checkpoints.close())
        for lines in self.lines:
            lines.close()
        for tracker in self.trackers:
            tracker.close()
        if hasattr(self.data, "close"):
            self.data.close()  # threads that read ahead

    # --- Steps -----------------------------------------------------------------------------------
    def _update(self, batch: Batch) -> None:
        """One update, and what is due after it; meanwhile the one before is written down."""
        batch = spread(batch)
        begun = time.perf_counter()
        metrics = self.training.step(batch)
        tokens = batch.get("tokens")
        shape = None if tokens is None else (tokens.size, tokens.shape[1])
        late, self.pending = self.pending, _Pending(self.step, metrics, begun, shape)
        self.step += 1
        if late is not None and not self._read(late, begun - late.begun, ()):
            return
        self._report(self.checkpoints.settle(wait=False))
        last, every = self.step == self.settings.steps, self.settings.checkpoint_every
        wish = self.agreed.ask(self._wish())
        due = [hook for hook in self.hooks if hook.due(self.step, last)]
        save = wish or every is not None and self.step % every == 0
        if (due or save or last) and self._settle(due) and save:
            self._save()

    def _wish(self) -> int:
        """What this process wants."""
        minutes = self.settings.checkpoint_minutes
        if self.told.is_set():
            return STOP
        late = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
        return SAVE if late else 0

    def _settle(self, due: Sequence[Hook]) -> bool:
        """Waits for the last step; whether it stands."""
        pending, self.pending = self.pending, None
        if pending is None:
            return True
        jax.block_until_ready(pending.metrics)
        return self._read(pending, time.perf_counter() - pending.begun, due)

    def _read(self, pending: _Pending, seconds: float, due: Sequence[Hook]) -> bool:
        """Writes down a step; False if the run has gone back before it."""
        scalars = {name: x for name, x in pending.metrics.items() if x.ndim == 0}
        found = {name: x.item() for name, x in jax.device_get(scalars).items()}
        line = {"step": pending.step, "loss": found.pop("loss"), "grad_norm": found["grad_norm"]}
        if (rate := self.rates(self.seen.applied)) is not None:
            line["learning_rate"] = rate
        line |= {name: found[name] for name in sorted(found)}
        if not self._stands(line):
            return False
        for hook in due:
            line |= hook.call(Moment(self.training, self.step, self.out)) or {}
        line["seconds"] = seconds
        if pending.shape is not None:
            tokens, length = pending.shape
            line["tokens_per_second"] = tokens / seconds
            mfu = tracking.utilization(self.model, length, tokens / seconds)
            line |= {} if mfu is None else {"mfu": mfu}
        if self.first:
            self.last = {name: tracking.plain(x) for name, x in line.items()}
            self.lines[0].write(self.last)
            for tracker in self.trackers:
                tracker.log(self.last)
        return True

    def _stands(self, line: Mapping[str, Any]) -> bool:
        """Whether the run goes on after this step, or has gone back."""
        seen, loss = self.seen, line["loss"]
        if line.get("skipped") or not math.isfinite(loss + line["grad_norm"]):
            self._not_finite(line)
            return True
        seen.applied += 1
        seen.skipping_since = None
        limit = self.settings.spike
        if limit is None:
            return True
        full = len(seen.losses) == self.settings.spike_window
        if full and loss > np.mean(seen.losses) + limit * np.std(seen.losses):
            mean = np.mean(seen.losses)
            if self._go_back(line["step"], f"the loss is {loss:.4g}, after {mean:.4g} on average"):
                return False
        seen.losses = [*seen.losses, loss][-self.settings.spike_window :]
        return True

    def _not_finite(self, line: Mapping[str, Any]) -> None:
        """Skips or stops."""
        step, seen = line["step"], self.seen
        what = f"the loss is {line['loss']:.4g} and the gradient's norm {line['grad_norm']:.4g}"
        if self.settings.on_nonfinite == "stop":
            self._event("nonfinite", f"{what}; stopping", step)
            self._report(self.checkpoints.settle())
            raise Diverged(f"step {step}: {what}; checkpoints: {self.checkpoints.steps()}")
        if seen.skipping_since is None:
            seen.skipping_since = step
        since = f", as all are since step {seen.skipping_since}" * (seen.skipping_since < step)
        self._event("skip", f"{what}: this update is skipped{since}", step)
        if step - seen.skipping_since + 1 >= PATIENCE:
            raise Diverged(
                f"the last {PATIENCE} losses or gradients, since step {seen.skipping_since}, "
                "were not finite"
            )

    def _go_back(self, step: int, what: str) -> bool:
        """Goes back to before this step, if it can, and leaves the batches up to it out."""
        self._report(self.checkpoints.settle())
        every = self.settings.checkpoint_every
        assert every is not None
        to = self.checkpoints.latest(dividing=every)
        if to is None or self.seen.rewinds == self.settings.rewinds:
            why = "there is no checkpoint to go back to"
            if to is not None:
                why = f"the run has gone back {self.seen.rewinds} times already"
            self._event("spike", f"{what}; going on, as {why}", step)
            return False
        self.checkpoints.drop_after(to)
        if self.first:
            self.lines[0].drop(to)
        rewinds = self.seen.rewinds + 1
        self.pending = None
        self._load(to)
        self.seen.rewinds = rewinds
        for _ in range(step + 1 - to):
            next(self.data, None)
        self._event(
            "rewind",
            f"{what}; going back to step {to}, and on without the {step + 1 - to} batches since",
            step,
        )
        return True

    # --- Checkpoints -----------------------------------------------------------------------------
    def _arrays(self) -> State:
        state = self.training.state
        return State(self.training.update.parts(state.params)[0], state.optimizer)

    def _save(self) -> None:
        for lines in self.lines:
            lines.publish()
        run = {
            "step": self.step,
            "config": self.config,
            "frozen": self.frozen,
            "data": self.data.get_state(),
            "seen": dataclasses.asdict(self.seen),
            "metrics": self.last,
        }
        self._report(*self.checkpoints.save(self.step, self._arrays(), run))
        self.saved_at = time.monotonic()
        self.agreed.clear()

    def _load(self, step: int) -> None:
        run = self.checkpoints.run(step)
        _, frozen = self.training.update.parts(self.training.state.params)
        found = self.checkpoints.load(step, self._arrays())
        params = self.training.update.joined(found.params, frozen)
        self.training.state = State(params, found.optimizer)
        self.data.set_state(run["data"])
        self.step, self.seen = step, _Seen(**run["seen"])

    def _check_same(self, step: int) -> None:
        """Whether this is the run that a checkpoint is of."""
        run = self.checkpoints.run(step)
        # Another process may look for the file before the first one has written it.
        changed = list(differences(run["config"], self.config, free=FREE)) if self.first else []
        if changed:
            raise ValueError(f"{self.out}: the run has another configuration: {'; '.join(changed)}")
        for name in sorted(run["frozen"].keys() ^ self.frozen.keys()):
            was, now = "trained", "frozen"
            if name in run["frozen"]:
                was, now = now, was
            raise ValueError(f"{self.out}: the run has {name} {was}, and it is {now} here")
        for name, bits in self.frozen.items():
            if run["frozen"][name] != bits:
                raise ValueError(
                    f"{self.out}: frozen parameter {name} is not what it was in the run: make the "
                    "model from the same checkpoint or seed"
                )

    # --- Events ----------------------------------------------------------------------------------
    def _report(self, *failures: Failure | None) -> None:
        for failure in failures:
            if failure is not None:
                self._event(
                    "save_failed",
                    f"checkpoint {failure.step} could not be written ({failure.reason}); training "
                    "goes on, earlier ones are intact",
                )

    def _event(self, kind: str, message: str, step: int | None = None) -> None:
        """Says what happened, on the console and in `events.jsonl`."""
        if not self.first:
            return
        step = self.step if step is None else step
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        if len(self.lines) == 2:
            self.lines[1].write({"step": step, "event": kind, "message": message, "time": now})
        self.console.print(f"step {step}: {message}", style="yellow", markup=False)


class _Rates:
    """Learning rates on the host."""

    def __init__(self, schedule: optax.Schedule | None) -> None:
        self._schedule = schedule
        self._chunk, self._values = -1, np.zeros(0)

    def __call__(self, update: int) -> float | None:
        if self._schedule is None:
            return None
        chunk, place = divmod(update, _CHUNK)
        if chunk != self._chunk:
            numbers = chunk * _CHUNK + np.arange(_CHUNK, dtype=np.int32)
            self._chunk, self._values = chunk, np.asarray(jax.vmap(self._schedule)(numbers))
        return float(self._values[place])
