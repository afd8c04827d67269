"""What a frozen model adds to batches: a teacher's likeliest tokens, a reference's log-probs.

Both are functions of a batch alone, so they are computed on its way to the trainer, live or once
for all on disk (Llama 4's teacher ran ahead for most data, and in training for new data):

    teach = teacher.top_tokens(model, 64)
    batches = map(teach, batches)

    teacher.save("cache", teach, batches)
    batches = map(teacher.Cache("cache"), batches)

Letters: see `models.layers`; s segments in a row, k tokens that a teacher names.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import xxhash
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from l4jax import sharding
from l4jax.checkpoints.directory import new_directory
from l4jax.training import objectives

Batch = Mapping[str, Any]

ROWS = ("tokens", "segment_ids", "positions", "loss_mask")
"""What of a batch a cache finds rows by."""
READ = (*ROWS, "tiles", "places")
"""What of a batch a frozen model may look at."""


class Frozen:
    """Adds to a batch what `f(model, batch)` returns.

    Args:
        f: a pure function; it is compiled.
        model: its arrays are arguments of the compiled function, never constants in it.
        mesh: where the model lies, if that is not the current mesh: what is added then comes back
            over the host, as NumPy arrays, and batches must be of this process alone.
        rules: see `sharding.use`.
    """

    def __init__(
        self,
        f: Callable[[Any, Batch], dict[str, jax.Array]],
        model: Any,
        *,
        mesh: Mesh | None = None,
        rules: sharding.Rules = sharding.TRAINING,
    ) -> None:
        self.function = jax.jit(f)
        """(model, batch) → what is added."""
        self._model, self._mesh, self._rules = model, mesh, rules

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """The batch and what is added to it."""
        read = {name: batch[name] for name in READ if name in batch}
        if self._mesh is None:
            return {**batch, **self.function(self._model, read)}
        with sharding.use(self._mesh, self._rules):
            found = self.function(self._model, jax.tree.map(np.asarray, read))
        return {**batch, **jax.device_get(found)}


def top_tokens(model: Any, k: int, *, mesh: Mesh | None = None) -> Frozen:
    """Adds `teacher_ids` and `teacher_log_probs` [b t k], for `objectives.distill`.

    Logits exist for some tokens at a time only, whatever the vocabulary. Other arguments and
    errors: see `Frozen` and `objectives.top_log_probs`.
    """

    def f(model: Any, batch: Batch) -> dict[str, jax.Array]:
        ids, log_probs = objectives.top_log_probs(model, batch, k)
        return {"teacher_ids": ids, "teacher_log_probs": log_probs}

    return Frozen(f, model, mesh=mesh)


def reference(model: Any, segments: int, *, mesh: Mesh | None = None) -> Frozen:
    """Adds `reference` [b s], the segments' log-probabilities, for `objectives.dpo`.

    Args:
        model: the reference.
        segments: s, the most that a row has.
        mesh: see `Frozen`.
    """

    def f(model: Any, batch: Batch) -> dict[str, jax.Array]:
        return {"reference": objectives.segment_log_probs(model, batch, segments=segments)}

    return Frozen(f, model, mesh=mesh)


# --- On disk -------------------------------------------------------------------------------------
def save(
    path: str | os.PathLike[str],
    frozen: Callable[[Batch], Mapping[str, Any]],
    batches: Iterable[Batch],
) -> int:
    """Writes what a frozen model adds to batches as a new folder; returns its number of rows.

    The folder has a raw file [rows …] for each name, `keys.bin` with a hash of each row's content,
    and `about.json`. Rows that come again are written once. Of several processes, which all call
    this with their own rows, the first writes, and the others return 0.

    Raises:
        FileExistsError: something is already there.
        ValueError: batches differ in their rows' length, or there is none.
    """
    with new_directory(path) as folder, contextlib.ExitStack() as stack:
        about: dict[str, Any] = {}
        files: dict[str, Any] = {}
        seen: set[bytes] = set()
        for batch in batches:
            found = {name: _whole(x) for name, x in frozen(batch).items()}
            if jax.process_index():
                continue
            added = {name: x for name, x in found.items() if name not in batch}
            shapes = {name: [str(x.dtype), *x.shape[1:]] for name, x in added.items()}
            if not about:
                about = shapes
                files = {
                    name: stack.enter_context(open(folder / f"{name}.bin", "wb"))
                    for name in (*added, "keys")
                }
            if shapes != about:
                raise ValueError(f"a batch's rows give {shapes}, those before gave {about}")
            for row, key in enumerate(_keys(found)):
                if key not in seen:
                    seen.add(key)
                    files["keys"].write(key)
                    for name, x in added.items():
                        files[name].write(np.ascontiguousarray(x[row]).tobytes())
        if jax.process_index():
            return 0
        if not about:
            raise ValueError(f"no batches to save in {path}")
        text = json.dumps({"rows": len(seen), "arrays": about}, indent=1)
        (folder / "about.json").write_text(text + "\n", encoding="utf-8")
    return len(seen)


def _whole(x: Any) -> np.ndarray:
    """An array of one or several processes, with all its rows."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


class Cache:
    """Adds to a batch what `save` wrote of its rows, found by their content in whatever order.

    Args:
        paths: folders that `save` wrote, of the same arrays; read as far as they are needed.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: a folder is damaged, or has other arrays than the first.
    """

    def __init__(self, *paths: str | os.PathLike[str]) -> None:
        self._parts: list[dict[str, np.ndarray]] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        arrays: Any = None
        for number, folder in enumerate(map(pathlib.Path, paths)):
            about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
            arrays = about["arrays"] if arrays is None else arrays
            if about["arrays"] != arrays:
                raise ValueError(f"{folder} has {about['arrays']}, {paths[0]} has {arrays}")
            rows = about["rows"]
            keys = _mapped(folder / "keys.bin", np.dtype(np.uint8), (rows, 16))
            self._places |= {key.tobytes(): (number, row) for row, key in enumerate(keys)}
            self._parts.append(
                {
                    name: _mapped(folder / f"{name}.bin", np.dtype(dtype), (rows, *shape))
                    for name, (dtype, *shape) in arrays.items()
                }
            )

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """The batch and what is added to it.

        Raises:
            ValueError: a row is not in the cache.
        """
        places = []
        for row, key in enumerate(_keys(batch)):
            if key not in self._places:
                raise ValueError(
                    f"row {row} of the batch is not in the cache of {len(self._places)} rows: save "
                    "it from the same data, packed into the same rows"
                )
            places.append(self._places[key])
        added = {
            name: np.stack([self._parts[part][name][row] for part, row in places])
            for name in self._parts[0]
        }
        return {**batch, **added}


def _keys(batch: Batch) -> list[bytes]:
    """A hash of each row of what a frozen model looks at."""
    if "tiles" in batch:
        raise ValueError("rows with images cannot be cached: their tokens do not tell them apart")
    arrays = [(name, np.asarray(batch[name])) for name in ROWS if name in batch]
    keys = []
    for row in range(len(batch["tokens"])):
        digest = xxhash.xxh3_128()
        for name, x in arrays:
            # In one type: a batch may come from NumPy or from JAX.
            digest.update(name.encode() + x[row].astype(np.int32).tobytes())
        keys.append(digest.digest())
    return keys


def _mapped(file: pathlib.Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    expected = int(np.prod(shape)) * dtype.itemsize
    if file.stat().st_size != expected:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, {expected} are expected")
    return np.memmap(file, dtype, "r", shape=shape)
