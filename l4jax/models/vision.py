"""Llama 4's image encoder: tiles of pixels to features that stand in the place of embeddings.

A tile's patches, projected, and a class token behind them, with learned positions; layers of
x + attention(norm(x)) and x + ffn(norm(x)), in which every patch sees the whole tile; without the
class token, each square of patches becomes one; an adapter; and the projection to the decoder's
width (Meta's `llama4/vision`, transformers' `Llama4VisionModel`).

On a mesh tiles lie on every axis that tokens lie on, as far as their number can be divided: round
it up with tiles that nothing refers to, rather than let devices compute copies.

Letters: see `models.layers`; m tiles, c channels, y and x pixels, t patches and the class token,
w the encoder's width, p features of a tile; d is the decoder's width.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32

from l4jax import sharding
from l4jax.config import Execution, Rope, VisionConfig
from l4jax.models.layers import rope_frequencies, rotate, weight
from l4jax.models.llama4 import LAYER_INPUT, REMAT
from l4jax.sharding import param_mesh_axes, read, total

WHOLE = "norm"
"""The logical axis of what every device holds all of."""
_WIDE = ("embed", "expert_embed")
"""Logical axes along which weights are cut and gathered for use, the finer cut first."""
Rotation = tuple[Float32[Array, "m t 1 r"], Float32[Array, "m t 1 r"]]


class LayerNorm(nnx.Module):
    """(x - mean) / √(variance + eps) · scale + bias, in float32 (Ba et al. 2016)."""

    def __init__(self, dim: int, *, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32), axes=(WHOLE,))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32), axes=(WHOLE,))
        self.eps = eps

    def __call__(self, x: Float[Array, "*b w"]) -> Float[Array, "*b w"]:
        """x, normalised, scaled and shifted, in its own type."""
        scale, bias = (read(part, jnp.float32) for part in (self.scale, self.bias))
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(x.dtype)


class Attention(nnx.Module):
    """Attention of all patches of a tile to each other, with biases."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        w, n, h = config.embed_dim, config.num_heads, config.head_dim
        wide, heads = fitting(w, *_WIDE), fitting(n, "heads")
        self.q, self.k, self.v = (
            weight(rngs, (w, n, h), (wide, heads, "head_dim"), fan_in=w) for _ in "qkv"
        )
        self.q_bias, self.k_bias, self.v_bias = (_bias((n, h), (heads, "head_dim")) for _ in "qkv")
        self.o = weight(rngs, (n, h, w), (heads, "head_dim", wide), fan_in=w)
        self.o_bias = _bias((w,), (WHOLE,))

    def __call__(self, x: Float[Array, "m t w"], angles: Rotation) -> Float[Array, "m t w"]:
        """The layer's output."""
        q, k, v = (
            (x @ part.reshape(part.shape[0], -1)).reshape(*x.shape[:2], *part.shape[1:]) + bias
            for part, bias in (
                (read(self.q, x.dtype), read(self.q_bias, x.dtype)),
                (read(self.k, x.dtype), read(self.k_bias, x.dtype)),
                (read(self.v, x.dtype), read(self.v_bias, x.dtype)),
            )
        )
        o, out = read(self.o, x.dtype), _attend(rotate(q, angles), rotate(k, angles), v)
        out = out.reshape(*x.shape[:2], -1) @ o.reshape(-1, x.shape[2])
        return total(out, *param_mesh_axes(self.o)[0]) + read(self.o_bias, x.dtype)


def _attend(
    q: Float[Array, "m t n h"], k: Float[Array, "m t n h"], v: Float[Array, "m t n h"]
) -> Float[Array, "m t n h"]:
    """softmax(q k / √h) v, of each tile and head, in the type of v; shares are computed in float32.

    Heads first, as products want them, and what comes out is divided, not the larger shares. On
    CPUs heads follow each other: the scores of one stay in the cache. Together less than half the
    time of jax.nn's attention there.
    """
    scale = q.shape[-1] ** -0.5

    def head(q: Array, k: Array, v: Array) -> Array:
        scores = jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=jnp.float32)
        most = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
        shares = jnp.exp((scores - most) * scale)
        out = jnp.matmul(shares.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / shares.sum(-1, keepdims=True)).astype(v.dtype)

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    if sharding.platform() != "cpu":
        return head(q, k, v).swapaxes(1, 2)
    apart = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    out = jax.lax.map(lambda qkv: head(*qkv), apart)
    return out.reshape(v.shape).swapaxes(1, 2)


class FeedForward(nnx.Module):
    """down(gelu(up(x))) with biases; gelu is the exact one (Hendrycks & Gimpel 2016)."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        w, f = config.embed_dim, config.mlp_dim
        wide, hidden = fitting(w, *_WIDE), fitting(f, "mlp")
        self.up = weight(rngs, (w, f), (wide, hidden), fan_in=w)
        self.up_bias = _bias((f,), (hidden,))
        self.down = weight(rngs, (f, w), (hidden, wide), fan_in=f)
        self.down_bias = _bias((w,), (WHOLE,))

    def __call__(self, x: Float[Array, "m t w"]) -> Float[Array, "m t w"]:
        """The network's output."""
        up, up_bias, down, down_bias = (
            read(part, x.dtype) for part in (self.up, self.up_bias, self.down, self.down_bias)
        )
        hidden = _gelu(x @ up + up_bias)
        return total(hidden @ down, *param_mesh_axes(self.down)[0]) + down_bias


