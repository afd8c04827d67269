"""Who has which examples: ways to split a data set among clients, from uniform to one class each.

A partition is a list of arrays of row numbers, one for each client. Every row is in exactly one of
them, every client has at least one, and the same seed gives the same partition.

    parts = partition.classes(labels, clients=10, each=2, seed=0)
    metrics.mean_emd(metrics.histograms(parts, labels))      # 1.6

Labels are any integers or strings; a class is a value that occurs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Partition = list[np.ndarray]
_TRIES = 1000
"""Draws of `dirichlet` until every client has its least."""


def uniform(examples: int, clients: int, *, seed: int) -> Partition:
    """IID: every client draws from all examples; sizes differ by one at most."""
    _check_clients(clients, examples)
    return np.array_split(np.random.default_rng(seed).permutation(examples), clients)


def classes(labels: Any, clients: int, *, each: int, seed: int) -> Partition:
    """Exactly `each` classes for every client, by shards (McMahan et al. 2017, §3).

    Classes are cut into `clients * each` shards in all, of one class each, as many of a class as
    its size asks for; a client gets shards of different classes. With equal classes all shards
    are of one size, and this is the sorting and cutting of Zhao et al. (2018).

    Args:
        labels: [examples].
        clients: how many.
        each: classes of a client.
        seed: of the draw.

    Raises:
        ValueError: there are fewer classes than `each`, too few shards for all classes, or too few
            examples for the shards.
    """
    rng, groups = np.random.default_rng(seed), _groups(labels)
    _check_clients(clients, sum(map(len, groups)))
    if not 1 <= each <= len(groups):
        raise ValueError(f"each {each}: a client can have 1 to {len(groups)} of the classes")
    if clients * each < len(groups):
        raise ValueError(
            f"{clients} clients of {each} classes cannot hold {len(groups)} classes: take at least "
            f"{math.ceil(len(groups) / each)} clients or {math.ceil(len(groups) / clients)} classes"
        )
    counts = _apportion([len(group) for group in groups], clients * each, most=clients)
    for group, count in zip(groups, counts, strict=True):
        if len(group) < count:
            raise ValueError(
                f"{clients} clients of {each} classes need {count} shards of a class with "
                f"{len(group)} examples"
            )
    need = np.full(clients, each)
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    # Those who need most come first, so that nobody is left with two shards of one class.
    for c in sorted(range(len(groups)), key=lambda c: (-counts[c], rng.random())):
        chosen = np.lexsort((rng.random(clients), -need))[: counts[c]]
        need[chosen] -= 1
        shards = np.array_split(rng.permutation(groups[c]), counts[c])
        for client, shard in zip(chosen, shards, strict=True):
            parts[client].append(shard)
    return [np.concatenate(part) for part in parts]


def mixture(labels: Any, clients: int, *, iid: float, seed: int) -> Partition:
    """A share of IID data beside classes of one's own.

    Of every class, the share `iid` is dealt out to all clients evenly and the rest goes to those
    whose own class it is: client k's is class k, counted round. With as many equal classes as
    clients the EMD is 2 (1 - iid)(1 - 1 / classes).

    Raises:
        ValueError: `iid` is not from 0 to 1, or a client has nothing.
    """
    rng, groups = np.random.default_rng(seed), _groups(labels)
    _check_clients(clients, sum(map(len, groups)))
    if not 0 <= iid <= 1:
        raise ValueError(f"iid {iid} must be from 0 (classes of their own) to 1 (IID)")
    owned: list[list[np.ndarray]] = [[] for _ in range(clients)]
    dealt = []
    for c, group in enumerate(groups):
        group = rng.permutation(group)
        cut = round(iid * len(group))
        dealt.append(group[:cut])
        owners = [k for k in range(clients) if k % len(groups) == c] or [c % clients]
        for client, own in zip(owners, np.array_split(group[cut:], len(owners)), strict=True):
            owned[client].append(own)
    rest = np.concatenate(dealt)
    return _whole([np.concatenate([*owned[k], rest[k::clients]]) for k in range(clients)])


def dirichlet(
    labels: Any, clients: int, *, concentration: float, seed: int, least: int = 1
) -> Partition:
    """Every class is divided among the clients in shares from a Dirichlet distribution.

    As in Yurochkin et al. (2019): small concentrations leave a class to few clients, large ones
    come near IID. Sizes differ too. Draws again until every client has `least` examples.

    Raises:
        ValueError: the concentration is not positive, or no draw of 1000 gave everybody `least`.
    """
    rng, groups = np.random.default_rng(seed), _groups(labels)
    _check_clients(clients, sum(map(len, groups)))
    if not concentration > 0 or not math.isfinite(concentration):
        raise ValueError(f"concentration {concentration} must be a positive number")
    for _ in range(_TRIES):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for group in groups:
            shares = rng.dirichlet(np.full(clients, concentration))
            cuts = np.round(np.cumsum(shares[:-1]) * len(group)).astype(int)
            for part, piece in zip(parts, np.split(rng.permutation(group), cuts), strict=True):
                part.append(piece)
        made = [np.concatenate(part) for part in parts]
        if min(map(len, made)) >= least:
            return made
    raise ValueError(
        f"concentration {concentration}: none of {_TRIES} draws left every one of {clients} "
        f"clients {least} examples; take a larger one, or fewer clients"
    )


def by_key(keys: Any) -> Partition:
    """One client for every value that occurs (a writer, a language, a source), in sorted order."""
    return _groups(keys)


def skewed(examples: int, clients: int, *, sigma: float, seed: int) -> Partition:
    """IID in labels, not in size: sizes are log-normal, in proportion to exp(sigma · normal).

    Raises:
        ValueError: `sigma` is negative.
    """
    _check_clients(clients, examples)
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma {sigma} must be a number from 0 (equal sizes) on")
    rng = np.random.default_rng(seed)
    logarithms = sigma * rng.standard_normal(clients)
    wanted = np.exp(logarithms - logarithms.max())
    sizes = _apportion(wanted, examples, most=examples)
    return np.split(rng.permutation(examples), np.cumsum(sizes)[:-1])


def check(parts: Sequence[np.ndarray], examples: int) -> None:
    """Whether this is a partition of so many examples.

    Raises:
        ValueError: a client has nothing, a row is unknown, or is in two places or none.
    """
    _whole(parts)
    rows = np.concatenate(parts)
    if rows.min() < 0 or rows.max() >= examples:
        wrong = rows[(rows < 0) | (rows >= examples)][0]
        raise ValueError(f"row {wrong} is not one of {examples} examples")
    counts = np.bincount(rows, minlength=examples)
    if (counts != 1).any():
        row = int(np.flatnonzero(counts != 1)[0])
        raise ValueError(f"row {row} is with {counts[row]} clients; it must be with one")


def _groups(labels: Any) -> Partition:
    """The rows of each class, in the classes' order."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"labels {labels.shape} must be one for each example, and some")
    return [np.flatnonzero(labels == value) for value in np.unique(labels)]


def _apportion(weights: Any, total: int, *, most: int) -> list[int]:
    """Whole numbers from 1 to `most` in proportion to the weights that add up to `total`."""
    weights = np.asarray(weights, float)
    counts = np.clip(np.floor(total * weights / weights.sum()), 1, most).astype(int)
    while (missing := total - counts.sum()) != 0:
        # One at a time where the share is furthest from what it should be.
        short = total * weights / weights.sum() - counts
        short[counts >= most if missing > 0 else counts <= 1] = -math.inf * np.sign(missing)
        counts[int(np.argmax(short) if missing > 0 else np.argmin(short))] += np.sign(missing)
    return counts.tolist()


def _whole(parts: Sequence[np.ndarray]) -> Partition:
    for client, part in enumerate(parts):
        if not len(part):
            raise ValueError(f"client {client} has no data: take fewer clients or more examples")
    return list(parts)


def _check_clients(clients: int, examples: int) -> None:
    if not 1 <= clients <= examples:
        raise ValueError(f"clients {clients} must be from 1 to the {examples} examples there are")
