"""Which example comes when: shuffled epochs of one store, or of several mixed by weight.

An order is a function of the place alone: nothing is drawn one after another, so any stretch of it
is computed at once, by any process, after any restart, without lists as long as the data.

    mixture = Mixture([code, prose], [0.3, 0.7])
    order = mixture.order([len(code), len(prose)], seed=0)
    store, item = order[10**12]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np

FINEST = 1 << 16
"""Weights are shares of at most so many slots; finer ones are rounded to them."""
_ROUNDS = 6


class Picks(NamedTuple):
    """What stands at some places of an order, each Int64[n].

    Attributes:
        stores: numbers of the stores.
        items: which of its store's items each is.
    """

    stores: np.ndarray
    items: np.ndarray


class Mixture:
    """Stores to draw from, how often from each, and how many times over.

    Args:
        stores: what `store.Store` and `store.MemoryStore` are.
        weights: of each store, in any scale. After any number of examples, each store has had its
            share of them within less than one. Without weights the stores are as one, and every
            example comes once in an epoch.
        unit: what the weights are shares of: "examples" of the order, or "tokens", by the mean
            length of each store's examples.
        epochs: the order ends before any store begins another epoch; None goes on for ever.

    Raises:
        ValueError: there is no store, one is empty, or weights do not fit them.
    """

    def __init__(
        self,
        stores: Sequence[Any],
        weights: Sequence[float | int] | None = None,
        *,
        unit: Literal["examples", "tokens"] = "examples",
        epochs: int | None = None,
    ) -> None:
        if not stores:
            raise ValueError("a mixture needs at least one store")
        for number, store in enumerate(stores):
            if not len(store) or not int(store.lengths.sum()):
                raise ValueError(f"store {number} of the mixture ({store!r}) is empty")
        if unit not in ("examples", "tokens"):
            raise ValueError(f"unknown unit {unit!r}; use 'examples' or 'tokens'")
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs {epochs} must be at least 1, or None for ever")
        self.stores, self.unit, self.epochs = tuple(stores), unit, epochs
        self.weights = None if weights is None else _checked(weights, len(stores))
        self.first = np.cumsum([0, *(len(store) for store in stores)])
        """Number of each store's first example, counted through all stores."""

    def order(self, sizes: Sequence[int], seed: int | None) -> Order:
        """The order of each store's items: its examples, or the pieces they are cut into.

        Args:
            sizes: number of items of each store.
            seed: of the shuffle, another one in each epoch; None leaves items in their order.

        Raises:
            ValueError: the seed is negative or has more than 64 bits.
        """
        if seed is not None and not 0 <= seed < 2**64:
            raise ValueError(f"seed {seed} must be from 0 to 2**64 - 1, or None")
        shares = None
        if self.weights is not None:
            scale = [Fraction(1)] * len(sizes)
            if self.unit == "tokens":
                tokens = (int(store.lengths.sum()) for store in self.stores)
                scale = [Fraction(n, t) for n, t in zip(sizes, tokens, strict=True)]
            shares = _shares([w * s for w, s in zip(self.weights, scale, strict=True)])
        return Order(sizes, shares, seed, self.epochs)


