"""How far clients' data are from each other's, and how far their training drifts apart.

Letters: k clients, c classes. Everything here is NumPy on the host, but for `divergences`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l4jax import paths


# --- Data ----------------------------------------------------------------------------------------
def histograms(parts: Sequence[np.ndarray], labels: Any) -> np.ndarray:
    """Examples of each class with each client, Int[k c]; classes in sorted order."""
    names, numbers = np.unique(np.asarray(labels), return_inverse=True)
    return np.stack([np.bincount(numbers[part], minlength=len(names)) for part in parts])


def emd(counts: Any, population: Any = None) -> np.ndarray:
    """What Zhao et al. (2018, §3.2) call earth mover's distance, Float[k].

    Σ over classes of |share with the client − share in the population|: from 0 to 2 (1 − 1/c) where
    the population is uniform. It is the L1 distance, twice the total variation; the distance that
    optimal transport knows by that name would need a distance between classes.

    Args:
        counts: [k c], as `histograms` gives.
        population: [c], in any unit; by default all clients' together.
    """
    counts = np.asarray(counts, float)
    pooled = counts.sum(0) if population is None else np.asarray(population, float)
    shares = counts / counts.sum(1, keepdims=True)
    return np.abs(shares - pooled / pooled.sum()).sum(1)


def mean_emd(counts: Any, population: Any = None) -> float:
    """`emd` averaged over clients in proportion to their sizes."""
    return float(np.average(emd(counts, population), weights=np.asarray(counts, float).sum(1)))


# --- Weights -------------------------------------------------------------------------------------
class Divergence(NamedTuple):
    """‖w − reference‖ / ‖reference‖ of everything, and of each group of parameters."""

    total: float
    groups: dict[str, float]


def weight_divergence(
    params: Any, reference: Any, *, group: Callable[[str], str] | None = None
) -> Divergence:
    """How far federated weights are from centrally trained ones (Zhao et al. 2018, eq. 2).

    Both should have begun with the same weights, and be compared right after an averaging.

    Args:
        params: any tree of arrays.
        reference: of the same structure.
        group: of a parameter, by its dotted name; by default the name's first part.
    """
    found = divergences(params, reference, group=group, array=lambda x: np.asarray(x, np.float64))
    ratios = {name: float(x) for name, x in found.items()}
    return Divergence(ratios.pop(""), ratios)


def divergences(
    params: Any,
    reference: Any,
    *,
    group: Callable[[str], str] | None = None,
    array: Callable[[Any], Any] = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)),
) -> dict[str, Any]:
    """`weight_divergence` of each group and, as "", of everything; also in jitted functions.

    Args:
        params: any tree of arrays.
        reference: of the same structure.
        group: see `weight_divergence`.
        array: of a leaf: in the type that squares are summed in.
    """
    group = group or (lambda name: name.split(".")[0])
    sums: dict[str, Any] = {}
    theirs = jax.tree.leaves(reference)
    for name, ours, other in zip(paths.names(params), jax.tree.leaves(params), theirs, strict=True):
        a, b = array(ours), array(other)
        apart, size = sums.get(group(name), (0, 0))
        sums[group(name)] = apart + ((a - b) ** 2).sum(), size + (b**2).sum()
    sums[""] = tuple(map(sum, zip(*sums.values(), strict=True)))
    # Nothing to compare with is no divergence, as 0 / 0 would not be a number.
    return {name: (apart / (size + (size == 0))) ** 0.5 for name, (apart, size) in sums.items()}


def divergence_bound(
    previous: float,
    *,
    rate: float,
    shares: Any,
    weights: Any,
    lipschitz: Any,
    gradients: Sequence[float],
    population: Any = None,
) -> float:
    """The most by which T full-batch steps can take FedAvg from central training.

    Proposition 3.1 of Zhao et al. (2018): with a = 1 + η Σ_i p_k(i) λ_i of client k,

        ‖w_fed − w_central‖ ≤ Σ_k π_k a^T · previous
                              + η Σ_k π_k EMD_k Σ_{j=1}^{T−1} a^j · g_max(w_central at T − 1 − j)

    The sum begins at j = 1: at the first step all clients stand at the same weights, and what the
    data differ in cancels in the average. The bound is loose by orders of magnitude; it checks an
    implementation and predicts nothing.

    Args:
        previous: ‖w_fed − w_central‖ after the averaging before.
        rate: η.
        shares: p_k(i), [k c].
        weights: π_k, [k], of any sum.
        lipschitz: λ_i of each class's gradient, [c].
        gradients: g_max, the largest norm of a class's gradient, at central training's weights
            before each of its T steps.
        population: p(i), [c]; by default the clients' shares averaged by their weights.
    """
    shares, pi = np.asarray(shares, float), np.asarray(weights, float) / np.sum(weights)
    steps, pooled = len(gradients), pi @ shares if population is None else np.asarray(population)
    distance = np.abs(shares - pooled).sum(1)
    a = 1 + rate * shares @ np.asarray(lipschitz, float)
    new = sum(a**j * gradients[steps - 1 - j] for j in range(1, steps))
    return float(pi @ a**steps * previous + rate * pi @ (distance * new))
