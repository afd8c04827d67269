"""From one format to another in constant memory, resumable, every tensor hashed on the way.

Tensors on both sides that share canonical arrays form a component, the unit of work. It is moved
slab by slab: rows of theirs are read, laid out our way, cast or quantized, laid out the other way
and written to their place. A journal beside the destination says which components are done; the
destination takes its name last.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import l4jax.checkpoints.companions as companions
import l4jax.checkpoints.manifest as manifest
import l4jax.checkpoints.remote as remote
from l4jax.checkpoints.directory import source as open_source
from l4jax.checkpoints.formats import SCALE, Format, Source, base
from l4jax.checkpoints.journal import Entry, Journal
from l4jax.checkpoints.plan import Component, Options, Plan, check_options, make_plan
from l4jax.checkpoints.remote import Begin
from l4jax.checkpoints.rows import Rows, cast, compact, first_not_finite
from l4jax.kernels.quantized import dequantize, quantize, scheme_of

SLAB_BYTES = 64 << 20
"""Of our arrays that are moved together, unless a single row is larger."""
MEMORY_BYTES = 1 << 30
"""Of slabs under way at the same time, each counted with its copies, unless one alone is larger."""
_COPIES = 3
"""A slab as it was read, laid out our way, and as it is written."""
WORKERS = 2


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: Format,
    options: Options = Options(),
    licence: str | None = None,
    name: str | None = None,
    any_name: bool = False,
    begin: Begin | None = None,
) -> dict[str, Any]:
    """Writes the checkpoint in `src` to the new directory `dst` in another format.

    The same call goes on where a killed one was. Peak memory does not depend on the size of the
    checkpoint.

    Args:
        src: a directory in any of the formats; gs:// and s3:// addresses are copied here first.
        dst: must not exist, or be an empty directory; what goes to an address is made here first.
        to: "orbax", "hf" or "meta".
        options: types, sizes, and where to keep what comes from and goes to addresses.
        licence: the Llama licence version of the weights ("3.0" to "4"), or "none"; found out from
            the source by default.
        name: what the model is to be called; by default the destination's name, with the prefix
            that the licence demands.
        any_name: whether a name without that prefix is allowed.
        begin: called with the bytes to move and those done before; returns what is called with
            every number of bytes moved.

    Raises:
        FileExistsError: something is at `dst`, or another conversion is writing it.
        FileNotFoundError: a file of the source is missing.
        ImportError: an address needs a package that is not installed.
        OSError: the disk is full or not writable.
        ValueError: the source is damaged or not supported, the format or type cannot hold it, or
            the name is not allowed. The message names file, tensor and value.
    """
    check_options(to, options)
    here, there = os.fspath(src), os.fspath(dst)
    if remote.is_remote(here):
        src = remote.staging(here, options.staging)
        remote.download(here, src, begin)
    names = {"licence": licence, "name": name, "any_name": any_name}
    if remote.is_remote(there):
        remote.check_free(there)
        dst = remote.staging(there, options.staging, here, to, *options, *names.values())
        # An earlier try may have been cut off while it was sent.
        shutil.rmtree(dst, ignore_errors=True)
    report = _convert_here(src, dst, to=to, options=options, names=names, begin=begin)
    if remote.is_remote(there):
        remote.upload(pathlib.Path(dst), there, begin)
    for address, folder in ((here, src), (there, dst)):
        if remote.is_remote(address):
            shutil.rmtree(pathlib.Path(folder).parent)
    return report | {"source": here, "destination": there}


def _convert_here(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: Format,
    options: Options,
    names: Mapping[str, Any],
    begin: Begin | None,
) -> dict[str, Any]:
    """`convert` between directories of this machine."""
    begun = time.perf_counter()
    final = pathlib.Path(dst).absolute()
    work = final.with_name(f".{final.name}.converting")
    source = open_source(src)
    inside = source.directory.resolve()
    if final.resolve() == inside or inside in final.resolve().parents:
        raise ValueError(f"{final}: lies in the source {inside}, which is left as it is")
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise FileExistsError(f"{final}: already exists and is not empty")
    extras = companions.gather(source, to=to, default_name=final.name, **names)
    plan = make_plan(source, work, to=to, options=options, described=extras.described)
    total = sum(component.nbytes for component in plan.components)
    with Journal(work.with_name(work.name + ".jsonl"), _fingerprint(plan, to, options)) as journal:
        _prepare(plan, journal, work)
        done = sum(c.nbytes for c in plan.components if c.name in journal.done)
        advance = begin(total, done) if begin else lambda size: None
        _move_all(plan, journal, advance)
        _finish(plan, journal, work, to=to, files=extras.files)
        os.replace(work, final)
        _sync_folder(final.parent)
        journal.discard()
    seconds = time.perf_counter() - begun
    return {
        "source": str(source.directory),
        "destination": str(final),
        "from": source.kind,
        "to": to,
        "tensors": sum(len(t.stored()) for t in plan.target.tensors.values()),
        "bytes": plan.target.size,
        "seconds": seconds,
        "megabytes_per_second": (total - done) / seconds / 1e6,
        "resumed_from_bytes": done,
        "name": extras.name,
        "licence": extras.licence,
        "notes": list(extras.notes),
    }


def _fingerprint(plan: Plan, to: Format, options: Options) -> str:
    """Changes when the source or what is to be written does."""
    files = []
    for file in plan.source.files:
        stat = file.stat()
        files.append([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    stored = {k: v for t in plan.target.tensors.values() for k, v in t.stored().items()}
    how = options._replace(staging=None)
    text = json.dumps([files, to, list(how), stored], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _prepare(plan: Plan, journal: Journal, work: pathlib.Path) -> None:
    """Makes the files to write, unless an earlier try has; leaves nothing behind if it fails."""
    fresh = not work.exists()
    try:
        if journal.done and not plan.target.intact():
            journal.forget()
        if not journal.done:
            shutil.rmtree(work, ignore_errors=True)
        _check_space(plan.target.size, work)
        work.mkdir(parents=True, exist_ok=True)
        plan.target.create()
    except BaseException:
        if fresh:
            shutil.rmtree(work, ignore_errors=True)
            journal.discard()
        raise


def _finish(
    plan: Plan,
    journal: Journal,
    work: pathlib.Path,
    *,
    to: Format,
    files: Mapping[str, bytes | pathlib.Path],
) -> None:
    """Makes the files valid and writes what stands beside them."""
    # In the plan's order, not in the one in which threads were done: equal work, equal files.
    done = [journal.done[component.name] for component in plan.components]
    sums = {key: value for entry in done for key, value in entry.target.items()}
    plan.target.finish(sums)
    for file, content in files.items():
        _write_file(work / file, content)
    stored = {k: v for tensor in plan.target.tensors.values() for k, v in tensor.stored().items()}
    read = {key: value.digest for entry in done for key, value in entry.source.items()}
    source = plan.source
    origin = {"path": str(source.directory.resolve()), "kind": source.kind, "tensors": read}
    manifest.write(work, kind=to, stored=stored, sums=sums, source=origin)
    _sync_folder(work)


# --- Moving --------------------------------------------------------------------------------------
def _move_all(plan: Plan, journal: Journal, advance: Callable[[int], None]) -> None:
    """Moves every component that is not done, a few at a time; the first error stops all."""
    expected = manifest.read(plan.source)
    memory, stop = _Memory(MEMORY_BYTES), threading.Event()
    moved: queue.SimpleQueue[tuple[Component, Entry] | None] = queue.SimpleQueue()

    def move(component: Component) -> None:
        if stop.is_set():
            return
        try:
            with memory.taken(_COPIES * _slab(plan, component)[1]):
                entry = _move(plan, component, expected, advance, stop)
        except BaseException:
            stop.set()
            raise
        if entry is not None:
            moved.put((component, entry))

    waiting = [c for c in plan.components if c.name not in journal.done]
    with ThreadPoolExecutor(1) as settling, ThreadPoolExecutor(WORKERS) as moving:
        settled = settling.submit(_settle_all, plan, journal, moved, stop)
        futures = [moving.submit(move, component) for component in waiting]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            moving.shutdown(cancel_futures=True)
            raise
        finally:
            moved.put(None)
        settled.result()


def _settle_all(
    plan: Plan,
    journal: Journal,
    moved: queue.SimpleQueue[tuple[Component, Entry] | None],
    stop: threading.Event,
) -> None:
    """Notes components in the journal once they are on the disk, until None comes.

    In a thread of its own, so that nobody else waits for the disk; all that has come meanwhile is
    settled together.
    """
    ended = False
    while not ended:
        batch = [moved.get()]
        while not moved.empty():
            batch.append(moved.get())
        ended = None in batch
        done = [item for item in batch if item is not None]
        try:
            for sync in {
                plan.target.tensors[match.theirs].sync: None
                for component, _ in done
                for match in component.target
            }:
                sync()
            journal.add([(component.name, entry) for component, entry in done])
        except BaseException:
            stop.set()
            raise


def _move(
    plan: Plan,
    component: Component,
    expected: Mapping[str, Any] | None,
    advance: Callable[[int], None],
    stop: threading.Event,
) -> Entry | None:
    """Moves one component slab by slab; None if it was stopped."""
    read = {match: plan.source.tensors[match.theirs] for match in component.source}
    write = {match: plan.target.tensors[match.theirs] for match in component.target}
    step, _ = _slab(plan, component)
    for start in range(0, component.length, step):
        if stop.is_set():
            return None
        end = min(start + step, component.length)
        ours: dict[str, np.ndarray] = {}
        for match, tensor in read.items():
            first, last = _rows(tensor, component, start, end)
            for name, value in zip(
                match.ours, match.layout.load(tensor.read(first, last)), strict=True
            ):
                if name in ours and ours[name].tobytes() != value.tobytes():
                    raise ValueError(
                        f"{plan.source.directory}: {match.theirs} should repeat {name}, of which "
                        f"another tensor holds different numbers"
                    )
                ours[name] = value
        new = _adapted(plan, component, ours)
        for match, tensor in write.items():
            rows = match.layout.save(tuple(new[name] for name in match.ours))
            tensor.write(_rows(tensor, component, start, end)[0], rows)
        advance(
            component.nbytes * end // component.length
            - component.nbytes * start // component.length
        )
    for tensor in read.values():
        manifest.check_written(plan.source, tensor, expected)
    return Entry(
        {key: value for tensor in read.values() for key, value in tensor.sums().items()},
        {key: value for tensor in write.values() for key, value in tensor.sums().items()},
    )


def _slab(plan: Plan, component: Component) -> tuple[int, int]:
    """How many slices of a component are moved together, and their bytes."""
    each = max(1, component.nbytes // component.length)
    tensors = [plan.source.tensors[m.theirs] for m in component.source]
    tensors += [plan.target.tensors[m.theirs] for m in component.target]
    grain = math.lcm(*(t.grain for t in tensors if t.length == component.length), 1)
    step = max(1, SLAB_BYTES // each)
    step = min(max(grain, step - step % grain), component.length)
    return step, step * each


def _rows(tensor: Rows, component: Component, start: int, stop: int) -> tuple[int, int]:
    """The rows of a tensor that some slices of its component are."""
    unit = tensor.length // component.length
    return start * unit, stop * unit


def _adapted(
    plan: Plan, component: Component, ours: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The arrays as they are wanted: cast, quantized, multiplied out, or as they are."""
    found: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(base(n) for match in component.target for n in match.ours):
        spec, values, scale = plan.wanted[name], ours[name], ours.get(name + SCALE)
        scheme = scheme_of(spec.dtype)
        if scheme is None:
            new = (
                cast(values, spec.dtype) if scale is None else dequantize(values, scale, spec.dtype)
            )
            if new is not values:
                _check_range(plan.source, name, new)
            found[name] = new
        elif scale is not None:
            found[name], found[name + SCALE] = values, scale
        else:
            group = spec.shape[-2] // plan.wanted[name + SCALE].shape[-2]
            found[name], found[name + SCALE] = quantize(values, scheme, group=group)
    return found


