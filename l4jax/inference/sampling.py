"""The next token from logits: greedy, or drawn after temperature, top-k and top-p.

Letters: see `models.layers`; c candidates, best first.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. Hashable: jitted functions take it as a static argument."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token and ignores the other two."""
    top_k: int | None = None
    """Draw from this many most likely tokens; None or 0 from all."""
    top_p: float = 1.0
    """Then draw from the fewest most likely tokens that together reach this probability."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} must be finite and 0 or more")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be greater than 0 and at most 1")


def sample(
    logits: Float32[Array, "b v"],
    key: PRNGKeyArray,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Int[Array, " b"]:
    """One token for each row.

    A row's draw depends on `key`, its place in the batch and its own logits, never on other rows.
    Among equal logits the lower id counts as more likely, so that top-k and top-p keep exactly as
    many tokens as they say.

    Raises:
        ValueError: a value is outside the range that `Sampling` documents.
    """
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    b, v = logits.shape
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(b))
    draw = jax.vmap(jax.random.categorical)
    scaled = logits / temperature
    candidates = min(top_k or v, v)
    if candidates == v and top_p == 1:
        return draw(keys, scaled).astype(jnp.int32)
    best, tokens = jax.lax.top_k(scaled, candidates)
    if top_p < 1:
        best = jnp.where(_within(best, top_p), best, -jnp.inf)
    return jnp.take_along_axis(tokens, draw(keys, best)[:, None], axis=1)[:, 0].astype(jnp.int32)


def _within(best: Float32[Array, "b c"], top_p: float) -> Array:
    """Whether the candidates before each one, best first, fall short of `top_p`."""
    probabilities = jax.nn.softmax(best, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The first candidate stays even if rounding should leave it a tiny positive sum before it.
    return (before < top_p).at[:, 0].set(True)
