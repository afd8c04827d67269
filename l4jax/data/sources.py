"""Records from files: JSON, Parquet, plain text, ArrayRecord, saved Hugging Face datasets.

    for record in Source("data/*.jsonl.gz").records(Report()):
        print(record.where, record.value["text"])

A record is an object with names and values, and knows where it stands (`file:line`, or `file#row`
where there are no lines), so that whatever is wrong with it can be told.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

Format = Literal["jsonl", "json", "parquet", "text", "array_record", "arrow"]
OnError = Literal["raise", "skip"]
SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
    ".arrow": "arrow",
}
"""Format of a file by its name's end; before .gz too where the format is text."""
_ZIPPED = ("jsonl", "json", "text")
_SCHEMES = {"gs://": "gcsfs", "s3://": "s3fs"}
_ROWS = 1024
_REASONS = 20


class Record(NamedTuple):
    """One object, and the place it was read from."""

    value: dict[str, Any]
    where: str


@dataclasses.dataclass
class Report:
    """What became of the records of some files.

    Attributes:
        read: records met.
        kept: records that became examples.
        refused: records that are malformed or of another kind than wanted.
        empty: records without any text.
        too_long: examples left out for their length.
        split: examples cut into several for their length.
        reasons: where and why, of the first few that were not kept whole.
    """

    read: int = 0
    kept: int = 0
    refused: int = 0
    empty: int = 0
    too_long: int = 0
    split: int = 0
    reasons: list[str] = dataclasses.field(default_factory=list)

    def tell(self, where: str, reason: str) -> None:
        """Keeps a reason, if it is one of the first."""
        if len(self.reasons) < _REASONS:
            self.reasons.append(f"{where}: {reason}")

    def refuse(self, where: str, reason: str, on_error: OnError) -> None:
        """Counts a record that cannot be used.

        Raises:
            ValueError: unless such records are to be skipped.
        """
        if on_error == "raise":
            raise ValueError(f"{where}: {reason}")
        self.refused += 1
        self.tell(where, reason)

    def summary(self) -> str:
        """One line for people."""
        left = {
            "refused": self.refused,
            "empty": self.empty,
            "too long": self.too_long,
            "split": self.split,
        }
        told = [f"{count:,} {name}" for name, count in left.items() if count]
        return ", ".join([f"{self.kept:,} of {self.read:,} records kept", *told])