class Block(nnx.Module):
    """One layer of the encoder."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.attention = Attention(config, rngs=rngs)
        self.ffn_norm = LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.ffn = FeedForward(config, rngs=rngs)

    def __call__(self, x: Float[Array, "m t w"], angles: Rotation) -> Float[Array, "m t w"]:
        """The layer's output."""
        x = x + self.attention(self.attention_norm(x), angles)
        return x + self.ffn(self.ffn_norm(x))


class Adapter(nnx.Module):
    """gelu(down(gelu(up(x)))), without biases; the second gelu is no mistake."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs) -> None:
        hidden = fitting(outputs, "mlp")
        self.up = weight(rngs, (inputs, outputs), (fitting(inputs, *_WIDE), hidden), fan_in=inputs)
        self.down = weight(
            rngs, (outputs, outputs), (hidden, fitting(outputs, *_WIDE)), fan_in=outputs
        )

    def __call__(self, x: Float[Array, "m p i"]) -> Float[Array, "m p o"]:
        """The network's output."""
        hidden = _gelu(x @ read(self.up, x.dtype))
        return _gelu(total(hidden @ read(self.down, x.dtype), *param_mesh_axes(self.down)[0]))


class VisionEncoder(nnx.Module):
    """The encoder with its adapter and projector; its layers are always scanned.

    Args:
        config: the architecture.
        text_dim: width of the decoder.
        execution: in which type it computes, and what its layers' backward passes compute again.
        rngs: random keys of the initial parameters. Make it on the mesh that it will run on: an
            encoder is narrow, and a dimension that the mesh does not divide is left whole.
    """

    def __init__(
        self,
        config: VisionConfig,
        text_dim: int,
        *,
        execution: Execution = Execution(),
        rngs: nnx.Rngs,
    ) -> None:
        w, inside = config.embed_dim, config.channels * config.patch_size**2
        self.config, self.execution = config, execution
        self.patches = weight(rngs, (inside, w), (WHOLE, fitting(w, *_WIDE)), fan_in=inside)
        self.class_embedding = weight(rngs, (w,), (WHOLE,), fan_in=w)
        self.positions = weight(rngs, (config.side**2 + 1, w), (WHOLE, WHOLE), fan_in=w)
        self.norm_before = LayerNorm(w, eps=config.norm_eps)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = jax.vmap(lambda key: Block(config, rngs=nnx.Rngs(params=key)))(keys)
        self.norm_after = LayerNorm(w, eps=config.norm_eps)
        out = config.output_dim
        self.adapter = Adapter(w * config.pixel_shuffle**2, out, rngs=rngs)
        self.projector = weight(rngs, (out, text_dim), (WHOLE, "embed"), fan_in=out)

    def __call__(self, tiles: Float[Array, "m c y x"]) -> Float[Array, "m p d"]:
        """Features of normalised tiles, in the type of the computation, row by row of each tile.

        On a mesh a device holds of all of them the columns that it holds of the embedding table.

        Raises:
            ValueError: tiles have another size than the model's; or an axis of the mesh does not
                divide a parameter, which was made on another mesh.
        """
        c = self.config
        size = (c.channels, c.image_size, c.image_size)
        if tiles.shape[1:] != size:
            raise ValueError(f"tiles of shape {tiles.shape[1:]} must have the model's shape {size}")
        graph, state = nnx.split(self)
        _check(state)
        cut = _tile_axes(tiles.shape[0])

        def shard(state: nnx.State, tiles: Array) -> Array:
            return nnx.merge(graph, state)._shard(tiles, cut)

        places = sharding.specs(state), PartitionSpec(cut or None)
        run = sharding.per_shard(shard, places, sharding.spec(None, None, "embed"))
        features: Array = run(state, tiles)
        return features

    def _shard(self, tiles: Array, cut: tuple[str, ...]) -> Array:
        """`__call__` on one shard: of its tiles, and then of everyone's features its columns."""
        dtype = jnp.dtype(self.execution.dtype)
        x = patches(tiles.astype(dtype), self.config.patch_size) @ read(self.patches, dtype)
        last = jnp.broadcast_to(read(self.class_embedding, dtype), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([x, last], axis=1) + read(self.positions, dtype)
        x = self.norm_before(x)
        angles = angles_of(self.config)[:, None]
        cos, sin = (
            jnp.broadcast_to(f(angles).astype(np.float32), (x.shape[0], *angles.shape))
            for f in (np.cos, np.sin)
        )

        def layer(x: Array, block: Block) -> Array:
            return block(checkpoint_name(x, LAYER_INPUT), (cos, sin))

        if self.execution.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[self.execution.remat])
        x, _ = jax.lax.scan(lambda x, block: (layer(x, block), None), x, self.layers)
        x = self.adapter(pixel_shuffle(self.norm_after(x)[:, :-1], self.config.pixel_shuffle))
        x = x @ read(self.projector, dtype)
        return _columns(x, cut, param_mesh_axes(self.projector)[1])