class Order:
    """Places to items, made by `Mixture.order`.

    With shares, the stores take turns in a pattern that repeats: of every prefix of n places, store
    j has n·share_j within less than one (Tijdeman, The chairman assignment problem, 1980).
    """

    def __init__(
        self,
        sizes: Sequence[int],
        shares: Sequence[int] | None,
        seed: int | None,
        epochs: int | None,
    ) -> None:
        self._sizes = np.asarray(sizes, np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._seed = seed
        self._shares = None if shares is None else np.asarray(shares, np.int64)
        if self._shares is not None:
            self._pattern = _turns(self._shares)
            turns = [np.flatnonzero(self._pattern == j) for j in range(len(self._shares))]
            self._rank = np.empty_like(self._pattern)
            for places in turns:
                self._rank[places] = np.arange(len(places))
        if epochs is None:
            self._length = sys.maxsize
        elif self._shares is None:
            self._length = epochs * int(self._sizes.sum())
        else:
            # The first place whose store has nothing left.
            blocks, ranks = np.divmod(epochs * self._sizes, self._shares)
            after = [t[r] for t, r in zip(turns, ranks, strict=True)]
            self._length = int(min(blocks * len(self._pattern) + after))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int) -> tuple[int, int]:
        """Store and item at a place.

        Raises:
            IndexError: the order has no such place.
        """
        if not 0 <= place < self._length:
            raise IndexError(f"place {place} is not in an order of {self._length}")
        stores, items = self.at(np.array([place]))
        return int(stores[0]), int(items[0])

    def at(self, places: np.ndarray) -> Picks:
        """Stores and items at places, which must be in the order."""
        if self._shares is None:
            epochs, turn = np.divmod(places, self._sizes.sum())
            if self._seed is not None:
                turn = shuffled(turn, int(self._sizes.sum()), (self._seed, 0), epochs)
            stores = np.searchsorted(self._starts, turn, side="right") - 1
            return Picks(stores, turn - self._starts[stores])
        blocks, slots = np.divmod(places, len(self._pattern))
        stores = self._pattern[slots]
        turn = blocks * self._shares[stores] + self._rank[slots]
        epochs, items = np.divmod(turn, self._sizes[stores])
        if self._seed is not None:
            for j in np.unique(stores):
                mine = stores == j
                size, key = int(self._sizes[j]), (self._seed, int(j))
                items[mine] = shuffled(items[mine], size, key, epochs[mine])
        return Picks(stores, items)


def shuffled(places: np.ndarray, size: int, key: tuple[int, int], epochs: np.ndarray) -> np.ndarray:
    """What stands at places 0 to size - 1 of the permutations that a key and epochs name.

    A Feistel network permutes the smallest square power of two that holds `size`, and is applied
    until it leads back below `size` (cycle walking; Black & Rogaway, Ciphers with arbitrary finite
    domains, 2002). So it takes neither memory nor time to shuffle more.

    Args:
        places: Int64[n].
        size: number of places.
        key: two numbers, say a seed and what it is for.
        epochs: Int64[n], of each place.
    """
    # At least 3 bits, so that a few items still come in nearly every order.
    bits = np.uint64(max(3, -(-max(size - 1, 1).bit_length() // 2)))
    mask = (np.uint64(1) << bits) - np.uint64(1)
    first = np.asarray([key[0]], np.uint64)
    keys = _mixed(_mixed(_mixed(first) + np.uint64(key[1])) + epochs.astype(np.uint64))
    found = places.astype(np.uint64)
    walking = np.arange(len(found))
    while len(walking):
        left, right, now = found[walking] >> bits, found[walking] & mask, keys[walking]
        for _ in range(_ROUNDS):
            now = _mixed(now)
            left, right = right, left ^ (_mixed(now ^ right) & mask)
        found[walking] = (left << bits) | right
        walking = walking[found[walking] >= size]
    return found.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """One step of the generator SplitMix64 (Steele, Lea & Flood, 2014): 64 bits, well stirred."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _checked(weights: Sequence[float | int], count: int) -> list[Fraction]:
    """Weights as the decimals that were written: 0.1 is a tenth."""
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} stores; give one for each")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weight {weight} must be a positive number; leave such a store out")
    return [Fraction(str(float(weight))) for weight in weights]


def _shares(weights: Sequence[Fraction]) -> list[int]:
    """Weights as the fewest slots that say them, rounded where that is more than `FINEST`."""
    unit = math.lcm(*(w.denominator for w in weights))
    whole = [int(w * unit) for w in weights]
    divisor = math.gcd(*whole)
    whole = [w // divisor for w in whole]
    if sum(whole) <= FINEST:
        return whole
    return [max(1, round(Fraction(w * FINEST, sum(whole)))) for w in whole]


def _turns(shares: np.ndarray) -> np.ndarray:
    """The store of every slot, Int64[sum of shares].

    Tijdeman's rule: of the stores that lag far enough behind their share, the one takes its turn
    that would soonest lag too far.
    """
    count, total = len(shares), int(shares.sum())
    slack = 1 / max(2 * count - 2, 1)
    lag = np.zeros(count, np.int64)  # of each store, in slots · total
    turns = np.empty(total, np.int64)
    for slot in range(total):
        lag += shares
        deadline = np.where(lag >= slack * total, ((1 - slack) * total - lag) / shares, np.inf)
        chosen = int(deadline.argmin())
        turns[slot] = chosen
        lag[chosen] -= total
    return turns
