"""The clients of a simulation: their data as rows of one pool, and who takes part in a round.

Letters: k clients, n rows of the largest client.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Data(NamedTuple):
    """Examples, and whose they are. An example that several clients share is there once.

    pool: arrays by name, with an example in each row.
    rows: the pool's rows that a client has, Int[k n]; behind its own ones, any.
    sizes: how many are its own, Int[k].
    """

    pool: dict[str, jax.Array]
    rows: jax.Array
    sizes: jax.Array

    @property
    def clients(self) -> int:
        """How many there are."""
        return self.rows.shape[0]

    def description(self) -> dict[str, Any]:
        """What tells one federation from another: counts, and sums over the bits of its parts."""
        rows, sizes = np.asarray(self.rows), np.asarray(self.sizes)
        own = np.where(np.arange(rows.shape[1]) < sizes[:, None], rows, -1)
        return {
            "clients": self.clients,
            "examples": int(next(iter(self.pool.values())).shape[0]),
            "largest_client": int(sizes.max()),
            "smallest_client": int(sizes.min()),
            "partition": f"{zlib.crc32(own.astype(np.int64).tobytes()):08x}",
            "pool": {
                name: f"{zlib.crc32(np.asarray(x).tobytes()):08x}" for name, x in self.pool.items()
            },
        }


def gather(pool: Mapping[str, Any], parts: Sequence[Any], *, width: int | None = None) -> Data:
    """A federation of clients.

    Args:
        pool: arrays by name, all of one length.
        parts: rows of each client, as `partition` and `sharing` give them.
        width: of `Data.rows`, at least the largest client's size, which it is by default.
            Federations of one width and pool need a round compiled once, and it changes no result.

    Raises:
        ValueError: the arrays differ in length or one is called "mask", a client has nothing or
            more than `width`, or a row is not in the pool.
    """
    if "mask" in pool:
        raise ValueError("an array of the pool is called mask, as a batch's own is; rename it")
    lengths = {name: len(x) for name, x in pool.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"arrays must have a row for each example; their lengths are {lengths}")
    if not parts:
        raise ValueError("there must be at least one client")
    examples, sizes = next(iter(lengths.values())), [len(part) for part in parts]
    if 0 in sizes:
        raise ValueError(f"client {sizes.index(0)} has no data")
    if width is not None and width < max(sizes):
        raise ValueError(f"width {width}: client {np.argmax(sizes)} has {max(sizes)} examples")
    rows = np.zeros((len(parts), width or max(sizes)), np.int32)
    for client, part in enumerate(parts):
        if np.min(part) < 0 or np.max(part) >= examples:
            raise ValueError(f"client {client} has rows beyond the pool of {examples} examples")
        rows[client, : len(part)] = part
    return Data(
        {name: jnp.asarray(x) for name, x in pool.items()},
        jnp.asarray(rows),
        jnp.asarray(sizes, jnp.int32),
    )


class Cohort(NamedTuple):
    """Who takes part in a round, m of them.

    ids: Int[m]; None for all clients, in their order.
    alive: whether a client's update arrives, Bool[m].
    effort: share of its steps that it gets done, Float[m].
    """

    ids: Any
    alive: Any
    effort: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Participation:
    """How the clients of a round are drawn. What a round draws depends on its number alone."""

    per_round: int | None = None
    """Clients of a round, drawn without replacement; None for all."""
    dropout: float = 0.0
    """Probability that a client of a round never answers."""
    stragglers: float = 0.0
    """Probability that a client is late and sends what it has by then."""
    least_effort: float = 0.1
    """A straggler gets a share of its steps done, uniform from this to 1."""

    def __post_init__(self) -> None:
        if self.per_round is not None and self.per_round < 1:
            raise ValueError(f"per_round {self.per_round} must be at least 1")
        for name in ("dropout", "stragglers"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must be from 0 to 1")
        if not 0 < self.least_effort <= 1:
            raise ValueError(f"least_effort {self.least_effort} must be above 0 and at most 1")

    def draw(self, clients: int, number: int, *, seed: int) -> Cohort:
        """The cohort of a round.

        Raises:
            ValueError: there are fewer clients than a round needs.
        """
        rng = np.random.default_rng([seed, number])
        ids, count = None, self.per_round or clients
        if count > clients:
            raise ValueError(f"per_round {count} exceeds the {clients} clients there are")
        if count < clients:
            ids = np.sort(rng.choice(clients, count, replace=False)).astype(np.int32)
        alive = rng.random(count) >= self.dropout
        late = rng.random(count) < self.stragglers
        effort = np.where(late, rng.uniform(self.least_effort, 1, count), 1).astype(np.float32)
        return Cohort(ids, alive, effort)


def everybody(clients: int) -> Cohort:
    """All clients, each with all its steps."""
    return Cohort(None, np.ones(clients, bool), np.ones(clients, np.float32))
