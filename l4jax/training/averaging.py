"""The average of several checkpoints of one model, parameter by parameter.

Llama 3 is the Polyak average of checkpoints from its annealing (Llama 3 paper, §3.4.3), and each of
its reward, SFT and DPO models the average of several runs (§4.1.5).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from l4jax import checkpoints, paths
from l4jax.models.llama4 import Llama


def average(
    directories: Sequence[str | os.PathLike[str]], weights: Sequence[float] | None = None
) -> Llama:
    """The model whose every parameter is the mean of those in the checkpoints.

    Checkpoints are read one after the other, sharded on the current mesh: memory holds one of them
    and the sum, which is float32. The result has the first one's types.

    Args:
        directories: checkpoints in any format that `checkpoints.load` reads.
        weights: of each in the mean; they need not add up to 1. Equal by default.

    Raises:
        ValueError: there is no checkpoint, the weights do not fit, a checkpoint has another
            architecture than the first, or quantized parameters.
    """
    if not directories:
        raise ValueError("no checkpoint to average")
    weights = [1.0] * len(directories) if weights is None else list(weights)
    if len(weights) != len(directories) or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(
            f"weights {weights} must be one for each of {len(directories)} checkpoints, none of "
            "them negative and one of them positive"
        )
    first = checkpoints.read_config(directories[0])
    for directory in directories[1:]:
        if checkpoints.read_config(directory) != first:
            raise ValueError(f"{directory}: another architecture than that of {directories[0]}")
    shares = [weight / sum(weights) for weight in weights]
    model = checkpoints.load(directories[0])
    execution, (graph, state) = model.execution, nnx.split(model)
    total = jax.tree.map(
        lambda x: shares[0] * x.astype(jnp.float32), _params(directories[0], model)
    )
    outline = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    del model, state
    for directory, share in zip(directories[1:], shares[1:], strict=True):
        params = _params(directory, checkpoints.load(directory, execution=execution))
        if paths.names(params) != paths.names(total):
            raise ValueError(f"{directory}: its layers are not stacked as in {directories[0]}")
        total = jax.tree.map(lambda x, y, w=share: x + w * y.astype(jnp.float32), total, params)
    kinds = jax.tree.map(lambda x: x.dtype, nnx.to_pure_dict(outline))
    nnx.replace_by_pure_dict(outline, jax.tree.map(lambda x, kind: x.astype(kind), total, kinds))
    return nnx.merge(graph, outline)


def _params(directory: Any, model: Llama) -> Any:
    params = nnx.to_pure_dict(nnx.state(model))
    for name, x in zip(paths.names(params), jax.tree.leaves(params), strict=True):
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise ValueError(f"{directory}: {name} is {x.dtype}; quantized numbers have no mean")
    return params
