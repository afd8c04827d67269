"""Low-rank adapters: small trained matrices beside frozen ones (LoRA; Hu et al. 2021).

An adapted weight is a value that stands in the array's place in the model, so that no line of the
model knows of it: W = base + scale · Σ_r a · b, of which only a and b are trained (`trainable`).
The base may be quantized (QLoRA; Dettmers et al. 2023): apply adapters to a quantized model.

    model = lora.apply(model, ("*.attention.*", "*.shared.*"), rank=8, alpha=16, key=key)

What it costs: attention, dense and shared layers compute x·base + scale · (x·a)·b and form no
gradient of the base. The kernels of routed experts take arrays, so there the product a·b is added
to the base of one layer at a time, and a layer's gradient is formed before it becomes a's and b's.

Letters: see `models.layers`; r rank.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l4jax import weights
from l4jax.kernels.quantized import Quantized
from l4jax.models.llama4 import Llama
from l4jax.weights import Matrix


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b"],
    meta_fields=["scale", "experts"],
)
@dataclasses.dataclass(frozen=True)
class LowRank:
    """base + scale · Σ_r a · b, in place of an array; `astype` gives what layers compute with.

    base: [layers… e… in… out…], an array or quantized. a: [layers… e… in… 1… r]. b: the same with
    1 for the inputs. experts: of weights that kernels take as arrays, layers' others only multiply.
    """

    base: Any
    a: Any
    b: Any
    scale: float
    experts: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        """Dimensions of the weight."""
        return int(self.base.ndim)

    @property
    def dtype(self) -> Any:
        """Of the base."""
        return self.base.dtype

    def astype(self, dtype: Any) -> Any:
        """To compute with in this type: the sum for experts, else something to multiply by."""
        if self.experts:
            return self.merged(dtype)
        base, a, b = (x.astype(dtype) for x in (self.base, self.a, self.b))
        return dataclasses.replace(self, base=base, a=a, b=b)

    def merged(self, dtype: Any) -> jax.Array:
        """The sum, formed in float32."""
        a, b = (x.astype(jnp.float32) for x in (self.a, self.b))
        product = jnp.einsum("...r,...r->...", a, b)
        return (self.base.astype(jnp.float32) + self.scale * product).astype(dtype)

    def reshape(self, inputs: int, outputs: int) -> LowRank:
        """The same matrix with its inputs and its outputs in one dimension each; -1 as in NumPy."""
        base = self.base.reshape(inputs, outputs)
        a, b = self.a.reshape(base.shape[0], 1, -1), self.b.reshape(1, base.shape[1], -1)
        return dataclasses.replace(self, base=base, a=a, b=b)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """x [… in] times the matrix."""
        return x @ self.base + (self.scale * (x @ self.a[:, 0])) @ self.b[0].T

    def __getitem__(self, index: Any) -> LowRank:
        """The weight itself for `[...]`, which is how layers read parameters."""
        if index is not Ellipsis:
            raise TypeError("an adapted weight has no parts: merge it first")
        return self


def apply(
    model: Llama,
    patterns: Iterable[str],
    *,
    rank: int,
    alpha: float | int,
    key: jax.Array,
    rank_stabilized: bool = False,
) -> Llama:
    """The model with adapters, which change nothing before they are trained; arrays are shared.

    a is normal, with the standard deviation that `loralib` and PEFT draw it with, (3 · inputs)^-½;
    b is 0. Both are float32. An adapter's start depends on the key and on its weight's name only.

    Args:
        model: its matrices may be quantized.
        patterns: which matrices, see `l4jax.weights`; `weights.EVERY` for all.
        rank: r, at least 1.
        alpha: the scale is alpha / r.
        key: of the random numbers.
        rank_stabilized: the scale is alpha / √r (rsLoRA; Kalajdzievski 2023).

    Raises:
        ValueError: a pattern fits nothing or no matrix, a matrix has an adapter already, or rank or
            alpha are not possible.
    """
    if not alpha > 0:
        raise ValueError(f"alpha {alpha!r} must be greater than 0")
    chosen = weights.matrices(model, patterns)
    for matrix in chosen:
        most = min(matrix.fan_in, math.prod(matrix.outputs))
        if not 1 <= rank <= most:
            raise ValueError(
                f"rank {rank} must be from 1 to {most}, the smaller side of {matrix.name}"
            )
    scale = float(alpha) / (rank**0.5 if rank_stabilized else rank)
    outlines = {matrix.name: outline(matrix, rank, scale) for matrix in chosen}
    places = {x.name: weights.place(x.param, outlines[x.name]) for x in chosen}

    def start(key: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        found = {}
        for x in chosen:
            mine = jax.random.fold_in(key, zlib.crc32(x.name.encode()))
            a = jax.random.normal(mine, outlines[x.name].a.shape) * (3 * x.fan_in) ** -0.5
            found[x.name] = a, jnp.zeros(outlines[x.name].b.shape)
        return found

    started = jax.jit(
        start, out_shardings={name: (place.a, place.b) for name, place in places.items()}
    )(key)
    values = {
        x.name: dataclasses.replace(outlines[x.name], a=started[x.name][0], b=started[x.name][1])
        for x in chosen
    }
    return weights.replaced(model, values)


def outline(matrix: Matrix, rank: int, scale: float) -> LowRank:
    """A matrix with adapters that have shapes but no numbers yet.

    Raises:
        ValueError: it has adapters already, or something else that is not an array.
    """
    if not isinstance(matrix.value, jax.Array | np.ndarray | jax.ShapeDtypeStruct | Quantized):
        raise ValueError(f"{matrix.name} has {type(matrix.value).__name__} in its place already")
    batch, inputs, outputs = matrix.batch, matrix.inputs, matrix.outputs
    a = (*batch, *inputs, *(1 for _ in outputs), rank)
    b = (*batch, *(1 for _ in inputs), *outputs, rank)
    a_like, b_like = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (a, b))
    return LowRank(matrix.value, a_like, b_like, scale, bool(matrix.experts))


def trainable(name: str) -> bool:
    """Whether a parameter of this dotted name belongs to an adapter."""
    return name.endswith((".a", ".b"))


def merge(model: Llama) -> Llama:
    """The model without adapters that computes what the adapted one does.

    A matrix keeps its base's type; a quantized one gets the type that the model computes in.
    """

    def merged(matrix: Matrix) -> jax.Array:
        base = matrix.value.base.dtype
        dtype = base if jnp.issubdtype(base, jnp.floating) and base.itemsize > 1 else None
        dtype = dtype or jnp.dtype(model.execution.dtype)

        def make(value: LowRank) -> jax.Array:
            return weights.by_layer(lambda x: x.merged(dtype), value, matrix.stack)

        return weights.made(matrix.param, make, matrix.value)

    return weights.replaced(model, {x.name: merged(x) for x in weights.standing(model, LowRank)})


def base(model: Llama) -> Llama:
    """The model as it was before its adapters, with the same arrays; a reference for DPO.

    Call it on the model that an objective is given: a step of `training` uses up the arrays of the
    state before, and with them those of a base that was taken from it.
    """
    found = weights.standing(model, LowRank)
    return weights.replaced(model, {x.name: x.value.base for x in found})


def state(model: Llama) -> dict[str, jax.Array]:
    """All adapters by name (`layers.0.attention.q.a`), and nothing of the base."""
    found = weights.standing(model, LowRank)
    return {f"{x.name}.{part}": getattr(x.value, part) for x in found for part in "ab"}


def restore(model: Llama, adapters: Mapping[str, Any]) -> Llama:
    """The model with the adapters that `state` gave of one with the same matrices adapted.

    Raises:
        ValueError: an adapter is missing, unknown or of another shape.
    """
    here = state(model)
    for name in sorted(here.keys() | adapters.keys()):
        ours, theirs = (tuple(x[name].shape) if name in x else None for x in (here, adapters))
        if ours != theirs:
            raise ValueError(f"adapter {name} has shape {theirs}; the model's has {ours}")
    new = {
        name: jax.device_put(jnp.asarray(adapters[name], x.dtype), x.sharding)
        for name, x in here.items()
    }
    return weights.replaced(
        model,
        {
            x.name: dataclasses.replace(x.value, a=new[f"{x.name}.a"], b=new[f"{x.name}.b"])
            for x in weights.standing(model, LowRank)
        },
    )


def count(model: Llama) -> int:
    """How many numbers the adapters have, which are those that are trained."""
    return sum(int(x.size) for x in state(model).values())
