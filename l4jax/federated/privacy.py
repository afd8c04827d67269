"""Differential privacy of clients: each update clipped, Gaussian noise on their mean, accounting.

The guarantee is about a whole client, being there or not (McMahan et al. 2018, "Learning
Differentially Private Recurrent Language Models"), and holds only against those who see what the
server publishes: parameters, but not a round's metrics (loss, clients, excluded, dispersion, and
divergence from training on everybody's data), which get no noise. The simulation itself hides
nothing. Accounting is dp-accounting's (`pip install 'l4jax[federated]'`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

FEW = 100
"""Clients of a federation below which noise that protects leaves nothing to learn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Privacy:
    """What makes a round private."""

    clip: float
    """Largest L2 norm of a client's update."""
    noise: float
    """z: the mean of m updates gets noise of the standard deviation z · clip / m."""

    def __post_init__(self) -> None:
        if not self.clip > 0 or not self.noise >= 0:
            raise ValueError(f"clip {self.clip} must be above 0, and noise {self.noise} not below")

    def noisy(self, mean: Any, clients: int, key: jax.Array) -> Any:
        """The mean of the clipped updates of so many clients, with its noise."""
        return with_noise(mean, self.noise * self.clip / clients, key)


def clipped(update: Any, most: float) -> Any:
    """An update, scaled so that its L2 norm is at most `most`."""
    norm = optax.tree.norm(update)
    scale = jnp.minimum(1, most / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
    return jax.tree.map(lambda x: x * scale.astype(x.dtype), update)


def with_noise(mean: Any, deviation: float, key: jax.Array) -> Any:
    """A tree with Gaussian noise on every entry."""
    leaves, tree = jax.tree.flatten(mean)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        x + deviation * jax.random.normal(k, x.shape, x.dtype)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)


def epsilon(*, noise: float, rounds: int, delta: float, share: float = 1.0) -> float:
    """ε that goes with δ after so many rounds, by Rényi accounting (Mironov 2017).

    Args:
        noise: z, see `Privacy`; without any, ε is infinite.
        rounds: how many.
        delta: probability that the guarantee fails.
        share: probability that a client is in a round, independently of all others (Poisson
            sampling). `clients.Participation` draws a fixed number, for which this is the usual
            approximation and not a proof.

    Raises:
        ValueError: an argument is out of range, or dp-accounting is not installed.
    """
    if not 0 < delta < 1 or not 0 < share <= 1 or rounds < 1 or noise < 0:
        raise ValueError(
            f"delta {delta} and share {share} must be from 0 to 1, rounds {rounds} at least 1 and "
            f"noise {noise} not negative"
        )
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError:
        raise ValueError("accounting needs dp-accounting: pip install 'l4jax[federated]'") from None
    event = dp_accounting.PoissonSampledDpEvent(share, dp_accounting.GaussianDpEvent(noise))
    return float(rdp.RdpAccountant().compose(event, rounds).get_epsilon(delta))


def warnings(*, clients: int, epsilon: float, delta: float) -> list[str]:
    """What should be said beside an ε; nothing if it is a guarantee worth the name."""
    found = []
    if clients < FEW:
        found.append(
            f"{clients} clients are too few: noise that hides one of them hides what they have in "
            f"common too; take this as a demonstration, not as protection"
        )
    if delta * clients >= 1:
        found.append(
            f"delta {delta:g} with {clients} clients allows one of them to be exposed entirely; "
            f"it should be far below {1 / clients:g}"
        )
    if epsilon > 10:
        found.append(f"epsilon {epsilon:.3g} is no protection in practice; 1 to 10 is common")
    return found
