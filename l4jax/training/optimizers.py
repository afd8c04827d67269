"""Optimizers and learning rate schedules, put together from Optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def warmup_cosine(peak: float, *, steps: int, warmup: int, end: float = 0.1) -> optax.Schedule:
    """Linear to `peak` in `warmup` steps, then half a cosine to `end · peak` at `steps`.

    Raises:
        ValueError: the warm-up does not fit into the steps.
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup {warmup} must be at least 0 and below steps {steps}")
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, end * peak)


def adamw(
    schedule: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    moments: str = "float32",
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping by global norm; norm scales do not decay.

    `moments` is the type that both moments are kept in between steps; the arithmetic is float32.
    """
    update = optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=_decays)
    if moments != "float32":
        update = stored_as(update, moments)
    return optax.chain(optax.clip_by_global_norm(clip_norm), update)


def stored_as(inner: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """`inner`, whose floating-point state is kept in `dtype` and is float32 while it works."""

    def cast(state: Any, kind: str) -> Any:
        def one(x: Any) -> Any:
            floating = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
            return x.astype(kind) if floating else x

        return jax.tree.map(one, state)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(gradients, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)


def _decays(params: Any) -> Any:
    """True for weights. A norm's scale is recognised by its name: stacked layers add dimensions."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) != "scale", params
    )
