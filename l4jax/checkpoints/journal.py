"""What a conversion has done so far, so that the same one can go on after it was killed."""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from l4jax.checkpoints.rows import Sum


class Entry(NamedTuple):
    """The checksums of a component's tensors, read and written."""

    source: dict[str, Sum]
    target: dict[str, Sum]


class Journal:
    """The components that are on the disk, one line each, behind a line that says of which plan.

    Locked while in use, so that two conversions cannot write the same destination.
    """

    def __init__(self, file: pathlib.Path, fingerprint: str) -> None:
        self.file, self._fingerprint = file, fingerprint
        self.done: dict[str, Entry] = {}

    def __enter__(self) -> Journal:
        """Opens it and reads what is done.

        Raises:
            FileExistsError: another conversion is writing, or an unfinished one had another source
                or other options.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = open(self.file, "a+b", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._stream.close()
            raise FileExistsError(f"{self.file}: another conversion is writing there") from None
        self._stream.seek(0)
        content = self._stream.read()
        # A killed process leaves half a line at most, which counts as not written.
        self._stream.truncate(content.rfind(b"\n") + 1)
        try:
            self._understand([json.loads(line) for line in content.split(b"\n")[:-1]])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            self._stream.close()
            raise ValueError(f"{self.file}: damaged ({error!r}); {self._remove()}") from None
        except FileExistsError:
            self._stream.close()
            raise
        return self

    def _understand(self, lines: list[dict[str, Any]]) -> None:
        if not lines:
            self._append({"plan": self._fingerprint})
        elif lines[0]["plan"] != self._fingerprint:
            raise FileExistsError(
                f"{self.file}: an unfinished conversion of another source, or with other options, "
                f"lies there; {self._remove()}"
            )
        for line in lines[1:]:
            sides = (
                {key: Sum(*value) for key, value in line[side].items()}
                for side in ("source", "target")
            )
            self.done[line["component"]] = Entry(*sides)

    def _remove(self) -> str:
        return f"remove it and the folder {self.file.with_suffix('')} to begin anew"

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def add(self, entries: Iterable[tuple[str, Entry]]) -> None:
        """Says that components are done; what they wrote must be on the disk."""
        entries = list(entries)
        self._append(*({"component": name} | entry._asdict() for name, entry in entries))
        self.done.update(entries)

    def forget(self) -> None:
        """Begins anew: what the journal speaks of is gone."""
        self.done.clear()
        self._stream.truncate(0)
        self._append({"plan": self._fingerprint})

    def discard(self) -> None:
        """Removes it, when all is done or nothing was."""
        self.file.unlink(missing_ok=True)

    def _append(self, *values: dict[str, Any]) -> None:
        try:
            self._stream.write(b"".join(json.dumps(value).encode() + b"\n" for value in values))
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(self.file)) from error