class Source:
    """Files that hold records.

    A file's format is that of its name's end: see `SUFFIXES`. In a folder, all files of one format
    are read, in the order of their names; names that begin with a dot or an underscore are not, nor
    those whose end says nothing. A folder that `datasets` saved is read as it says itself.

    Args:
        path: a file, a folder or a pattern (`*`, `?`, `**`), here or at gs:// or s3://; or several.
        format: of every file, whatever its name; "text" makes a document of each file.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the format is unknown or not to be told, or a folder has files of several.
        ImportError: the package for such addresses is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        format: Format | None = None,
    ) -> None:
        if format is not None and format not in _READERS:
            raise ValueError(f"unknown format {format!r}; use one of {', '.join(_READERS)}")
        paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
        if not paths:
            raise ValueError("no path is given")
        self._format = format
        self.files: list[Any] = [file for one in paths for file in _found(os.fspath(one), format)]
        """Every file, in the order they are read."""

    def __repr__(self) -> str:
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"Source({str(self.files[0])!r}{more})"

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(_stamp(file)[0] for file in self.files)

    def fingerprint(self) -> str:
        """Of the files' names, sizes and times of change; their content is not read."""
        parts = [self._format, [[file.name, *_stamp(file)] for file in self.files]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def records(self, report: Report, *, on_error: OnError = "raise") -> Iterator[Record]:
        """All records.

        Args:
            report: counts the records read and those refused.
            on_error: whether a malformed record ends everything, or is reported and skipped.

        Raises:
            ValueError: a record is malformed, or a file is damaged.
            ImportError: the package that reads such files is not installed.
        """
        for file in self.files:
            format = self._format or _format_of(file.name)
            assert format is not None
            for value, where in _READERS[format](file):
                report.read += 1
                if isinstance(value, dict):
                    yield Record(value, where)
                else:
                    report.refuse(where, str(value), on_error)


# --- Finding files -------------------------------------------------------------------------------
def _found(path: str, format: Format | None) -> list[Any]:
    """The files at a path, a pattern or an address."""
    place = _place(path)
    if any(sign in path for sign in "*?[") and not place.exists():
        files = sorted(_globbed(path), key=str)
        if not files:
            raise FileNotFoundError(f"{path}: no file fits this pattern")
    elif place.is_dir():
        return _in_folder(place, format)
    else:
        if not place.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        files = [place]
    for file in files:
        if format is None and _format_of(file.name) is None:
            raise ValueError(
                f"{file}: its name does not tell its format; pass format=, one of "
                f"{', '.join(_READERS)}, or use an end like {', '.join(SUFFIXES)}"
            )
    return files


def _in_folder(folder: Any, format: Format | None) -> list[Any]:
    """The files in a folder and in the folders in it."""
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        raise ValueError(f"{folder}: holds several datasets; choose one of {', '.join(splits)}")
    if format is None and (folder / "state.json").exists():
        state = json.loads((folder / "state.json").read_text())
        return [folder / part["filename"] for part in state["_data_files"]]
    files = sorted(_walk(folder), key=str)
    if format is not None:
        known = files
    else:
        known = [file for file in files if _format_of(file.name)]
        kinds = sorted({str(_format_of(file.name)) for file in known})
        if len(kinds) > 1:
            raise ValueError(
                f"{folder}: has files of several formats ({', '.join(kinds)}); "
                "pass a pattern such as *.jsonl"
            )
    if not known:
        seen = ", ".join(file.name for file in files[:3]) or "no file"
        raise FileNotFoundError(
            f"{folder}: found {seen}; wanted names that end in {', '.join(SUFFIXES)}, "
            "or pass format="
        )
    return known


def _walk(folder: Any) -> Iterator[Any]:
    for path in folder.iterdir():
        if path.name.startswith((".", "_")):
            continue
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def _globbed(path: str) -> list[Any]:
    if "://" not in path:
        return [pathlib.Path(p) for p in glob.glob(path, recursive=True) if os.path.isfile(p)]
    scheme, _, rest = path.partition("://")
    parts = rest.split("/")
    fixed = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
    base = _place(f"{scheme}://{'/'.join(parts[:fixed])}")
    return [file for file in base.glob("/".join(parts[fixed:])) if not file.is_dir()]


def _place(path: str) -> Any:
    """A path here, or at an address.

    Raises:
        ValueError: an address of another kind.
        ImportError: naming the package that is missing.
    """
    if "://" not in path:
        return pathlib.Path(path).expanduser()
    package = next((name for scheme, name in _SCHEMES.items() if path.startswith(scheme)), None)
    if package is None:
        raise ValueError(
            f"{path}: only {' and '.join(_SCHEMES)} addresses and local paths are read"
        )
    from etils import epath

    try:
        place = epath.Path(path)
        place.exists()
    except ImportError as error:
        raise ImportError(f"{path}: reading there needs: pip install {package}") from error
    return place


def _format_of(name: str) -> Format | None:
    stem, end = os.path.splitext(name)
    if end == ".gz":
        inner = SUFFIXES.get(os.path.splitext(stem)[1])
        return inner if inner in _ZIPPED else None
    return SUFFIXES.get(end)


def _stamp(file: Any) -> tuple[int, int]:
    """Size and time of change."""
    stat = file.stat()
    if isinstance(file, pathlib.Path):
        return stat.st_size, stat.st_mtime_ns
    return int(stat.length), int(stat.mtime or 0)


# --- Reading them: pairs of a value and where it is; what is no dictionary says what is wrong -----
Read = Iterator[tuple[Any, str]]


@contextlib.contextmanager
def _opened(file: Any) -> Iterator[Any]:
    """The file's bytes, unzipped."""
    with file.open("rb") as raw:
        if not file.name.endswith(".gz"):
            yield raw
            return
        try:
            with gzip.open(raw) as unzipped:
                yield unzipped
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{file}: is damaged or no gzip file ({error})") from None


def _jsonl(file: Any) -> Read:
    """One object on each line that is not blank."""
    with _opened(file) as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _object(line), f"{file}:{number}"


def _json(file: Any) -> Read:
    """A list of objects; a file that holds lines all the same is read as such."""
    with _opened(file) as opened:
        content = opened.read().removeprefix(b"\xef\xbb\xbf")
    if not content.lstrip().startswith(b"["):
        yield from _jsonl(file)
        return
    try:
        values = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{file}: is no JSON ({error})") from None
    for number, value in enumerate(values):
        yield (value if isinstance(value, dict) else _no_object(value)), f"{file}#{number}"


def _object(content: bytes) -> dict[str, Any] | str:
    """The object written there, or what is wrong with it."""
    try:
        value = json.loads(content.decode())
    except ValueError as error:
        return f"no JSON: {error}"
    return value if isinstance(value, dict) else _no_object(value)


def _no_object(value: Any) -> str:
    return f"expected an object with names and values, not {str(value)[:60]!r}"


def _text(file: Any) -> Read:
    """The whole file as one document; line ends become those of Unix."""
    with _opened(file) as opened:
        content = opened.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield f"no UTF-8: {error}", str(file)
        return
    yield {"text": text.replace("\r\n", "\n")}, str(file)


def _parquet(file: Any) -> Read:
    pyarrow = _pyarrow(file)
    with file.open("rb") as opened:
        try:
            yield from _rows(pyarrow.parquet.ParquetFile(opened).iter_batches(_ROWS), file)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{file}: is damaged or no Parquet file ({error})") from None


def _arrow(file: Any) -> Read:
    """Arrow's stream format, in which `datasets` saves."""
    pyarrow = _pyarrow(file)
    with file.open("rb") as opened:
        try:
            with pyarrow.ipc.open_stream(opened) as stream:
                yield from _rows(stream, file)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{file}: is damaged or no Arrow stream ({error})") from None


def _pyarrow(file: Any) -> Any:
    """The package, with the parts needed here."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{file}: reading it needs pyarrow: pip install l4jax[data]") from None
    return pyarrow


def _rows(batches: Any, file: Any) -> Read:
    number = 0
    for batch in batches:
        for value in batch.to_pylist():
            yield value, f"{file}#{number}"
            number += 1


def _array_record(file: Any) -> Read:
    """Records that are JSON objects."""
    try:
        from array_record.python import array_record_module as module
    except ImportError:
        raise ImportError(
            f"{file}: reading it needs array_record: pip install l4jax[data]"
        ) from None
    with _here(file) as path:
        reader = module.ArrayRecordReader(str(path))
        try:
            for first in range(0, reader.num_records(), _ROWS):
                last = min(first + _ROWS, reader.num_records())
                for number, content in enumerate(reader.read(list(range(first, last))), first):
                    yield _object(content), f"{file}#{number}"
        finally:
            reader.close()


@contextlib.contextmanager
def _here(file: Any) -> Iterator[pathlib.Path]:
    """The file on this machine: itself, or a copy for as long as it is read."""
    if isinstance(file, pathlib.Path):
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / file.name
        with file.open("rb") as reader, path.open("wb") as writer:
            shutil.copyfileobj(reader, writer, 16 << 20)
        yield path


_READERS: dict[str, Callable[[Any], Read]] = {
    "jsonl": _jsonl,
    "json": _json,
    "parquet": _parquet,
    "text": _text,
    "array_record": _array_record,
    "arrow": _arrow,
}
