"""What scripts read from and say to whoever runs them."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import tyro
from rich.console import Console

from l4jax import distributed
from l4jax.training import signals

INTERRUPTED, STOPPED = 128 + signal.SIGINT, 128 + signal.SIGTERM
CONSOLE = Console(stderr=True)
S = TypeVar("S")


def main(kind: type[S], run: Callable[[S], Any], about: str | None, name: str) -> int:
    """Reads the command line of what is no `leaves.Recipe` and runs it; errors are one line.

    Args:
        kind: dataclass of its leaves.
        run: does it.
        about: the script's docstring.
        name: what errors begin with.
    """
    status = 2
    try:
        settings = tyro.cli(kind, description=about, config=(tyro.conf.OmitArgPrefixes,))
        status = 1
        distributed.initialize()
        with signals.ending():
            run(settings)
    except (KeyboardInterrupt, signals.Stopped) as error:
        ended = isinstance(error, signals.Stopped)
        print(f"{name}: {error if ended else 'interrupted'}", file=sys.stderr)
        return STOPPED if ended else INTERRUPTED
    except (ImportError, OSError, ValueError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return status
    return 0


def say(text: str) -> None:
    """Prints a line for people, once however many processes there are."""
    if jax.process_index() == 0:
        CONSOLE.print(text, markup=False, highlight=False)


def told(text: str) -> contextlib.AbstractContextManager[Any]:
    """Shows what takes a while."""
    return CONSOLE.status(text)
