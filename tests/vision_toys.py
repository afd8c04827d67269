"""Tiny models that see, their batches, and the image encoder once more in float64 NumPy."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from conftest import build
from flax import nnx

from l4jax import paths, presets, sharding
from l4jax.config import Execution, VisionConfig
from l4jax.models.multimodal import Images, Multimodal, arrange
from l4jax.training import objectives

TEXT = presets.tiny(presets.llama4_scout())
TEXT = dataclasses.replace(TEXT, num_layers=2, pattern=TEXT.pattern[-2:])
"""A chunked layer and a global one, with chunks of 16."""
VISION = VisionConfig(
    num_layers=2,
    embed_dim=20,
    num_heads=5,
    mlp_dim=30,
    output_dim=12,
    image_size=18,
    patch_size=3,
    pixel_shuffle=3,
)
"""No two sizes alike: 36 patches of 27 numbers, four features. Most meshes do not divide it."""
PATCH, PER_TILE = 511, 4
ROWS, LENGTH = 4, 48
QUICK = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else None
BOUND = 1e-5
"""Of the largest number: two devices differ by half of that in sums of a few hundred float32."""


@functools.cache
def model_of(text=TEXT, vision=VISION, **execution):
    """A model that sees; biases and scales are such that each counts."""
    plain = build(text, **execution)
    how = Execution(**execution)
    graph, whole = nnx.split(
        nnx.eval_shape(lambda: Multimodal(text, vision, execution=how, rngs=nnx.Rngs(0)))
    )
    rng = np.random.default_rng(8)

    def fill(path, param):
        noise, name = rng.standard_normal(param.shape), str(path[-1])
        if name == "scale":
            value = 1 + 0.3 * noise
        elif "bias" in name or name in ("positions", "class_embedding"):
            value = 0.5 * noise
        else:
            fan_in = vision.embed_dim if path[-2:-1] == ("attention",) else param.shape[-2]
            value = 1.5 * noise * fan_in**-0.5
        return param.replace(jnp.asarray(value, jnp.float32))

    flat = dict(nnx.to_flat_state(nnx.state(plain)))
    for path, param in nnx.to_flat_state(whole):
        if path[0] == "vision":
            flat[path] = fill(path, param)
    return nnx.merge(graph, nnx.from_flat_state(flat))


def tiles_of(count, seed=1, vision=VISION):
    shape = (count, vision.channels, vision.image_size, vision.image_size)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def tokens_of(seed=0):
    """Row 0 has one image, row 1 none, row 2 one in two tiles and another, row 3 one at its end."""
    tokens = np.random.default_rng(seed).integers(0, PATCH, (ROWS, LENGTH), np.int32)
    tokens[0, 3:7] = tokens[2, 13:17] = tokens[2, 18:22] = tokens[2, 30:34] = PATCH
    tokens[3, -4:] = PATCH
    return tokens


def images_of(tokens, multiple=8):
    tiles = tiles_of(int((tokens == PATCH).sum()) // PER_TILE)
    return arrange(tokens, tiles, VISION, patch_id=PATCH, multiple=multiple)


@jax.jit
def run(model, tokens, images=None, segment_ids=None):
    return model(tokens, images=images, segment_ids=segment_ids)


@jax.jit
def encode(model, tiles):
    return model.vision(tiles)


@functools.partial(jax.jit, static_argnames="context")
def prefilled(model, tokens, counts, context, images=None):
    hidden, cache = model.prefill(tokens, counts, context=context, images=images)
    return model.logits(hidden), cache


@jax.jit
def extended(model, tokens, cache, images=None):
    hidden, cache = model.extend(tokens, cache, images=images)
    return model.logits(hidden), cache


def seen(model, batch):
    """Next-token prediction of rows with images."""
    found = model.hidden(batch["tokens"], images=Images(batch["tiles"], batch["places"]))
    return objectives.next_token_after(model, batch, *found)


def batch_of():
    tokens = tokens_of()
    images = images_of(tokens)
    batch = {"tokens": tokens, "tiles": images.tiles, "places": images.places}
    return jax.tree.map(jnp.asarray, batch | {"loss_mask": tokens != PATCH})


@functools.cache
def gradients_of(**execution):
    def loss(model):
        return seen(model, batch_of())[0]

    value, found = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(model_of(**execution))
    return float(value), jax.device_get(state_of(found))


def on_mesh(model):
    """The model made anew on the current mesh, with the same numbers."""
    made = nnx.eval_shape(lambda: Multimodal(model.config, model.vision.config, rngs=nnx.Rngs(0)))
    graph, abstract = nnx.split(made)
    layout = nnx.to_pure_dict(sharding.shardings(abstract))
    nnx.replace_by_pure_dict(abstract, jax.device_put(state_of(model), layout))
    return nnx.merge(graph, abstract)


def assert_equal(one, other):
    left, right = (jax.tree_util.tree_leaves_with_path(state_of(x)) for x in (one, other))
    assert [path for path, _ in left] == [path for path, _ in right]
    for (path, x), (_, y) in zip(left, right, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=paths.name(path))


def close(found, expected, bound=BOUND):
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound * np.abs(expected).max())


def state_of(module):
    return nnx.to_pure_dict(nnx.state(module))


# --- The definition ------------------------------------------------------------------------------
def defined(encoder, tiles):
    """Features [m p d] in float64 NumPy, from Meta's `llama4/vision`, one patch after the other."""
    c, w = encoder.config, jax.tree.map(lambda x: np.asarray(x, np.float64), state_of(encoder))
    return np.stack([_tile(c, w, tile) for tile in np.asarray(tiles, np.float64)])


