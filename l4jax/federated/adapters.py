"""Averaging low-rank adapters (`l4jax.lora`): what is cheap is biased, what is right costs bytes.

A client computes with W + s·Σ_r a·b, and the mean of the clients' models has the mean of their
products in it. A server that averages a and b apart gets another one: mean(a)·mean(b) ≠ mean(a·b).
Three rules, in bytes that each client sends and gets in a round, |a|, |b| and |W| those of all
adapted matrices:

    factors    a and b averaged (FedIT; Zhang et al. 2024): |a| + |b| both ways; biased
    freeze_a   a stays as it was drawn, b is averaged (FFA-LoRA; Sun et al. 2024): |b| both ways;
               exact, as the product is linear in b; half as many numbers learn
    exact      a and b averaged, and what their product lacks of the mean of the products added to
               W (FedEx-LoRA; Singhal et al. 2024): |a| + |b| up, and down beside these what is
               added: |W|, or all clients' a and b where these are less

With `exact` the base is the server's state and changes from round to round, alike for everybody.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from l4jax import lora
from l4jax.federated import algorithms
from l4jax.federated.algorithms import Algorithm, Beside, Options
from l4jax.federated.local import Local
from l4jax.lora import LowRank

Rule = Literal["factors", "freeze_a", "exact"]


def fedavg(
    local: Local,
    rule: Rule,
    *,
    server: optax.GradientTransformation | None = None,
    options: Options = Options(),
    clients: int,
) -> Algorithm:
    """`algorithms.fedavg` of a model with adapters, of which they alone are trained and sent.

    Args:
        local: the clients' training; which parameters it trains is said here.
        rule: see the module.
        server: its optimizer; none with the rule `exact`, which is for averages.
        options: see `Options`; neither compression nor privacy with the rule `exact`.
        clients: of a round, for the bytes that the rule `exact` sends.

    Raises:
        ValueError: the rule does not go with the server or the options.
    """
    trained = second if rule == "freeze_a" else lora.trainable
    local = dataclasses.replace(local, trained=trained)
    beside = Beside(products, fold, lambda x: _down(x, clients)) if rule == "exact" else None
    return algorithms.fedavg(local, server=server, options=options, beside=beside)


def second(name: str) -> bool:
    """Whether a parameter of this dotted name is an adapter's b."""
    return name.endswith(".b")


def products(params: Any) -> list[jax.Array]:
    """Σ_r a · b of every adapter in a tree, in float32, each of its weight's shape."""
    return [product(x.a, x.b) for x in _adapters(params)]


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Σ_r a · b, in float32."""
    return jnp.einsum("...r,...r->...", a.astype(jnp.float32), b.astype(jnp.float32))


def fold(params: Any, mean: list[jax.Array]) -> Any:
    """The parameters, whose bases have what the adapters lack of these products (FedEx-LoRA, §4).

    Raises:
        ValueError: a base is no array of floating-point numbers: nothing can be added to it.
    """
    wanted = iter(mean)

    def one(x: Any) -> Any:
        if not isinstance(x, LowRank):
            return x
        if not isinstance(x.base, jax.Array) or not jnp.issubdtype(x.base.dtype, jnp.floating):
            raise ValueError(
                "the rule exact adds to the weights, which are quantized: use factors or freeze_a"
            )
        lacks = next(wanted) - product(x.a, x.b)
        base = (x.base.astype(jnp.float32) + x.scale * lacks).astype(x.base.dtype)
        return dataclasses.replace(x, base=base)

    return jax.tree.map(one, params, is_leaf=_is_adapter)


def merged(params: Any) -> Any:
    """The parameters with the weights that adapters make of their bases, in float32."""
    return jax.tree.map(
        lambda x: x.merged(jnp.float32) if _is_adapter(x) else x, params, is_leaf=_is_adapter
    )


def bias(before: Any, after: Any) -> float:
    """How wrong it is to average factors: ‖mean(a)·mean(b) − mean(a·b)‖ / ‖mean(a·b)‖.

    Args:
        before: parameters before a round with the rule `exact`.
        after: those after it; what was added to the bases is the difference.
    """
    wrong, right = [], []
    for x, y in zip(_adapters(before), _adapters(after), strict=True):
        added = y.base.astype(jnp.float32) - x.base.astype(jnp.float32)
        wrong.append(added)
        right.append(added + y.scale * product(y.a, y.b))
    return float(optax.tree.norm(wrong) / jnp.maximum(optax.tree.norm(right), 1e-30))


def _down(params: Any, clients: int) -> int:
    """Bytes of what is added to the bases."""
    found = _adapters(params)
    dense = sum(x.base.nbytes for x in found)
    return min(dense, clients * sum(x.a.nbytes + x.b.nbytes for x in found))


def _adapters(params: Any) -> list[LowRank]:
    leaves = jax.tree.leaves(params, is_leaf=_is_adapter)
    return [x for x in leaves if _is_adapter(x)]


def _is_adapter(x: Any) -> bool:
    return isinstance(x, LowRank)
