"""Language models as clients' networks: a Llama's parameters, loss, parts, and experts' load.

Examples are rows of tokens: a pool has "tokens", Int[n t], and, of packed rows, "segment_ids" and
"positions". Who has which rows is a partition by domain, such as a package, a language, a customer.

Clients of a round follow each other (`Options.block` 1): products of a Llama are large enough by
themselves, grouped ones of experts gain nothing by batching, and several clients' activations at
once would need several times the memory. Groups of chips that train at once are a mesh axis
`clients` beside all of the model's own, whose sizes may be 1 (`mapping.make_mesh`, used under
`jax.set_mesh`), and DiLoCo between them is `algorithms.diloco`: Local's `draws` are the H steps
from one exchange to the next.

Letters: see `models.layers`; here k clients, l routed layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from l4jax import paths, sharding
from l4jax.federated import metrics
from l4jax.federated.local import Batch, Loss
from l4jax.models.llama4 import Llama

Objective = Callable[[Any, Mapping[str, Any]], tuple[jax.Array, dict[str, jax.Array]]]
"""(model, batch) → (loss, metrics); `training.objectives` has some."""
GROUPS = ("embedding", "attention", "router", "experts", "dense", "norms", "head")
"""What the parameters of a Llama are parts of. dense: feed-forward layers that every token goes
through, shared experts among them."""


def functional(model: Llama) -> tuple[Any, Callable[[Any], Llama]]:
    """A model's parameters as a nested dict, and the function that makes a model of such."""
    graph, state = nnx.split(model)

    def of(params: Any) -> Llama:
        abstract = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(abstract, params)
        return nnx.merge(graph, abstract)

    return nnx.to_pure_dict(state), of


def loss(of: Callable[[Any], Llama], objective: Objective) -> Loss:
    """A client's loss: the objective on the rows of a batch that count.

    Args:
        of: see `functional`.
        objective: a mean over the tokens that the batch's `loss_mask` leaves.
    """

    def measure(params: Any, batch: Batch, key: jax.Array) -> jax.Array:
        return objective(of(params), with_mask(batch))[0]

    return measure


def with_mask(batch: Batch) -> Batch:
    """The batch with a `loss_mask` [b t] of its rows' `mask` [b]."""
    rows = dict(batch)
    counted = rows.pop("mask")[:, None] > 0
    mask = jnp.broadcast_to(counted, rows["tokens"].shape)
    return rows | {"loss_mask": rows["loss_mask"] & mask if "loss_mask" in rows else mask}


# --- Parts ---------------------------------------------------------------------------------------
def groups(model: Llama) -> dict[str, str]:
    """Which of `GROUPS` each parameter belongs to, by its dotted name.

    Raises:
        ValueError: a matrix has something in its place that is no array: merge adapters first.
    """
    state = nnx.state(model)
    names = paths.names(nnx.to_pure_dict(state))
    found = {}
    for path, param in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        if name not in names:
            raise ValueError(f"{name} is no array: merge adapters before measuring parts")
        found[name] = _group(name, set(sharding.param_axes(param)))
    return found


def _group(name: str, axes: set[str]) -> str:
    if "vocab" in axes:
        return "head" if name == "head" else "embedding"
    for axis, group in (("router", "router"), ("experts", "experts"), ("norm", "norms")):
        if axis in axes:
            return group
    return "attention" if ".attention." in name else "dense"


# --- Experts' load -------------------------------------------------------------------------------
def load_emd(loads: Any, population: Any = None) -> np.ndarray:
    """`metrics.emd` of how clients' tokens spread over the experts of each layer, Float[k l].

    Args:
        loads: assignments to each expert on each client's text, Int[k l e]; as clients differ in
            their words, so do the experts that the same model asks.
        population: of all text, [l e]; by default all clients' together.
    """
    loads = np.asarray(loads)
    layers = range(loads.shape[1])
    whole: Sequence[Any] = [None] * len(layers) if population is None else population
    return np.stack([metrics.emd(loads[:, i], whole[i]) for i in layers], axis=1)
