"""Makes stores: reads records, encodes them, writes what `store` describes, whole or not at all.

bpe = tokenizer.load("path/to/Llama-4-Scout")
store = tokenize(Source("corpus/*.jsonl"), conversations.Documents(bpe), "tokens")
"""

from __future__ import annotations

import array
import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, Literal

import numpy as np
from rich import progress
from rich.console import Console

from l4jax.data.chat import Rendered
from l4jax.data.conversations import fingerprint
from l4jax.data.images import Picture
from l4jax.data.sources import OnError, Record, Report, Source
from l4jax.data.store import FORMAT, MemoryStore, Store, distinct

TooLong = Literal["drop", "split", "raise"]
Encode = Callable[[Mapping[str, Any]], list[Rendered]]
_CHUNK = 64
"""Records that a worker encodes at a time."""


def encoded(values: Iterable[Mapping[str, Any]], encode: Encode) -> MemoryStore:
    """A store in memory, of records that are in memory."""
    examples = [segments for segments in map(encode, values) if segments]
    masks = [[segment.loss_mask for segment in segments] for segments in examples]
    every = all(all(mask) for parts in masks for mask in parts)
    return MemoryStore(
        [[segment.tokens for segment in segments] for segments in examples],
        None if every else masks,
        [[image for part in parts for image in part.images] for parts in examples],
    )


def tokenize(
    source: Source,
    encode: Any,
    folder: str | os.PathLike[str],
    *,
    max_length: int | None = None,
    too_long: TooLong = "drop",
    on_error: OnError = "raise",
    workers: int = 0,
    console: Console | None = None,
) -> Store:
    """The store of a source's records; the one that is there already, if nothing changed.

    Images that records name are kept as they are now: that their files change later is not noticed.

    Args:
        source: the records.
        encode: an encoder of `conversations`, or what has its `tokenizer`, `settings()` and call.
        folder: where to make it; an older store there is replaced, once the new one is whole.
        max_length: most tokens of an example, both answers of a preference together; None takes
            any.
        too_long: what becomes of longer ones: left out and counted, cut into documents of at most
            so many tokens, or an error.
        on_error: whether a malformed record is an error, or is counted and skipped.
        workers: processes that encode; 0 encodes here. The store is the same for any number.
        console: where to show progress.

    Raises:
        ValueError: a record is malformed or too long and that is an error, no example is left, or
            the folder holds something else.
    """
    folder = pathlib.Path(folder)
    _check_arguments(folder, max_length, too_long, on_error)
    about = {
        "source": {"files": repr(source), "fingerprint": source.fingerprint()},
        **_way(encode, max_length, too_long, on_error),
    }
    if (ready := _ready(folder, about)) is not None:
        return ready
    report = Report()
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with _writing(partial) as writer, _bar(console, folder.name) as advance:
            records = source.records(report, on_error=on_error)
            for record, found in _encoded(records, encode, workers):
                if isinstance(found, str):
                    report.refuse(record.where, found, on_error)
                else:
                    for segments in _fitted(found, record.where, report, max_length, too_long):
                        writer.add(segments)
                advance(report, writer.tokens)
        if not writer.examples:
            reasons = "; ".join(report.reasons[:3]) or "there are no records"
            raise ValueError(f"{source!r} gives no example: {report.summary()} ({reasons})")
        writer.finish(about, report)
        _put(partial, folder, about)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Store(folder)


def made(
    folder: str | os.PathLike[str],
    encode: Any,
    *,
    max_length: int | None,
    too_long: TooLong,
    on_error: OnError,
) -> Store | None:
    """The store in a folder if it was made this way, of whatever files; see `tokenize`."""
    return _ready(pathlib.Path(folder), _way(encode, max_length, too_long, on_error))


def _way(encode: Any, max_length: int | None, too_long: str, on_error: str) -> dict[str, Any]:
    """How a store is made, for `meta.json`."""
    return {
        "format": FORMAT,
        "tokenizer": fingerprint(encode.tokenizer),
        "vocab_size": encode.tokenizer.vocab_size,
        "encoder": encode.settings(),
        "max_length": max_length,
        "too_long": too_long,
        "on_error": on_error,
    }


