"""The parts every family shares: weights, RMS norm, SwiGLU and rotary embedding.

The legend of dimension letters, used in all shapes and einsums of the library:
b batch · t query time · s key time · d model width · n query heads · k key-value heads ·
g query heads per key-value head · h head width · e experts · f feed-forward width · v vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Float32, Int

from l4jax.config import Rope
from l4jax.sharding import apart, exchange, read, total


def weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], *, fan_in: int
) -> nnx.Param:
    """A float32 parameter with logical `axes`, normal with standard deviation fan_in^-½."""
    value = jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5
    return nnx.Param(value, axes=axes)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last dimension; normalised in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, *, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32), axes=("norm",))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """x, normalised and scaled."""
        return normalize(x, eps=self.eps) * self.scale[...].astype(x.dtype)


def normalize(x: Float[Array, "*b h"], *, eps: float) -> Float[Array, "*b h"]:
    """x / sqrt(mean(x²) + eps) over the last dimension, in float32; returned in x's type."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)


def many_rows(x: Float[Array, "*b d"]) -> bool:
    """Whether x is a shard's and its products outlast copies of weights, unlike a decode step's."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes) and 8 * x.size >= x.shape[-1] ** 2


def materialize(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """x as an array of its own, row after row, where a shard has many rows.

    Left alone, the TPU compiler forms a norm again in every product that reads it, lays activations
    out for one of these and copies them for the others, and compiles each product anew with what
    stands around it. Outside of a shard, a layout would make the partitioner gather x.
    """
    if not many_rows(x):
        return x
    by_row = with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return jax.lax.optimization_barrier(by_row)


@jax.custom_vjp
def materialize_in_training(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """`materialize` of x and of its gradient, if one is taken: several products read them then."""
    return x


materialize_in_training.defvjp(lambda x: (materialize(x), None), lambda _, d_x: (materialize(d_x),))


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) · up(x)), without biases (Shazeer 2020)."""

    def __init__(self, d: int, f: int, *, rngs: nnx.Rngs) -> None:
        self.gate = weight(rngs, (d, f), ("embed", "mlp"), fan_in=d)
        self.up = weight(rngs, (d, f), ("embed", "mlp"), fan_in=d)
        self.down = weight(rngs, (f, d), ("mlp", "embed"), fan_in=f)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """The network's output, in x's type."""
        return total(self.part(x), "tensor")

    def part(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """What this shard's part of the hidden width adds to the output."""
        axes = apart(self.gate, x)
        gate, up, down = (read(w, x.dtype, whole=not axes) for w in (self.gate, self.up, self.down))
        last = x.ndim - 1
        x = exchange(x, last, 0, *axes)
        gated, lifted = (materialize_in_training(total(x @ w, *axes)) for w in (gate, up))
        hidden = materialize_in_training(jax.nn.silu(gated) * lifted)
        return exchange(hidden @ down, 0, last, *axes)


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of each rotated pair, float32 [h/2].

    theta^(-2j/h); with scaling, wavelengths above original_context / low_freq_factor are stretched
    by `factor`, those below original_context / high_freq_factor kept, and those between blended
    linearly in original_context / wavelength (Llama 3.1; `apply_scaling` of Meta's reference code).
    """
    frequencies = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.scaling is not None:
        scaling, low = rope.scaling, rope.scaling.low_freq_factor
        cycles = scaling.original_context * frequencies / (2 * np.pi)
        # Scout sets both factors to 1: the blended band is empty and must not divide 0 by 0.
        width = scaling.high_freq_factor - low
        kept = np.clip((cycles - low) / width, 0, 1) if width else np.where(cycles < low, 0.0, 1.0)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    return frequencies.astype(np.float32)


def rotation(
    positions: Int[Array, "b t"], frequencies: np.ndarray
) -> tuple[Float32[Array, "b t 1 r"], Float32[Array, "b t 1 r"]]:
    """Cosine and sine of every position's angles (r = h/2)."""
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    # Once for all layers: XLA would move the tables, with their long code, into the loop over them.
    return jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))


def rotate(
    x: Float[Array, "b t n h"],
    cos_sin: tuple[Float32[Array, "b t 1 r"], Float32[Array, "b t 1 r"]],
) -> Float[Array, "b t n h"]:
    """`x` with pair j = (x[j], x[j + h/2]) turned by its angle, in float32.

    Meta's Llama 4 layout pairs neighbours instead; our weights are stored half-split, which needs
    no strided access, and the checkpoint tables reorder them on the way in and out.
    """
    cos, sin = cos_sin
    left, right = (half.astype(jnp.float32) for half in jnp.split(x, 2, axis=-1))
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)
