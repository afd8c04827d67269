"""A small federation: three classes in seven dimensions, clients of odd sizes, plain networks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

SIZES = (4, 11, 7, 13, 1)
"""Of the clients."""


def pool(examples: int = 36, seed: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.sort(rng.integers(0, 3, examples)).astype(np.int32)
    x = rng.standard_normal((examples, 7)) + 1.5 * np.eye(7)[y]
    return {"x": x.astype(np.float32), "y": y}


def parts(sizes=SIZES) -> list[np.ndarray]:
    """Neighbouring rows, so that clients differ in their classes."""
    edges = np.cumsum([0, *sizes])
    return [np.arange(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def linear(dtype=np.float32) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    kernel = 0.3 * rng.standard_normal((7, 3))
    return {"output": {"kernel": jnp.asarray(kernel, dtype), "bias": jnp.zeros(3, dtype)}}


def loss(params, batch, key):
    """Mean cross-entropy of a network of dense layers with tanh between them."""
    x = batch["x"]
    if "fc1" in params:
        x = jnp.tanh(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    logits = x @ params["output"]["kernel"] + params["output"]["bias"]
    values = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return jnp.sum(values * batch["mask"]) / jnp.maximum(jnp.sum(batch["mask"]), 1)


def far(a, b) -> float:
    """The largest difference between two trees' entries."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in pairs)


def same(a, b) -> bool:
    """Whether two trees are equal bit for bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
