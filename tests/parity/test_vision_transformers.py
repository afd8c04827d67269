"""The image encoder and models that see against transformers, which writes the checkpoints."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install l4jax[parity]")
transformers = pytest.importorskip("transformers", reason="needs transformers: l4jax[parity]")
from test_convert_transformers import mended, params  # noqa: E402, F401
from test_transformers import FAMILIES, TOLERANCE, randomize, relative  # noqa: E402

from l4jax import roofline  # noqa: E402
from l4jax.config import VisionConfig  # noqa: E402

pytestmark = pytest.mark.parity

IMAGE, ROWS, LENGTH = 500, 3, 120
VISION = {
    "hidden_size": 40,
    "num_attention_heads": 5,
    "num_hidden_layers": 3,
    "intermediate_size": 160,
    "vision_output_dim": 56,
    "projector_input_dim": 56,
    "projector_output_dim": 56,
    "image_size": 30,
    "patch_size": 5,
    "num_channels": 3,
    "pixel_shuffle_ratio": 0.5,
}
PER_TILE, TILES = 9, 5
LOGITS = {"maverick": 3e-5}
"""Measured from the same model in float64, transformers is 2.0e-5 away there, and we are 1.0e-5."""
ENCODERS = {
    "as published, small": VISION,
    "three to one": VISION
    | {"pixel_shuffle_ratio": 1 / 3, "intermediate_size": 360, "rope_theta": 300.0}
    | {"hidden_size": 40, "num_attention_heads": 2, "num_hidden_layers": 2},
    "one channel, no pixels joined": VISION
    | {"pixel_shuffle_ratio": 1.0, "intermediate_size": 40, "num_channels": 1},
}


class Pair(NamedTuple):
    """The same model on both sides."""

    theirs: object
    ours: object


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    """A pair for a family of decoders and a kind of encoders, by way of transformers' files."""

    @functools.cache
    def make(family, encoder="as published, small") -> Pair:
        from l4jax import checkpoints

        config = transformers.Llama4Config(
            text_config=transformers.Llama4TextConfig(**FAMILIES[family]),
            vision_config=transformers.Llama4VisionConfig(**ENCODERS[encoder]),
            attn_implementation="eager",
            image_token_index=IMAGE,
        )
        theirs = randomize(transformers.Llama4ForConditionalGeneration(config))
        directory = tmp_path_factory.mktemp("transformers")
        theirs.save_pretrained(directory, max_shard_size="300KB")
        return Pair(theirs, checkpoints.load(directory, dtype="float32"))

    return make


def pixels(count=TILES, seed=0, channels=3):
    shape = (count, channels, 30, 30)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def ids():
    """Row 0 has an image of a tile and one of two, row 1 one at its end, row 2 one at its start."""
    tokens = np.random.default_rng(1).integers(3, IMAGE, (ROWS, LENGTH), np.int32)
    for row, first in ((0, 7), (0, 40), (0, 50), (1, LENGTH - PER_TILE), (2, 0)):
        tokens[row, first : first + PER_TILE] = IMAGE
    return tokens


def features(theirs, tiles):
    seen = theirs.vision_model(tiles).last_hidden_state
    return theirs.multi_modal_projector(seen)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_features_equal(encoder, attention, pair_of):
    pair = pair_of("guard", encoder)
    tiles = pixels(channels=pair.ours.vision.config.channels)
    pair.theirs.vision_model.set_attn_implementation(attention)
    with torch.no_grad():
        expected = features(pair.theirs, torch.tensor(tiles)).numpy()
    found = jax.jit(lambda model, tiles: model.vision(tiles))(pair.ours, tiles)
    assert found.shape == expected.shape
    assert expected.std() > 0.5
    assert relative(found, expected) <= TOLERANCE


def test_operations_are_those_that_torch_counts(pair_of):
    from torch.utils.flop_counter import FlopCounterMode

    pair = pair_of("guard")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features(pair.theirs, torch.tensor(pixels()))
    config = pair.ours.vision.config
    expected = TILES * roofline.vision_flops(config, pair.ours.config.embed_dim)
    assert counter.get_total_flops() == expected


