"""Runs of several processes, one on each host.

Every process runs the same program. What they must do beside that is here: find each other, stop
when one is lost, and hand in their own rows of a batch as parts of one array.
"""

from __future__ import annotations

import os
import pathlib
import sys
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

CACHE = pathlib.Path("~/.cache/l4jax/compiled")
"""Of compiled programs, unless JAX_COMPILATION_CACHE_DIR says otherwise."""
_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_NO_CLUSTER = "coordinator_address should be defined."
"""What JAX says when it finds no cluster around it."""


def initialize(*, heartbeat_seconds: int = 60) -> None:
    """Joins the other processes of a run, and keeps compiled programs for the next one.

    To be called before anything else of JAX. Where the environment says JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID, that holds. Otherwise JAX recognizes TPU pods, GKE and
    Slurm, unless its platform is the CPU; and where it recognizes nothing this is the only process.

    A process that was not heard of for `heartbeat_seconds`, or that ends by an exception, ends all
    others. At the end of the program each waits a few minutes for the others, not longer.

    Raises:
        ValueError: the environment says some of the three, but not all, or no numbers.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(CACHE.expanduser()))
    given = {name: os.environ[name] for name in _BY_HAND if os.environ.get(name)}
    if given:
        address, count, number = _by_hand(given)
        jax.distributed.initialize(
            address, count, number, heartbeat_timeout_seconds=heartbeat_seconds
        )
    elif jax.config.values["jax_platforms"] != "cpu":
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_seconds)
        except ValueError as error:
            # Anything else is a cluster that is broken: going on would train once on every host.
            if str(error) != _NO_CLUSTER:
                raise
    if jax.process_count() > 1:
        sys.excepthook = _stop


def _by_hand(given: Mapping[str, str]) -> tuple[str, int, int]:
    """Coordinator, number of processes, and this one's number."""
    if missing := [name for name in _BY_HAND if name not in given]:
        raise ValueError(f"{', '.join(given)} also needs {', '.join(missing)}")
    address, *numbers = (given[name] for name in _BY_HAND)
    try:
        count, number = map(int, numbers)
    except ValueError:
        raise ValueError(f"{' and '.join(_BY_HAND[1:])} must be numbers, not {numbers}") from None
    return address, count, number


def _stop(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Ends the process at once: an orderly end would wait for others that wait for this one."""
    traceback.print_exception(kind, error, where)
    print(f"l4jax: process {jax.process_index()} failed; the others will stop", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def local_rows(sharding: NamedSharding, batch_size: int) -> list[int]:
    """The rows of a batch that this process's devices hold, ascending.

    Args:
        sharding: of the batch; its first dimension are the rows.
        batch_size: rows of the whole batch.
    """
    rows = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    parts = rows.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for part in parts if part for row in range(batch_size)[part[0]]})


def global_batch(
    batch: Mapping[str, np.ndarray], sharding: NamedSharding
) -> dict[str, jax.Array | Any]:
    """Arrays over all processes, of each one's rows.

    Args:
        batch: arrays whose first dimension are this process's `local_rows`.
        sharding: of the whole batch.
    """
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }
