"""How a run is told to stop or to save, and how its processes do that at the same step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
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


@contextlib.contextmanager
def signals(told: threading.Event) -> Iterator[None]:
    """Inside this block SIGTERM and Ctrl-C are told; a second Ctrl-C interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def tell(number: int, _: Any) -> None:
        if told.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        told.set()

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None stands for a handler that JAX's runtime put there.
            signal.signal(number, handler or signal.SIG_DFL)
