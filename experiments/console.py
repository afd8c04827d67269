"""What recipes say to whoever runs them."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
from rich.console import Console

CONSOLE = Console(stderr=True)


def say(text: str) -> None:
    """Prints a line for people, once however many processes there are."""
    if jax.process_index() == 0:
        CONSOLE.print(text, markup=False, highlight=False)


def told(text: str) -> contextlib.AbstractContextManager[Any]:
    """Shows what takes a while."""
    return CONSOLE.status(text)
