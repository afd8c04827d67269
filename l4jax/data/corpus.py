"""A real corpus that every machine has: the Python standard library's own sources."""

from __future__ import annotations

import hashlib
import pathlib
import sysconfig
from typing import NamedTuple

_LEFT_OUT = frozenset(
    ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "encodings")
)
"""What users installed, tests, a bundled program, and character tables, which are no text."""


class Corpus(NamedTuple):
    """Documents, split so that no file is on both sides."""

    train: list[str]
    held_out: list[str]


def standard_library(*, held_out_percent: int = 10, max_bytes: int | None = None) -> Corpus:
    """The sources of the Python standard library, one document per file.

    A file's side is decided by a hash of its relative path, so it stays on that side when files
    come and go. With `max_bytes`, files are taken in the order of that hash until they add up.

    Raises:
        FileNotFoundError: this Python came without the sources of its library.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = [
        path.relative_to(root)
        for path in root.rglob("*.py")
        if not _LEFT_OUT.intersection(path.relative_to(root).parts)
    ]
    if not files:
        raise FileNotFoundError(f"{root}: no Python sources; this Python came without them")
    corpus, total = Corpus([], []), 0
    for path in sorted(files, key=_digest):
        text = (root / path).read_text(encoding="utf-8", errors="replace")
        total += (root / path).stat().st_size
        if max_bytes is not None and total > max_bytes:
            break
        if text.strip():
            held_out = int(_digest(path)[-8:], 16) % 100 < held_out_percent
            (corpus.held_out if held_out else corpus.train).append(text)
    return corpus


def _digest(path: pathlib.PurePath) -> str:
    return hashlib.sha256(path.as_posix().encode()).hexdigest()