def _norm(x, w):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w["scale"] + w["bias"]


def _gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def _tile(c, w, tile):
    side, size, s = c.side, c.patch_size, c.pixel_shuffle
    x = [
        tile[:, y * size : (y + 1) * size, x * size : (x + 1) * size].reshape(-1) @ w["patches"]
        for y in range(side)
        for x in range(side)
    ]
    x = _norm(np.stack([*x, w["class_embedding"]]) + w["positions"], w["norm_before"])
    for number in range(c.num_layers):
        layer = jax.tree.map(lambda a, n=number: a[n], w["layers"])
        x = x + _attention(c, layer["attention"], _norm(x, layer["attention_norm"]))
        ffn, y = layer["ffn"], _norm(x, layer["ffn_norm"])
        x = x + _gelu(y @ ffn["up"] + ffn["up_bias"]) @ ffn["down"] + ffn["down_bias"]
    grid = _norm(x, w["norm_after"])[:-1].reshape(side, side, -1)
    found = [
        np.concatenate([grid[y + dy, x + dx] for dy in range(s) for dx in range(s)])
        for y in range(0, side, s)
        for x in range(0, side, s)
    ]
    hidden = _gelu(np.stack(found) @ w["adapter"]["up"])
    return _gelu(hidden @ w["adapter"]["down"]) @ w["projector"]


def _attention(c, w, x):
    h, out = c.head_dim, w["o_bias"]
    for head in range(c.num_heads):
        q, k, v = (x @ w[name][:, head] + w[f"{name}_bias"][head] for name in "qkv")
        q, k = _turned(c, q), _turned(c, k)
        scores = q @ k.T / math.sqrt(h)
        odds = np.exp(scores - scores.max(-1, keepdims=True))
        out = out + odds / odds.sum(-1, keepdims=True) @ v @ w["o"][head]
    return out


def _turned(c, x):
    """Pair j is (j, j + h/2); the first half of the pairs turns by column, the others by row."""
    h, x = c.head_dim, x.copy()
    for place in range(c.side**2):
        row, column = divmod(place, c.side)
        for j in range(h // 2):
            k = j % (h // 4)
            angle = (1 + (column if j < h // 4 else row)) * 10_000.0 ** (-2 * k / (h // 2))
            z = complex(x[place, j], x[place, j + h // 2]) * complex(
                math.cos(angle), math.sin(angle)
            )
            x[place, j], x[place, j + h // 2] = z.real, z.imag
    return x
