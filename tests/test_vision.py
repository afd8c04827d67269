"""The image encoder, and models that see: against the definition, with caches, in training."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from conftest import build, outputs
from vision_toys import (
    LENGTH,
    PATCH,
    PER_TILE,
    QUICK,
    ROWS,
    TEXT,
    VISION,
    batch_of,
    close,
    defined,
    encode,
    extended,
    gradients_of,
    images_of,
    model_of,
    prefilled,
    run,
    seen,
    state_of,
    tiles_of,
    tokens_of,
)

from l4jax import paths
from l4jax.inference.decoding import generate
from l4jax.models.multimodal import Images, arrange, places
from l4jax.models.vision import tile_features
from l4jax.training.trainer import Update

WIDE_HEADS = dataclasses.replace(VISION, embed_dim=24, num_heads=3, pixel_shuffle=2, channels=2)
"""Two frequencies for each axis, more features than rows of them, and odd channels."""


@pytest.mark.parametrize("config", [VISION, WIDE_HEADS])
def test_features_equal_the_definition(config):
    model, tiles = model_of(vision=config), tiles_of(3, vision=config)
    found = np.asarray(encode(model, tiles))
    assert found.shape == (3, tile_features(config), TEXT.embed_dim)
    assert found.std() > 0.3
    close(found, defined(model.vision, tiles))


def test_logits_are_those_of_features_in_the_place_of_embeddings():
    model, tokens = model_of(), tokens_of()
    images = images_of(tokens)
    features = defined(model.vision, images.tiles).reshape(-1, TEXT.embed_dim)
    w = reference.weights_of(model)
    longer = w | {"embed": np.concatenate([w["embed"], features])}
    ids = np.where(images.places < 0, tokens, TEXT.vocab_size + images.places)
    close(np.asarray(run(model, tokens, images)), reference.forward(longer, TEXT, ids), 2e-5)


def test_bfloat16_is_near():
    tiles = tiles_of(2)
    exact, rough = encode(model_of(), tiles), encode(model_of(dtype="bfloat16"), tiles)
    assert rough.dtype == jnp.bfloat16
    error = np.abs(np.asarray(rough, np.float32) - exact)
    assert 0 < error.mean() < 0.02 * np.abs(exact).mean()


# --- What images change, and what they do not ----------------------------------------------------
def test_rows_without_images_stay_bit_for_bit():
    model, tokens = model_of(), tokens_of()
    found = np.asarray(run(model, tokens, images_of(tokens)))
    plain = np.asarray(run(model, tokens))
    np.testing.assert_array_equal(found[1], plain[1])
    np.testing.assert_array_equal(found[0, :3], plain[0, :3])
    for row, first in ((0, 3), (2, 13), (3, LENGTH - 4)):
        assert (np.abs(found[row, first:] - plain[row, first:]).max(-1) > 1e-3).all()


def test_without_images_it_is_the_text_model():
    model, tokens = model_of(), tokens_of()
    expected = np.asarray(outputs(build(TEXT), tokens).logits)
    np.testing.assert_array_equal(np.asarray(run(model, tokens)), expected)


@pytest.mark.slow
def test_it_generates_what_the_text_model_does():
    made = generate(model_of(), [[5, 6, 7], [8]], max_new_tokens=5)
    assert made == generate(build(TEXT), [[5, 6, 7], [8]], max_new_tokens=5)


def test_images_may_lie_in_any_order():
    """Tiles in another order, with places that follow them; no tile knows of another."""
    model, tokens = model_of(), tokens_of()
    images = images_of(tokens)
    order = np.array([4, 7, 0, 3, 1, 5, 2, 6])
    tile, rest = np.divmod(images.places, PER_TILE)
    moved = np.where(images.places < 0, -1, np.argsort(order)[tile] * PER_TILE + rest)
    other = Images(images.tiles[order], moved.astype(np.int32))
    np.testing.assert_array_equal(
        np.asarray(encode(model, other.tiles)), np.asarray(encode(model, images.tiles))[order]
    )
    np.testing.assert_array_equal(run(model, tokens, other), run(model, tokens, images))


def test_an_image_is_not_seen_from_another_segment():
    model, tokens = model_of(), tokens_of()
    images, segments = images_of(tokens), np.ones((ROWS, LENGTH), np.int32)
    segments[2, 24:] = 2
    changed = images.tiles.copy()
    changed[1] = tiles_of(1, seed=9)  # the first of row 2
    before, after = (
        np.asarray(run(model, tokens, Images(tiles, images.places), segments))
        for tiles in (images.tiles, changed)
    )
    different = (before != after).any(-1)
    assert different[2, 13:24].all()
    different[2, 13:24] = False
    assert not different.any()


def test_padding_tiles_are_never_seen():
    model, tokens = model_of(), tokens_of()
    images = images_of(tokens)
    exact = images_of(tokens, multiple=1)
    assert (len(images.tiles), len(exact.tiles)) == (8, 5)
    np.testing.assert_array_equal(exact.places, images.places)
    expected, spoilt = np.asarray(run(model, tokens, images)), images.tiles.copy()
    close(np.asarray(run(model, tokens, exact)), expected)
    spoilt[5:] = np.nan
    np.testing.assert_array_equal(run(model, tokens, images._replace(tiles=spoilt)), expected)


def test_a_place_behind_the_last_feature_gives_no_number():
    model, tokens = model_of(), tokens_of()
    images = images_of(tokens)
    far = np.where(images.places == 19, 8 * PER_TILE, images.places)
    found = np.asarray(run(model, tokens, images._replace(places=far)))
    assert np.isnan(found[3, -1]).all()
    assert np.isfinite(found[:3]).all()


# --- Caches --------------------------------------------------------------------------------------


# --- Caches --------------------------------------------------------------------------------------
def test_decoding_after_images_equals_the_whole():
    """A padded prompt that ends within an image, a piece with the rest and another, single tokens.

    The chunked layer's cache wraps twice.
    """
    model, tokens = model_of(), tokens_of()
    images = images_of(tokens)
    expected = np.asarray(run(model, tokens, images))
    first = images._replace(places=images.places[:, :25])
    logits, cache = prefilled(model, tokens[:, :25], np.full(ROWS, 20, np.int32), 50, first)
    close(np.asarray(logits)[:, :20], expected[:, :20])
    second = images._replace(places=images.places[:, 20:36])
    logits, cache = extended(model, tokens[:, 20:36], cache, second)
    close(np.asarray(logits), expected[:, 20:36])
    for at in range(36, 44):
        logits, cache = extended(model, tokens[:, at : at + 1], cache)
        close(np.asarray(logits)[:, 0], expected[:, at])


def test_a_prompt_whose_images_are_encoded_once_may_come_in_pieces():
    model, tokens = model_of(), tokens_of()
    images = images_of(tokens)
    expected = np.asarray(run(model, tokens, images))
    fused = jax.jit(lambda model, images: model.fuse(jnp.asarray(tokens), images))(model, images)
    cut = [fused._replace(ids=fused.ids[:, a : a + 16]) for a in (0, 16, 32)]
    logits, cache = prefilled(model, cut[0], None, 48)
    found = [logits]
    for piece in cut[1:]:
        logits, cache = extended(model, piece, cache)
        found.append(logits)
    close(np.concatenate(found, axis=1), expected)


# --- Training ------------------------------------------------------------------------------------
def test_every_parameter_of_the_encoder_learns():
    _, gradients = gradients_of()
    for path, g in jax.tree_util.tree_leaves_with_path(gradients["vision"]):
        per_layer = g if path[0].key == "layers" else g[None]
        most = np.abs(per_layer).reshape(len(per_layer), -1).max(axis=1)
        assert (most > 1e-4).all(), paths.name(path)


@pytest.mark.parametrize(
    "remat", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("dots", "attention")), "full"]
)
def test_rematerialization_changes_no_gradient(remat):
    tiles = tiles_of(2)
    signs = np.random.default_rng(2).choice([-1.0, 1.0], (2, PER_TILE, TEXT.embed_dim))

    @jax.jit
    @jax.grad
    def gradients(encoder):
        return (encoder(jnp.asarray(tiles)) * signs).sum()

    plain, kept = (gradients(model_of(**how).vision) for how in ({}, {"remat": remat}))
    jax.tree.map(close, state_of(kept), state_of(plain))


@pytest.mark.parametrize(
    "frozen", ["vision.layers.*", pytest.param("vision.*", marks=pytest.mark.slow)]
)
def test_frozen_parts_of_the_encoder_stay(frozen):
    model = model_of()
    still = paths.chosen([frozen])
    update = Update(model, seen, optax.sgd(0.1), trainable=lambda name: not still(name))
    first = update.first(state_of(model))
    new, metrics = jax.jit(update, compiler_options=QUICK)(first, batch_of())
    assert metrics["skipped"] == 0
    after = jax.tree_util.tree_leaves_with_path(new.params)
    for (path, x), y in zip(after, jax.tree.leaves(state_of(model)), strict=True):
        name = paths.name(path)
        moved = bool((np.asarray(x) != np.asarray(y)).any())
        assert moved != still(name), name


# --- On the host ---------------------------------------------------------------------------------
def test_places_are_counted_row_by_row():
    found = places(np.array([[7, 9, 9, 1], [9, 7, 7, 9]]), 9)
    np.testing.assert_array_equal(found, [[-1, 0, 1, -1], [2, -1, -1, 3]])
    assert found.dtype == np.int32


def test_a_batch_without_images_keeps_its_shapes():
    tokens = tokens_of()
    tokens[tokens == PATCH] = 3
    none = arrange(tokens, tiles_of(0), VISION, patch_id=PATCH, multiple=8)
    assert none.tiles.shape[0] == 8
    assert (none.places == -1).all()
    np.testing.assert_array_equal(run(model_of(), tokens, none), run(model_of(), tokens))


@pytest.mark.parametrize(("tiles", "message"), [(4, "20 tokens .* 4 tiles .* 16"), (6, "be 24")])
def test_a_number_of_patches_that_does_not_fit_is_refused(tiles, message):
    with pytest.raises(ValueError, match=message):
        arrange(tokens_of(), tiles_of(tiles), VISION, patch_id=PATCH)


def test_wrong_shapes_are_refused():
    model, tokens = model_of(), jnp.asarray(tokens_of())
    images = images_of(np.asarray(tokens))
    with pytest.raises(ValueError, match=r"shape \(3, 18, 12\) must have .* \(3, 18, 18\)"):
        model(tokens, images=images._replace(tiles=images.tiles[..., :12]))
    with pytest.raises(ValueError, match=r"places of shape \(4, 47\) .* \(4, 48\)"):
        model(tokens, images=images._replace(places=images.places[:, 1:]))
    with pytest.raises(ValueError, match="not with Fused"):
        model(model.fuse(tokens, images), images=images)
    with pytest.raises(TypeError, match="images"):
        build(TEXT)(tokens, images=images)
