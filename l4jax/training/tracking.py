"""Where the numbers of a run go: lines of JSON, TensorBoard, Weights & Biases.

The last two come with `pip install 'l4jax[track]'`.
"""

from __future__ import annotations

import io
import json
import math
import pathlib
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from rich import progress
from rich.console import Console

from l4jax import roofline
from l4jax.config import TextConfig
from l4jax.training.checkpointing import write

TIMING = ("seconds", "tokens_per_second", "mfu", "time")
"""Keys that differ from run to run; all others are the same for the same run."""
PEAK_FLOPS = {
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12 / 2,
}
"""bfloat16 operations per second of a device, by what JAX calls it; as in `planning.chips`."""


class Lines:
    """A file of JSON objects, one a line, each with a `step`; every line is there once written.

    Lines that the disk has no room for wait in memory and are written with later ones.

    Args:
        file: a cloud store's address too: the lines are then kept here, and copied by `publish`.
        below: lines of this step and later ones are dropped, as they will be written again; None
            keeps all. One that a kill has left half written is dropped in any case.
    """

    def __init__(self, file: epath.PathLike, *, below: int | None) -> None:
        self._there = epath.Path(file)
        self._waiting = b""
        self._remote = "://" in str(file)
        self._here = pathlib.Path(file)
        if self._remote:
            self._folder = tempfile.TemporaryDirectory()
            self._here = pathlib.Path(self._folder.name) / self._there.name
        self._below(below, self._there)

    def write(self, line: Mapping[str, Any]) -> None:
        """Adds a line; numbers that are not finite become null."""
        text = json.dumps({name: plain(x) for name, x in line.items()}, ensure_ascii=False)
        waited = bool(self._waiting)
        self._waiting += f"{text}\n".encode()
        try:
            self._write()
        except OSError as error:
            if not waited:
                print(f"{self._here}: {error.strerror}; its lines wait in memory", file=sys.stderr)

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def drop(self, step: int) -> None:
        """Removes the lines of this step and later ones."""
        self._write()
        self._file.close()
        self._below(step, epath.Path(self._here))

    def publish(self) -> None:
        """Copies the lines to the cloud store, if that is where they belong."""
        if self._remote:
            self._write()
            write(self._there, self._here.read_text(encoding="utf-8"))

    def close(self) -> None:
        """Publishes, and ends.

        Raises:
            OSError: there is still no room for lines that waited.
        """
        self._write()
        self.publish()
        self._file.close()
        if self._remote:
            self._folder.cleanup()

    def _below(self, step: int | None, source: epath.Path) -> None:
        text = source.read_text() if step != 0 and source.exists() else ""
        limit = math.inf if step is None else step
        kept = [line for line in io.StringIO(text) if _step(line) < limit]
        write(epath.Path(self._here), "".join(kept))
        self._file = self._here.open("ab", buffering=0)
        self._waiting = b""


def read(file: epath.PathLike) -> list[dict[str, Any]]:
    """The whole lines of such a file; none if there is no file."""
    path = epath.Path(file)
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in io.StringIO(text) if _step(line) < math.inf]


def _step(line: str) -> float:
    """The step of a line; infinite if a kill left only a part of it."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (KeyError, TypeError, ValueError):
        return math.inf


def plain(x: Any) -> Any:
    """A number as JSON has it, None if it is not finite; anything else as it is."""
    if isinstance(x, np.ndarray | np.generic):
        x = x.item()
    return None if isinstance(x, float) and not math.isfinite(x) else x


def utilization(config: TextConfig, length: int, tokens_per_second: float) -> float | None:
    """Model FLOPs utilization of all devices, recomputation not counted; None on unknown ones.

    The operations of training all parameters (Chowdhery et al. 2022, PaLM, appendix B), so that
    frozen ones make it look larger.
    """
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    if peak is None:
        return None
    return tokens_per_second * roofline.training_flops(config, length) / (peak * jax.device_count())


# --- Services ------------------------------------------------------------------------------------
class Tracker(Protocol):
    """A service that draws what it is told."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Takes the numbers of a line of metrics."""

    def close(self) -> None:
        """Ends."""


class TensorBoard:
    """Event files for TensorBoard, written by tensorboardX.

    Args:
        folder: of the event files.
        step: the first step to come; TensorBoard drops what it has of later ones.

    Raises:
        ValueError: tensorboardX is not installed.
    """

    def __init__(self, folder: str, *, step: int) -> None:
        try:
            import tensorboardX
        except ImportError:
            raise ValueError("TensorBoard needs tensorboardX: pip install 'l4jax[track]'") from None
        self._writer = tensorboardX.SummaryWriter(folder, purge_step=step)

    def log(self, line: Mapping[str, Any]) -> None:
        """Takes the numbers of a line of metrics."""
        for name, x in line.items():
            if name != "step" and isinstance(x, int | float):
                self._writer.add_scalar(name, x, line["step"])

    def close(self) -> None:
        """Ends."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases; a resumed one goes on under its name.

    Args:
        project: where it belongs.
        name: of the run.
        folder: for its local files.
        config: of the run.

    Raises:
        ValueError: wandb is not installed.
    """

    def __init__(self, project: str, *, name: str, folder: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError("wandb is not installed: pip install 'l4jax[track]'") from None
        self._run = wandb.init(
            project=project, id=name, name=name, dir=folder, config=dict(config), resume="allow"
        )

    def log(self, line: Mapping[str, Any]) -> None:
        """Takes the numbers of a line of metrics."""
        self._run.log({name: x for name, x in line.items() if name != "step"}, step=line["step"])

    def close(self) -> None:
        """Ends."""
        self._run.finish()


class Bar:
    """A progress bar on a terminal: loss, tokens per second, MFU, time left.

    Args:
        console: of the terminal.
        steps: of the whole run.
        done: steps that were made before.
    """

    def __init__(self, console: Console, steps: int, done: int) -> None:
        columns = (
            *progress.Progress.get_default_columns(),
            progress.TextColumn("{task.fields[text]}"),
        )
        self._bar = progress.Progress(*columns, console=console)
        self._task = self._bar.add_task("Training", total=steps, completed=done, text="")
        self._bar.start()

    def log(self, line: Mapping[str, Any]) -> None:
        """Shows a line of metrics."""
        loss, speed, mfu = (line.get(x) for x in ("loss", "tokens_per_second", "mfu"))
        text = "loss " + ("not finite" if loss is None else f"{loss:.4f}")
        text += f" · {speed:,.0f} tokens/s" if speed else ""
        text += f" · MFU {mfu:.1%}" if mfu else ""
        self._bar.update(self._task, completed=line["step"] + 1, text=text)

    def close(self) -> None:
        """Ends."""
        self._bar.stop()