def _check_range(source: Source, name: str, new: np.ndarray) -> None:
    """Raises ValueError if a narrower type made infinities of numbers that were finite."""
    if first_not_finite(compact(new)) is not None:
        raise ValueError(
            f"{source.directory}: {name} holds a number beyond the range of {new.dtype.name}, "
            f"whose largest is {float(ml_dtypes.finfo(new.dtype).max):g}; choose a wider type"
        )


class _Memory:
    """Lets in who needs memory while there is some; who needs more than all waits to be alone."""

    def __init__(self, size: int) -> None:
        self._size, self._taken, self._changed = size, 0, threading.Condition()

    def taken(self, size: int) -> _Taken:
        return _Taken(self, size)

    def take(self, size: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + size <= self._size)
            self._taken += size

    def give(self, size: int) -> None:
        with self._changed:
            self._taken -= size
            self._changed.notify_all()


class _Taken(NamedTuple):
    memory: _Memory
    size: int

    def __enter__(self) -> None:
        self.memory.take(self.size)

    def __exit__(self, *_: object) -> None:
        self.memory.give(self.size)


def _check_space(needed: int, work: pathlib.Path) -> None:
    """Raises OSError if the disk has no room for what is still to be written."""
    there = sum(f.stat().st_blocks * 512 for f in work.rglob("*") if f.is_file())
    parent = next(folder for folder in work.parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed - there > free:
        raise OSError(
            f"{work.parent}: {needed - there:,} bytes are needed, {free:,} are free on that disk"
        )


def _write_file(file: pathlib.Path, content: bytes | pathlib.Path) -> None:
    """Writes or copies a small file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    if isinstance(content, pathlib.Path):
        shutil.copyfile(content, partial)
    else:
        partial.write_bytes(content)
    os.replace(partial, file)


def _sync_folder(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