def test_gradients_of_every_weight_equal(pair_of):
    """Of a sum over the features with random signs; torch's by name, in our layout."""
    from flax import nnx

    from l4jax.checkpoints import vision as table

    pair, tiles = pair_of("guard"), pixels()
    signs = np.random.default_rng(2).choice([-1.0, 1.0], (TILES, PER_TILE, 64)).astype(np.float32)
    pair.theirs.zero_grad()
    (features(pair.theirs, torch.tensor(tiles)) * torch.tensor(signs)).sum().backward()
    theirs = {name: x.grad for name, x in pair.theirs.named_parameters()}
    graph, state = nnx.split(pair.ours.vision)

    @jax.jit
    @jax.grad
    def gradients(state):
        return (nnx.merge(graph, state)(jnp.asarray(tiles)) * signs).sum()

    found = nnx.to_pure_dict(gradients(state))
    config = pair.ours.vision.config
    assert isinstance(config, VisionConfig)
    for array in table.arrays(config, 64):
        (expected,) = array.layout.load(theirs[array.hf].numpy())
        keys = array.ours.split(".")[1:]
        number = int(keys.pop(1)) if keys[0] == "layers" else ...
        ours = functools.reduce(lambda tree, key: tree[key], keys, found)[number]
        assert expected.std() > 1e-3, array.ours
        assert relative(ours, expected) <= 2 * TOLERANCE, array.ours


@pytest.mark.parametrize("family", params(["scout", "maverick", "guard"], ["maverick"]))
def test_logits_equal_with_images_in_the_rows(family, pair_of):
    from l4jax.models.multimodal import arrange

    pair, tokens, tiles = pair_of(family), ids(), pixels()
    with torch.no_grad():
        given = {"input_ids": torch.tensor(tokens).long(), "pixel_values": torch.tensor(tiles)}
        expected = pair.theirs(**given, use_cache=False).logits.numpy()
        blind = pair.theirs.language_model(given["input_ids"], use_cache=False).logits.numpy()
    images = arrange(tokens, tiles, pair.ours.vision.config, patch_id=IMAGE, multiple=4)
    run = jax.jit(lambda model, images: model(jnp.asarray(tokens), images=images))
    assert expected.std() > 1
    assert relative(run(pair.ours, images), expected) <= LOGITS.get(family, TOLERANCE)
    assert relative(blind, expected) > 1


def test_greedy_tokens_after_images_are_the_same(pair_of):
    from l4jax.models.multimodal import arrange

    pair, tokens, tiles = pair_of("scout"), ids(), pixels()
    with torch.no_grad():
        made = pair.theirs.generate(
            input_ids=torch.tensor(tokens).long(),
            pixel_values=torch.tensor(tiles),
            attention_mask=torch.ones(tokens.shape, dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = torch.stack(made.logits).topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 1e-4
    images = arrange(tokens, tiles, pair.ours.vision.config, patch_id=IMAGE)

    @jax.jit
    def first(model, images):
        hidden, cache = model.prefill(jnp.asarray(tokens), context=LENGTH + 24, images=images)
        return model.logits(hidden[:, -1]).argmax(-1), cache

    @jax.jit
    def step(model, token, cache):
        hidden, cache = model.extend(token[:, None].astype(jnp.int32), cache)
        return model.logits(hidden[:, 0]).argmax(-1), cache

    token, cache = first(pair.ours, images)
    found = [token]
    for _ in range(23):
        token, cache = step(pair.ours, token, cache)
        found.append(token)
    np.testing.assert_array_equal(np.stack(found, axis=1), made.sequences[:, LENGTH:].numpy())


def test_the_comparison_notices_rows_and_columns_exchanged(pair_of):
    pair, tiles = pair_of("guard"), pixels()
    with torch.no_grad():
        expected = features(pair.theirs, torch.tensor(tiles.swapaxes(2, 3).copy())).numpy()
    assert relative(pair.ours.vision(jnp.asarray(tiles)), expected) > 100 * TOLERANCE
