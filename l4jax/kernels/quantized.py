"""Weights in few bits: the value a layer reads, and how weights become such values and back.

w ≈ values · scale. `scale` has as many dimensions as `values`, and each of its sizes divides the
one of `values`: 1 for a dimension that shares one scale, or the number of groups along it (the
convention of qwix's QArray). Schemes, as the published packages have them:

int8: one scale per output channel, max|w| / 127.
fp8: float8_e4m3fn, one scale per output channel, max|w| / 448.
int4: one scale per group of inputs (128), max|w| / 8, values from -8 to 7 (Meta's
    `int4_row_quantize`).

The input dimension is the second last one of our weights, the output dimension the last.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

Scheme = Literal["int8", "int4", "fp8"]
DTYPES: dict[str, np.dtype] = {
    "int8": np.dtype(np.int8),
    "int4": np.dtype(ml_dtypes.int4),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}
_LARGEST = {"int8": 127.0, "int4": 8.0, "fp8": 448.0}
_RANGES = {"int8": (-127, 127), "int4": (-8, 7), "fp8": (-448, 448)}
GROUP = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight in few bits, in place of an array; `astype` gives the numbers to compute with."""

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        """Dimensions of the weight."""
        return int(self.values.ndim)

    @property
    def dtype(self) -> Any:
        """Of the stored values."""
        return self.values.dtype

    def astype(self, dtype: Any) -> Any:
        """The weight in a floating-point type; multiplied in float32."""
        return dequantize(self.values, self.scale, dtype)

    def __getitem__(self, index: Any) -> Quantized:
        """The weight itself for `[...]`, which is how layers read parameters."""
        if index is not Ellipsis:
            raise TypeError("a quantized weight has no parts: use astype first")
        return self


def scheme_of(dtype: Any) -> Scheme | None:
    """The scheme whose values have this type."""
    return next((name for name in get_args(Scheme) if DTYPES[name] == dtype), None)


def dequantize(values: Any, scale: Any, dtype: Any) -> Any:
    """values · scale, multiplied in float32; NumPy in, NumPy out, else JAX."""
    numpy = np if isinstance(values, np.ndarray) else jnp
    wide = values.astype(np.float32)
    scale = scale.astype(np.float32)
    for axis, (groups, size) in enumerate(zip(scale.shape, values.shape, strict=True)):
        if groups not in (1, size):
            scale = numpy.repeat(scale, size // groups, axis=axis)
    with np.errstate(over="ignore"):  # whoever narrows a type looks at the result
        return (wide * scale).astype(dtype)


def scale_shape(shape: tuple[int, ...], scheme: Scheme, *, group: int = GROUP) -> tuple[int, ...]:
    """Of the scale of a weight of this shape.

    Raises:
        ValueError: int4's groups do not divide the input dimension.
    """
    *outer, inputs, outputs = shape
    if scheme != "int4":
        return (*outer, 1, outputs)
    if inputs % group:
        raise ValueError(
            f"int4 groups of {group} do not divide the {inputs} inputs of a weight of shape "
            f"{shape}; choose a group size that does"
        )
    return (*outer, inputs // group, outputs)


def quantize(w: Any, scheme: Scheme, *, group: int = GROUP) -> tuple[Any, Any]:
    """Values and float32 scales of a weight (…, inputs, outputs); see the module for the schemes.

    NumPy in, NumPy out, else JAX.

    Raises:
        ValueError: int4's groups do not divide the inputs.
    """
    numpy = np if isinstance(w, np.ndarray) else jnp
    outline = scale_shape(w.shape, scheme, group=group)
    *outer, groups, outputs = outline
    wide = w.astype(np.float32).reshape(*outer, groups, -1, outputs)
    scale = numpy.abs(wide).max(axis=-2, keepdims=True)
    # Meta's floor: a group of zeros must not divide by zero.
    scale = numpy.maximum(scale, np.float32(1e-6)) / np.float32(_LARGEST[scheme])
    scaled = wide / scale if scheme == "fp8" else numpy.rint(wide / scale)
    values = numpy.clip(scaled, *_RANGES[scheme])
    values = values if scheme == "fp8" else values.astype(np.int8)
    return values.astype(DTYPES[scheme]).reshape(w.shape), scale.reshape(outline)


# --- Two values in a byte, eight in a word -------------------------------------------------------
def unpack_bytes(x: np.ndarray) -> np.ndarray:
    """Meta's int4, (…, inputs / 2, outputs) bytes: the low half is the even input, to int4."""
    signed = x.view(np.int8)
    both = np.stack([np.left_shift(signed, 4) >> 4, signed >> 4], axis=-2)
    return both.reshape(*x.shape[:-2], 2 * x.shape[-2], x.shape[-1]).astype(DTYPES["int4"])


def pack_bytes(values: np.ndarray) -> np.ndarray:
    """The inverse of `unpack_bytes`, as uint8."""
    bits = values.astype(np.int8).view(np.uint8) & 0xF
    return bits[..., ::2, :] | (bits[..., 1::2, :] << 4)


def unpack_words(x: np.ndarray) -> np.ndarray:
    """compressed-tensors' int4, (outputs, inputs / 8) int32, lowest bits first, offset by 8."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    nibbles = (x.view(np.uint32)[..., None] >> shifts) & 0xF
    return (nibbles.astype(np.int8) - 8).reshape(*x.shape[:-1], -1).astype(DTYPES["int4"])


def pack_words(values: np.ndarray) -> np.ndarray:
    """The inverse of `unpack_words`; the last dimension must be a multiple of 8."""
    nibbles = (values.astype(np.int8) + 8).astype(np.uint32)
    nibbles = nibbles.reshape(*values.shape[:-1], -1, 8)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    return np.bitwise_or.reduce(nibbles << shifts, axis=-1).view(np.int32)