# --- Pixels and patches --------------------------------------------------------------------------
def tile_features(config: VisionConfig) -> int:
    """How many features, and so tokens, a tile becomes: 144 in the published models."""
    return (config.side // config.pixel_shuffle) ** 2


def patches(tiles: Float[Array, "m c y x"], size: int) -> Float[Array, "m t i"]:
    """The pixels of each square of this size, row by row; a patch's by channel, row and column."""
    m, c, y, x = tiles.shape
    cut = tiles.reshape(m, c, y // size, size, x // size, size).transpose(0, 2, 4, 1, 3, 5)
    return cut.reshape(m, (y // size) * (x // size), -1)


def pixel_shuffle(x: Float[Array, "m t w"], size: int) -> Float[Array, "m p i"]:
    """Each square of this size of a tile's patches as one, its rows' channels behind each other."""
    m, t, w = x.shape
    side = math.isqrt(t) // size
    squares = x.reshape(m, side, size, side, size, w).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(m, side**2, -1)


def angles_of(config: VisionConfig) -> np.ndarray:
    """By how much each patch's pairs are turned, in radians [t r]; not at all the class token's.

    The first half of the pairs turns with the patch's column, the others with its row, both counted
    from 1: pair k of a half by count · theta^(-2k/(h/2)) (Meta's `vision/encoder.py`).
    """
    frequencies = rope_frequencies(Rope(theta=config.rope_theta), config.head_dim // 2)
    counts = 1 + np.stack(np.divmod(np.arange(config.side**2), config.side)[::-1], axis=1)
    turned = (counts[:, :, None] * frequencies.astype(np.float64)).reshape(len(counts), -1)
    return np.pad(turned, ((0, 1), (0, 0)))


_gelu = functools.partial(jax.nn.gelu, approximate=False)


def _bias(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)


# --- On a mesh -----------------------------------------------------------------------------------
def fitting(size: int, *names: str) -> str:
    """The first of these logical axes whose shards divide a dimension of this size, or `WHOLE`."""
    return next((name for name in names if size % _shards(name) == 0), WHOLE)


def _shards(name: str) -> int:
    """Into how many parts a dimension of this logical name is cut on the current mesh."""
    (axes,) = sharding.spec(name)
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(
        sizes.get(axis, 1) for axis in ((axes,) if isinstance(axes, str) else axes or ())
    )


def _tile_axes(tiles: int) -> tuple[str, ...]:
    """The mesh axes that tiles are cut over: those of rows and of their tokens, where they divide.

    Every device of the context axis would compute the same tiles; here it need not.
    """
    cut, _ = sharding.token_axes(tiles)
    sizes = jax.sharding.get_abstract_mesh().shape
    parts = math.prod(sizes[axis] for axis in cut)
    context = sizes.get("context", 1)
    return (*cut, "context") if context > 1 and tiles % (parts * context) == 0 else cut


def _check(state: nnx.State) -> None:
    """Raises ValueError if the current mesh does not divide a parameter where it is cut."""
    sizes = jax.sharding.get_abstract_mesh().shape
    for path, param in nnx.to_flat_state(state):
        for n, axes in zip(param.get_raw_value().shape, param_mesh_axes(param), strict=True):
            parts = math.prod(sizes.get(axis, 1) for axis in axes)
            if n % parts:
                raise ValueError(
                    f"{' · '.join(axes)} of {parts} does not divide the {n} of vision parameter "
                    f"{'.'.join(map(str, path))}: make or load a model on the mesh that it runs on"
                )


def _columns(
    x: Float[Array, "m p d"], cut: tuple[str, ...], axes: tuple[str, ...]
) -> Float[Array, "all p part"]:
    """Of all shards' features, the columns that are this shard's.

    Args:
        x: this shard's features, whole.
        cut: the mesh axes that tiles are cut over.
        axes: those that columns are to be cut over.
    """
    p = x.shape[1]
    # A dimension for each axis that tiles are cut over, so that what comes is in their order.
    x = x.reshape(*(1 for _ in cut), *x.shape)
    for axis in sharding.live(*axes):
        if axis in cut:
            x = sharding.exchange(x, x.ndim - 1, cut.index(axis), axis)
        else:
            part = x.shape[-1] // sharding.size(axis)
            x = jax.lax.dynamic_slice_in_dim(x, sharding.index(axis) * part, part, axis=-1)
    for axis in cut:
        if axis not in axes:
            x = sharding.gather(x, cut.index(axis), axis)
    return x.reshape(-1, p, x.shape[-1])