def _check_arguments(
    folder: pathlib.Path, max_length: int | None, too_long: str, on_error: str
) -> None:
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length {max_length} must be at least 1, or None")
    for name, value, known in (
        ("too_long", too_long, ("drop", "split", "raise")),
        ("on_error", on_error, ("raise", "skip")),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; use one of {', '.join(known)}")
    if (folder / "meta.json").exists() or not folder.exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise ValueError(f"{folder}: is there and no tokenized data; choose another folder")


def _ready(folder: pathlib.Path, about: dict[str, Any]) -> Store | None:
    """The store that is there, if it is whole and was made the same way."""
    try:
        store = Store(folder)
    except (FileNotFoundError, ValueError):
        return None
    made = {name: store.meta.get(name) for name in about}
    return store if made == json.loads(json.dumps(about)) else None


def _put(partial: pathlib.Path, folder: pathlib.Path, about: dict[str, Any]) -> None:
    """Gives a whole store its name, unless another process was faster with the same one."""
    if _ready(folder, about) is not None:
        return
    old = partial.with_suffix(".old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _bar(console: Console | None, name: str) -> Iterator[Callable[[Report, int], None]]:
    """Shows how far it is; how much is to come is not known before it was read."""
    if console is None:
        yield lambda report, tokens: None
        return
    columns = (
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}: {task.completed:,} records"),
        progress.TextColumn("{task.fields[tokens]:,} tokens"),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(f"Tokenizing {name}", total=None, tokens=0)
        yield lambda report, tokens: bar.update(task, completed=report.read, tokens=tokens)


Encoded = tuple[Record, list[Rendered] | str]


def _encoded(records: Iterator[Record], encode: Encode, workers: int) -> Iterator[Encoded]:
    """Every record in order, with its segments or what is wrong with it."""
    if not workers:
        yield from ((record, _tried(encode, record)) for record in records)
        return
    # Processes that JAX runs in must not be forked.
    context = multiprocessing.get_context("spawn")
    waiting: collections.deque[Any] = collections.deque()
    with concurrent.futures.ProcessPoolExecutor(workers, context, _begin, (encode,)) as pool:
        while True:
            chunk = list(itertools.islice(records, _CHUNK))
            if chunk:
                waiting.append((chunk, pool.submit(_chunk, chunk)))
            if waiting and (not chunk or len(waiting) > 4 * workers):
                done, future = waiting.popleft()
                yield from zip(done, future.result(), strict=True)
            elif not chunk:
                return


_ENCODE: list[Encode] = []
"""In a worker, the one that it was started with."""


def _begin(encode: Encode) -> None:
    # Ctrl-C is for the process that waits for this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _ENCODE.append(encode)


def _chunk(records: list[Record]) -> list[list[Rendered] | str]:
    return [_tried(_ENCODE[-1], record) for record in records]


def _tried(encode: Encode, record: Record) -> list[Rendered] | str:
    try:
        return encode(record.value)
    except ValueError as error:
        return str(error)


def _fitted(
    segments: list[Rendered],
    where: str,
    report: Report,
    max_length: int | None,
    too_long: TooLong,
) -> Iterator[list[Rendered]]:
    """The examples that a record gives: itself, none, or the pieces of it."""
    size = sum(len(segment.tokens) for segment in segments)
    if not segments or not all(segment.tokens for segment in segments):
        report.empty += 1
        report.tell(where, "no text")
        return
    if max_length is None or size <= max_length:
        report.kept += 1
        yield segments
        return
    reason = f"{size:,} tokens, more than {max_length:,}"
    if too_long == "raise":
        raise ValueError(f"{where}: {reason}; allow more, or have such records left out or split")
    report.tell(where, reason)
    if too_long == "drop":
        report.too_long += 1
        return
    (tokens, mask, _), *more = segments
    if more or not all(mask):
        raise ValueError(f"{where}: {reason}, but only documents can be split; leave it out")
    report.kept += 1
    report.split += 1
    for start in range(0, size, max_length):
        part = slice(start, start + max_length)
        yield [Rendered(tokens[part], mask[part])]


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[_Writer]:
    """A writer of a new folder; it is finished once this has closed the large files."""
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        names = ("tokens.bin", "loss_mask.bin", "images.bin")
        yield _Writer(folder, *(stack.enter_context(open(folder / name, "wb")) for name in names))


class _Writer:
    """Writes the files of a store, example after example."""

    def __init__(
        self, folder: pathlib.Path, tokens: IO[bytes], mask: IO[bytes], images: IO[bytes]
    ) -> None:
        self._folder, self._tokens, self._mask, self._images = folder, tokens, mask, images
        self._digest = hashlib.sha256()
        self._offsets, self._firsts = array.array("q", [0]), array.array("q", [0])
        self._pictures = {
            "offsets": array.array("q", [0]),
            "grids": array.array("q"),
            "examples": array.array("q", [0]),
            "order": array.array("q"),
            "places": array.array("q", [0]),
        }
        self.tokens = self.learned = self.largest = self.longest = 0

    @property
    def examples(self) -> int:
        """Number of examples so far."""
        return len(self._firsts) - 1

    def add(self, segments: list[Rendered]) -> None:
        """Writes an example."""
        before = self.tokens
        for segment in segments:
            tokens = np.asarray(segment.tokens, np.int32)
            mask = np.asarray(segment.loss_mask, np.bool_)
            for file, values in ((self._tokens, tokens), (self._mask, mask)):
                content = values.tobytes()
                file.write(content)
                self._digest.update(content)
            self.tokens += len(tokens)
            self.learned += int(mask.sum())
            self.largest = max(self.largest, int(tokens.max()))
            self._offsets.append(self.tokens)
        # Answers share the pictures of their prompt.
        pictures, order = distinct([image for segment in segments for image in segment.images])
        for picture in pictures:
            assert isinstance(picture, Picture)
            self._images.write(picture.content)
            self._digest.update(picture.content)
            self._pictures["offsets"].append(self._images.tell())
            self._pictures["grids"].extend(picture.grid)
        if len(pictures) < len(order):
            self._digest.update(order.tobytes())
        self._pictures["order"].extend(order.tolist())
        self._pictures["places"].append(len(self._pictures["order"]))
        self._pictures["examples"].append(len(self._pictures["offsets"]) - 1)
        self.longest = max(self.longest, self.tokens - before)
        self._firsts.append(len(self._offsets) - 1)

    def finish(self, about: dict[str, Any], report: Report) -> None:
        """Writes what only the end tells."""
        for values in (self._offsets, self._firsts, self._pictures["grids"]):
            self._digest.update(values.tobytes())
        np.save(self._folder / "offsets.npy", np.array(self._offsets, np.int64))
        if self.examples < len(self._offsets) - 1:
            np.save(self._folder / "examples.npy", np.array(self._firsts, np.int64))
        if self.learned == self.tokens:
            (self._folder / "loss_mask.bin").unlink()
        grids = np.array(self._pictures["grids"], np.int64).reshape(-1, 2)
        if len(grids):
            arrays: dict[str, Any] = {name: np.array(x) for name, x in self._pictures.items()}
            np.savez(self._folder / "images.npz", **arrays | {"grids": grids})
        else:
            (self._folder / "images.bin").unlink()
        meta = about | {
            "content": self._digest.hexdigest()[:32],
            "examples": self.examples,
            "segments": len(self._offsets) - 1,
            "tokens": self.tokens,
            "tokens_to_predict": self.learned,
            "images": len(grids),
            "largest_token": self.largest,
            "longest_example": self.longest,
        }
        for name, value in (("report.json", dataclasses.asdict(report)), ("meta.json", meta)):
            text = json.dumps(value, indent=2, ensure_ascii=False)
            (self._folder / name).write_text(text + "\n", encoding="utf-8")
