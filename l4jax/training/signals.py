"""How a run is told to stop or to save, and how its processes do that at the same step.

A run that trains saves first (`signals`). Before and after that there is nothing to save, only what
is half written to remove (`ending`).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

SAVE, STOP = 1, 2


class Agreed:
    """The most that any process wants: all know it at the same step, if several, one step late."""

    def __init__(self) -> None:
        self.found = 0
        self._coming: jax.Array | None = None

    def ask(self, wish: int) -> int:
        """What was wanted; of several processes, when they last asked."""
        if jax.process_count() == 1:
            self.found = wish
            return wish
        self.found = 0 if self._coming is None else int(self._coming)
        mesh = jax.sharding.get_mesh()
        place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        here = np.full(len(mesh.local_devices), wish, np.int32)
        wishes = jax.make_array_from_process_local_data(place, here, (mesh.size,))
        self._coming = _most(wishes)
        return self.found

    def clear(self) -> None:
        """Forgets what was asked last."""
        self._coming = None


@jax.jit
def _most(wishes: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(wishes.max(), PartitionSpec())


class Stopped(BaseException):
    """The process was told to end, and nothing is to be done any more but to leave no mess."""


@contextlib.contextmanager
def signals(told: threading.Event) -> Iterator[None]:
    """Inside this block SIGTERM and Ctrl-C are told; a second Ctrl-C interrupts."""

    def tell(number: int, _: Any) -> None:
        if told.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        told.set()

    with _handling(tell, signal.SIGTERM, signal.SIGINT):
        yield


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Inside this block SIGTERM raises `Stopped`, as Ctrl-C raises KeyboardInterrupt."""

    def end(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough
        raise Stopped("told to stop")

    with _handling(end, signal.SIGTERM):
        yield


@contextlib.contextmanager
def _handling(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """Signals go to `handler`, where Python allows it: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            # None stands for a handler that JAX's runtime put there.
            signal.signal(number, earlier or signal.SIG_DFL)
