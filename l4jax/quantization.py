"""Quantized models: model → model, by path rules.

`quantize` keeps matrices in few bits, to load, serve, or train adapters beside (`l4jax.lora`); the
schemes and what stands in a matrix's place are those of `kernels.quantized`.

Two ways to train with few bits in mind. `qat`, called inside an objective, rounds matrices as
`quantize` will, and passes gradients straight through: what is trained is good once quantized, but
the arithmetic stays what it was. `low_precision` computes the products themselves in int8 or fp8,
forward and backward, by qwix (extra "quant"): it is about speed, on chips that have such units.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

import l4jax.kernels.quantized as kernel
from l4jax import weights
from l4jax.kernels.quantized import GROUP, Quantized, Scheme
from l4jax.models.llama4 import Llama
from l4jax.weights import Matrix


def quantize(model: Llama, patterns: Iterable[str], scheme: Scheme, *, group: int = GROUP) -> Llama:
    """The model with the chosen matrices in few bits; all other arrays are shared.

    Works on arrays where they lie, sharded or in NumPy, one layer of a stack after the other. A
    model that does not fit beside its quantized self is quantized on disk: `checkpoints.convert`.

    Args:
        model: its chosen matrices must be floating-point.
        patterns: which matrices, see `l4jax.weights`.
        scheme: "int8" and "fp8" have one scale for each output channel, "int4" for each group of
            inputs; an attention's channels are its heads' dimensions.
        group: inputs that share a scale of int4.

    Raises:
        ValueError: a pattern fits nothing or no matrix, one is not floating-point, or the groups
            do not divide its inputs.
    """
    values = {}
    for matrix in _chosen(model, patterns, scheme):
        outline = _scale_shape(matrix, scheme, group)

        def one(w: Any, matrix: Matrix = matrix, outline: tuple[int, ...] = outline) -> Quantized:
            return _quantized(w, matrix, scheme, group, outline)

        values[matrix.name] = _by_layer(one, matrix)
    return weights.replaced(model, values)


def qat(model: Llama, patterns: Iterable[str], scheme: Scheme, *, group: int = GROUP) -> Llama:
    """The model with the chosen matrices rounded as `quantize` rounds them, gradients passed on.

    For quantization-aware training, inside what is differentiated:

        def objective(model, batch):
            return plain(quantization.qat(model, weights.EVERY, "int4"), batch)

    The straight-through gradient (Bengio et al. 2013) takes rounding for the identity. Costs the
    memory of one more copy of these matrices. Arguments and errors are those of `quantize`.
    """
    values = {}
    for matrix in _chosen(model, patterns, scheme):
        w, outline = matrix.value, _scale_shape(matrix, scheme, group)

        def one(w: Any, matrix: Matrix = matrix, outline: tuple[int, ...] = outline) -> Any:
            return _quantized(w, matrix, scheme, group, outline).astype(w.dtype)

        rounded = weights.by_layer(one, jax.lax.stop_gradient(w), matrix.stack)
        # The sum is exactly the rounded value: w less itself is 0.
        values[matrix.name] = rounded + (w - jax.lax.stop_gradient(w))
    return weights.replaced(model, values)


# --- Products in few bits ------------------------------------------------------------------------
@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["scheme"])
@dataclasses.dataclass(frozen=True)
class LowPrecision:
    """A matrix, in place of its array, by which layers multiply in few bits."""

    value: Any
    scheme: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return tuple(self.value.shape)

    @property
    def ndim(self) -> int:
        """Dimensions of the matrix."""
        return int(self.value.ndim)

    @property
    def dtype(self) -> Any:
        """Of the array."""
        return self.value.dtype

    def astype(self, dtype: Any) -> LowPrecision:
        """The same of another type, which products will have."""
        return dataclasses.replace(self, value=self.value.astype(dtype))

    def reshape(self, inputs: int, outputs: int) -> LowPrecision:
        """The same with its inputs and its outputs in one dimension each; -1 as in NumPy."""
        return dataclasses.replace(self, value=self.value.reshape(inputs, outputs))

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """x [… in] times the matrix."""
        qt = _qwix()
        inputs = (((x.ndim - 1,), (0,)), ((), ()))
        forward, backward = _PRODUCTS[self.scheme]
        config = qt.DotGeneralQtConfig(
            lhs_qtype=forward,
            rhs_qtype=forward,
            dlhs_grad_qtype=backward,
            drhs_grad_qtype=backward,
        )
        return qt.dot_general_qt(x, self.value, inputs, config).astype(x.dtype)

    def __getitem__(self, index: Any) -> LowPrecision:
        """Itself for `[...]`, which is how layers read parameters."""
        if index is not Ellipsis:
            raise TypeError("a matrix of low precision has no parts")
        return self


_PRODUCTS = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}
"""Types of the numbers multiplied in the forward pass, and of the gradients in the backward one."""


def low_precision(model: Llama, patterns: Iterable[str], scheme: Literal["int8", "fp8"]) -> Llama:
    """The model that multiplies by the chosen matrices in int8 or fp8, in training too.

    Numbers are scaled by the largest of each token (of a gradient, likewise) and of each output
    channel, at every step anew; "fp8" has e4m3 forward and e5m2 for gradients. Parameters and the
    optimizer keep their types, and have `.value` behind their names until `full` takes the model
    back. A tensor axis that cuts a matrix's inputs gives each shard scales of its own, as fsdp does
    where tokens are few (`sharding.apart`), so meshes agree within the rounding of 8 bits only.

    Routed experts are refused: their kernels take arrays of the type that they compute in.

    Raises:
        ValueError: a pattern fits nothing, no matrix, or experts; one is not floating-point.
        ModuleNotFoundError: qwix is not installed.
    """
    if scheme not in _PRODUCTS:
        raise ValueError(f"scheme {scheme!r} must be one of {', '.join(_PRODUCTS)}")
    _qwix()
    values = {}
    for matrix in weights.matrices(model, patterns):
        if matrix.experts:
            raise ValueError(f"{matrix.name} belongs to routed experts, whose products stay as is")
        _check_floating(matrix)
        values[matrix.name] = LowPrecision(matrix.value, scheme)
    return weights.replaced(model, values)


def full(model: Llama) -> Llama:
    """The model that `low_precision` was given, with its parameters as they are now."""
    found = weights.standing(model, LowPrecision)
    return weights.replaced(model, {x.name: x.value.value for x in found})


def _qwix() -> Any:
    """qwix's products with quantized gradients; they have no public name but by interception."""
    try:
        return importlib.import_module("qwix._src.core.dot_general_qt")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "products in few bits need qwix 0.1.8: pip install l4jax[quant]"
        ) from error


