"""Runs a compiled program, where there are the devices that it is for."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

_RUNS = 5


def measure(executable: Any, runs: int = _RUNS) -> float:
    """Seconds that a compiled program takes on made-up numbers; the median, the first run apart."""
    times = []
    for _ in range(runs + 1):
        # Made anew each time, because a step takes its state's memory for its results.
        arguments, named = _arguments(executable)
        jax.block_until_ready(arguments)
        begun = time.perf_counter()
        jax.block_until_ready(executable(*arguments, **named))
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def _arguments(executable: Any) -> tuple[Any, Any]:
    """Arrays of the right shapes and places; integers are small, so that they are tokens too."""

    def make(wanted: Any, place: Any) -> jax.Array:
        def fill() -> jax.Array:
            ramp = jnp.arange(math.prod(wanted.shape), dtype=jnp.uint32).reshape(wanted.shape) % 251
            if jnp.issubdtype(wanted.dtype, jnp.floating):
                return (ramp.astype(wanted.dtype) - 125) / 5000
            return ramp.astype(wanted.dtype)

        return jax.jit(fill, out_shardings=place)()

    return jax.tree.map(make, executable.args_info, executable.input_shardings)
