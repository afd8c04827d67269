"""A real corpus that every machine has: the Python standard library's own sources.

Texts to pre-train on, and what is mined from them: instructions, and preferences among answers.
"""

from __future__ import annotations

import hashlib
import pathlib
import sysconfig
from typing import Any, NamedTuple

from l4jax.data import mined

_LEFT_OUT = frozenset(
    ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "encodings")
)
"""What users installed, tests, a bundled program, and character tables, which are no text."""


class Corpus(NamedTuple):
    """Documents, split so that no file is on both sides."""

    train: list[str]
    held_out: list[str]


class Records(NamedTuple):
    """What `conversations` reads, split as the files are: no question is on both sides."""

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


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


def instructions(library: Corpus | None = None) -> Records:
    """Questions about the library's functions, with their true answers.

    A record has `messages` of a user and an assistant, and the `kind` of question, of which those
    in `mined.EXACT` have exactly one right answer.

    Args:
        library: the texts; `standard_library()` by default.
    """
    sides = _pairs(library)
    return Records(
        *(
            [
                {
                    "messages": [
                        {"role": "user", "content": pair.question},
                        {"role": "assistant", "content": pair.answer},
                    ],
                    "kind": pair.kind,
                }
                for pair in side
            ]
            for side in sides
        )
    )


def preferences(library: Corpus | None = None) -> Records:
    """Some of the same questions, with the true answer and one that is worse.

    A record has `prompt`, `chosen` and `rejected`, the `kind` of question, and what is wrong with
    the rejected answer, its `fault`: mismatched, shuffled, truncated or repeated.

    Args:
        library: the texts; `standard_library()` by default.
    """
    return Records(
        *(
            [
                {
                    "prompt": pair.question,
                    "chosen": pair.answer,
                    "rejected": rejected,
                    "kind": pair.kind,
                    "fault": fault,
                }
                for pair, fault, rejected in mined.spoilt(side)
            ]
            for side in _pairs(library)
        )
    )


def _pairs(library: Corpus | None) -> tuple[list[mined.Pair], list[mined.Pair]]:
    """Of both sides; what the training side asks too is not held out."""
    train, held_out = map(mined.pairs, library or standard_library())
    asked = {pair.question for pair in train}
    return train, [pair for pair in held_out if pair.question not in asked]


def _digest(path: pathlib.PurePath) -> str:
    return hashlib.sha256(path.as_posix().encode()).hexdigest()