# --- One matrix ----------------------------------------------------------------------------------
def _chosen(model: Llama, patterns: Iterable[str], scheme: str) -> list[Matrix]:
    """The matrices to quantize, checked."""
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme {scheme!r} must be one of {', '.join(get_args(Scheme))}")
    found = weights.matrices(model, patterns)
    for matrix in found:
        _check_floating(matrix)
    return found


def _quantized(
    w: Any, matrix: Matrix, scheme: Scheme, group: int, outline: tuple[int, ...]
) -> Quantized:
    """One layer's weight [e… in… out…], with scales of this shape."""
    flat = w.reshape(*w.shape[: matrix.experts], matrix.fan_in, -1)
    values, scale = kernel.quantize(flat, scheme, group=group)
    return Quantized(values.reshape(w.shape), scale.reshape(outline))


def _check_floating(matrix: Matrix) -> None:
    """Raises ValueError if a matrix is quantized, or has something else in its place."""
    value = matrix.value
    if not isinstance(value, jax.Array | np.ndarray) or value.dtype.itemsize == 1:
        raise ValueError(
            f"{matrix.name} is not a floating-point array, but {type(value).__name__} of "
            f"{np.dtype(value.dtype).name}; quantize it before anything else takes its place"
        )


def _by_layer(one: Callable[[Any], Quantized], matrix: Matrix) -> Quantized:
    """`one` of the matrix, or of each layer of its stack, in NumPy if that is what it is in."""
    if not isinstance(matrix.value, np.ndarray):
        return weights.made(
            matrix.param, lambda w: weights.by_layer(one, w, matrix.stack), matrix.value
        )
    if not matrix.stack:
        return one(matrix.value)
    return jax.tree.map(lambda *x: np.stack(x), *(one(w) for w in matrix.value))


def _scale_shape(matrix: Matrix, scheme: Scheme, group: int) -> tuple[int, ...]:
    """Of a layer's scales beside its weight [e… in… out…].

    Raises:
        ValueError: groups do not divide the inputs, or begin inside one head and end in another.
    """
    experts, sides = matrix.batch[matrix.stack :], (matrix.fan_in, math.prod(matrix.outputs))
    groups, _ = kernel.scale_shape(sides, scheme, group=group)
    if len(matrix.inputs) == 1:
        return (*experts, groups, *matrix.outputs)
    heads, width = matrix.inputs
    if heads % groups == 0:
        return (*experts, groups, 1, *matrix.outputs)
    if groups % heads or width % (groups // heads):
        raise ValueError(
            f"int4 groups of {group} cross the {heads} heads of width {width} of {matrix.name}"
        )
    return (*experts, heads, groups // heads, *matrix.outputs)
