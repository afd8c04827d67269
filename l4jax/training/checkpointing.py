"""Checkpoints of a run: all that going on exactly needs, in one folder for each.

    checkpoints/STEP/    an Orbax checkpoint of the trainable parameters and the optimizer's state:
                         a flat dict of arrays, by dotted names
    checkpoints/STEP/run.json   where data, loop and metrics stand, and the run's configuration

`run.json` is written last and removed first: a folder without it is no checkpoint, whatever else is
in it, and is cleared away when the next run begins. STEP counts the updates that were made.

Frozen parameters are not written. They come from where the first run took them (another checkpoint,
a seed), and a checkpoint has a sum over the bits of each, so that a run on others is refused.

The one module of a run that knows Orbax.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from l4jax import paths

MARKER = "run.json"
_UNFINISHED = ".orbax-checkpoint-tmp"
"""In the names of folders that Orbax is filling."""
_CHUNK_BYTES = 32 << 20
"""Of one stored chunk, so that another mesh reads little beyond its own parts."""


class Failure(NamedTuple):
    """A checkpoint that could not be written, and why."""

    step: int
    reason: str


class Checkpoints:
    """The checkpoints of one run; every process calls all of this alike.

    Args:
        folder: made if missing; it is this run's alone. At gs:// too.
        keep: how many of the last ones stay.
        keep_best: a metric of `run.json`'s "metrics"; the checkpoint where it is smallest stays
            too, or with "-" before the name, where it is largest.
        every: the newest one whose step this divides stays too: see `loop` on spikes.

    Raises:
        ValueError: `keep` is below 1, or Orbax cannot write there.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        keep: int,
        keep_best: str | None = None,
        every: int | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep {keep} must be at least 1")
        address = os.fspath(folder)
        if "://" in address and not address.startswith("gs://"):
            raise ValueError(f"{address}: Orbax writes to local folders and to gs:// only")
        # Orbax refuses relative paths.
        self.folder = epath.Path(address if "://" in address else os.path.abspath(address))
        self._keep, self._best, self._every = keep, keep_best, every
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: tuple[int, concurrent.futures.Future[None]] | None = None
        self._saved: int | None = None
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clear()

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, ascending."""
        names = [path.name for path in self._entries()]
        found = sorted(int(name) for name in names if name.isdecimal())
        return [step for step in found if (self._at(step) / MARKER).exists()]

    def latest(self, *, dividing: int = 1) -> int | None:
        """The last checkpoint's step, of those that `dividing` divides; the same in all processes.

        Call `settle` first.
        """
        found = [step for step in self.steps() if step % dividing == 0]
        step = found[-1] if found else -1
        if jax.process_count() > 1:
            step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        return None if step < 0 else step

    # --- Writing ---------------------------------------------------------------------------------
    def save(self, step: int, state: Any, run: Mapping[str, Any]) -> list[Failure]:
        """Begins to write a checkpoint; training may go on, and may use up the state's arrays.

        Waits for the one before it. Nothing is done if this step is the last one that was written.

        Args:
            step: updates made.
            state: arrays in any tree.
            run: for `run.json`, small.

        Returns:
            The failure of the checkpoint before this one, and of this one if it could not begin.
        """
        failures = [failure for failure in (self.settle(),) if failure]
        if self._saved == step:
            return failures
        text = json.dumps(run, indent=1)
        try:
            written = begin(self._at(step), _named(state))
        except Exception as error:  # whatever the storage library raises
            if jax.process_index() == 0:
                self._clear()
            return [*failures, Failure(step, _reason(error))]
        self._saving = step, self._thread.submit(self._finish, step, written, text)
        return failures

    def settle(self, *, wait: bool = True) -> Failure | None:
        """What became of the last `save`: its failure, or None; with `wait`, once it is done."""
        if self._saving is None or not (wait or self._saving[1].done()):
            return None
        (step, future), self._saving = self._saving, None
        try:
            future.result()
        except Exception as error:
            return Failure(step, _reason(error))
        self._saved = step
        return None

    def close(self) -> Failure | None:
        """Waits for what is being written."""
        failure = self.settle()
        self._thread.shutdown()
        return failure

    def drop_after(self, step: int) -> None:
        """Removes all later checkpoints: those of a course that was given up."""
        self.settle()
        if jax.process_index() == 0:
            for later in self.steps():
                if later > step:
                    self._remove(self._at(later))
        _together(f"{self.folder} has nothing after {step}")

    def _finish(self, step: int, written: Callable[[], None], text: str) -> None:
        """In its own thread: waits for the arrays, and makes them a checkpoint."""
        first = jax.process_index() == 0
        try:
            written()
            if first:
                write(self._at(step) / MARKER, text)
        except BaseException:
            if first:
                self._clear()
            raise
        if first:
            self._thin()

    def _thin(self) -> None:
        """Removes checkpoints that need not stay."""
        steps = self.steps()
        stay = set(steps[-self._keep :])
        stay |= set([step for step in steps if self._every and step % self._every == 0][-1:])
        if self._best:
            scores = {step: self._score(step) for step in steps}
            scores = {step: score for step, score in scores.items() if math.isfinite(score)}
            stay |= {min(scores, key=lambda step: scores[step])} if scores else set()
        for step in set(steps) - stay:
            self._remove(self._at(step))

    def _score(self, step: int) -> float:
        """How good a checkpoint is; less is better, and NaN where it was not measured."""
        name = (self._best or "").removeprefix("-")
        value = self.run(step)["metrics"].get(name)
        return math.nan if value is None else -value if self._best != name else value

    def _clear(self) -> None:
        """Removes what is no checkpoint, left by a run that was killed or had no room."""
        for path in self._entries():
            ours = path.name.isdecimal() or _UNFINISHED in path.name
            if ours and not (path / MARKER).exists():
                self._remove(path)

    def _entries(self) -> list[epath.Path]:
        try:
            return list(self.folder.iterdir())
        except FileNotFoundError:  # in a cloud store there are no empty folders
            return []

    @staticmethod
    def _remove(path: epath.Path) -> None:
        # What cannot be removed now is no checkpoint any more, and is cleared away later.
        with contextlib.suppress(OSError):
            (path / MARKER).unlink(missing_ok=True)
            path.rmtree()

    # --- Reading ---------------------------------------------------------------------------------
    def run(self, step: int) -> dict[str, Any]:
        """What `run.json` of a checkpoint says."""
        return json.loads((self._at(step) / MARKER).read_text())

    def load(self, step: int, state: Any) -> Any:
        """A checkpoint's arrays in the tree of `state` and where its arrays lie, which are freed.

        The mesh may be another one than the checkpoint's.

        Raises:
            ValueError: the checkpoint has other arrays, or cannot be read.
        """
        named = {name: _abstract(x) for name, x in _named(state).items()}
        tree = jax.tree.structure(state)
        there: Any = ocp.metadata(self._at(step)).metadata
        if there is None:  # Orbax has logged why
            raise ValueError(f"{self._at(step)}: cannot be read: its arrays are damaged")
        _check_same(self._at(step), there, named)
        for x in jax.tree.leaves(state):
            if isinstance(x, jax.Array):
                x.delete()
        try:
            with _context():
                found = ocp.load(self._at(step), named)
        except Exception as error:  # whatever the storage library raises
            raise ValueError(f"{self._at(step)}: cannot be read: {_reason(error)}") from error
        self._saved = step
        return jax.tree.unflatten(tree, [found[name] for name in named])

    def _at(self, step: int) -> epath.Path:
        return self.folder / str(step)


def begin(path: epath.Path, arrays: Mapping[str, jax.Array]) -> Callable[[], None]:
    """Begins to write arrays, which may be changed when this returns; the result waits for it."""
    with _context():
        return ocp.save_async(path, dict(arrays), overwrite=True).result


P = TypeVar("P", pathlib.Path, epath.Path)


@contextlib.contextmanager
def appearing(path: P) -> Iterator[P]:
    """A path to write to, of a file that is then there whole or not at all."""
    partial = path.parent / f".{path.stem}.{os.getpid()}.partial{path.suffix}"
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write(path: pathlib.Path | epath.Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    with appearing(path) as partial, partial.open("w") as file:
        file.write(text)
        file.flush()
        with contextlib.suppress(OSError, AttributeError):  # a cloud store has none
            os.fsync(file.fileno())


def fingerprints(state: Any) -> dict[str, int]:
    """A number for the bits of each array, by its name: the same however the array is laid out."""
    return {name: int(x) for name, x in jax.device_get(_fingerprints(_named(state))).items()}


@jax.jit
def _fingerprints(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Σ (2i + 1) · bits of entry i, modulo 2³²: no rounding, so in any order."""

    def one(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        index = jnp.zeros(x.shape, jnp.uint32)
        for axis in range(x.ndim):
            stride = np.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
            index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride
        return jnp.sum(x.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)

    return jax.tree.map(one, arrays)


def _named(state: Any) -> dict[str, jax.Array]:
    return {paths.name(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)}


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _check_same(path: epath.Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first array that is missing, unknown or of another kind."""
    sides = [
        {name: f"{np.dtype(x.dtype).name}{list(x.shape)}" for name, x in side.items()}
        for side in (found, wanted)
    ]
    for name in sorted(sides[0] | sides[1]):
        theirs, ours = (side.get(name, "nothing") for side in sides)
        if theirs != ours:
            raise ValueError(f"{path}: {name} is {theirs} there and {ours} in this run")


def _context() -> ocp.Context:
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    # Replicas that write a slice each compile one more program for every array.
    context.array.saving.use_replica_parallel = False
    # Made in the background, a folder that cannot be made leaves threads waiting for it.
    context.asynchronous.create_directories_asynchronously = False
    return context


def _reason(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else text[:297] + "…"


def _together(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
