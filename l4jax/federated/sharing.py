"""A small data set that all clients share: what Zhao et al. (2018, §4) propose against skew.

The server holds a set G, uniform over the classes and not taken from the clients. It trains a
warm-up model on G, and every client gets that model and a random share α of G, on which it trains
beside its own data. β = |G| / |D| is measured against all clients' data D together: with K clients
that 5 % of D is a third of what each of ten clients then trains on. ρ, the shared part of a
client's data, says that directly: for equal clients ρ = Kαβ / (1 + Kαβ), and with it the EMD falls
from EMD₀ to EMD₀ (1 − ρ).

    shared = sharing.draw(labels, spare, size=sharing.size_of(beta, parts), seed=0)
    parts, report = sharing.share(parts, shared, labels=labels, alpha=0.5, seed=0)

To know what federating is worth, train on G alone as well: `clients.gather(pool, [shared])` is a
federation of one client, whose rounds are central training.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from l4jax.federated import metrics
from l4jax.federated.partition import Partition


class Report(NamedTuple):
    """What sharing changed. beta: |G| / |D|. rho: shared part of each client's data, Float[k]."""

    beta: float
    alpha: float
    rho: np.ndarray
    emd_before: float
    emd_after: float


def size_of(beta: float, parts: Partition) -> int:
    """|G| for a β.

    Raises:
        ValueError: β is not positive.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta {beta} must be a positive share of the clients' data")
    return round(beta * sum(map(len, parts)))


def draw(labels: Any, spare: Any, *, size: int, seed: int) -> np.ndarray:
    """Rows of a shared set, as many of every class; `size` is rounded to that.

    Args:
        labels: of all examples, [examples].
        spare: rows that no client has.
        size: of the set, about.
        seed: of the draw.

    Raises:
        ValueError: that is less than one example of each class, or more than there are to spare.
    """
    labels, spare, rng = np.asarray(labels), np.asarray(spare), np.random.default_rng(seed)
    names = np.unique(labels)
    each = round(size / len(names))
    if each < 1:
        raise ValueError(f"size {size} is less than one example for each of {len(names)} classes")
    found = []
    for name in names:
        rows = spare[labels[spare] == name]
        if len(rows) < each:
            raise ValueError(f"{each} examples of class {name} are needed, {len(rows)} are spare")
        found.append(rng.choice(rows, each, replace=False))
    return np.concatenate(found)


def share(
    parts: Partition, shared: np.ndarray, *, labels: Any, alpha: float, seed: int
) -> tuple[Partition, Report]:
    """Gives every client a random share α of the shared rows, each client its own draw.

    Raises:
        ValueError: α is not from 0 to 1, or a client has shared rows already.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha} must be from 0 (nothing) to 1 (all of the shared set)")
    rng, count = np.random.default_rng(seed), round(alpha * len(shared))
    for client, part in enumerate(parts):
        if len(np.intersect1d(part, shared)):
            raise ValueError(f"client {client} has rows of the shared set: draw it from others")
    after = [np.concatenate([x, rng.choice(shared, count, replace=False)]) for x in parts]
    population = metrics.histograms(parts, labels).sum(0)
    report = Report(
        beta=len(shared) / sum(map(len, parts)),
        alpha=alpha,
        rho=np.array([count / len(part) for part in after]),
        emd_before=metrics.mean_emd(metrics.histograms(parts, labels)),
        emd_after=metrics.mean_emd(metrics.histograms(after, labels), population),
    )
    return after, report
