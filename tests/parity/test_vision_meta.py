"""The image encoder and models that see against Meta's code, by way of Meta's files."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import write_hf
from conftest import build

torch = pytest.importorskip("torch", reason="needs torch: pip install l4jax[parity]")
pytest.importorskip("transformers", reason="needs transformers: pip install l4jax[parity]")
pytest.importorskip("llama_models", reason="needs llama-models: pip install l4jax[parity]")
pytest.importorskip("fairscale", reason="needs fairscale: pip install l4jax[parity]")
from test_convert_meta import convert, their_logits, theirs_from  # noqa: E402
from test_convert_transformers import params  # noqa: E402
from test_meta import TOLERANCE, tiny  # noqa: E402
from test_meta import meta as one_process  # noqa: E402, F401
from test_transformers import relative  # noqa: E402

from l4jax.config import VisionConfig  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("one_process")]

VISION = VisionConfig(
    num_layers=3,
    embed_dim=40,
    num_heads=5,
    mlp_dim=160,
    output_dim=56,
    image_size=30,
    patch_size=5,
)
PATCH, LENGTH, PER_TILE = 500, 150, 9
NAMES = ["llama4-scout", "llama4-maverick", "llama-guard-4"]


def both(name, folder):
    """Meta's model from a directory that was converted, and ours that was read from it."""
    from l4jax import checkpoints

    write_hf(folder / "hf", build(tiny(name)), vision=VISION)
    shrink(folder / "hf")
    new = convert(folder / "hf", folder / "meta", "meta", shards=1)
    return theirs_from(name, new), checkpoints.load(new, dtype="float32")


def shrink(directory):
    """Weights of unit variance would saturate the encoder: each to the size of its inputs."""
    from checkpoint_files import rewrite

    def change(whole):
        for key, x in whole.items():
            if key.startswith(("vision_model.", "multi_modal_projector.")):
                scale = x.shape[-1] ** -0.5 if x.ndim == 2 else 0.4
                whole[key] = (x * scale + ("layernorm" in key and "weight" in key)).astype(x.dtype)

    rewrite(directory, change)


def pixels(count=5):
    return np.random.default_rng(0).uniform(-1, 1, (count, 3, 30, 30)).astype(np.float32)


def tokens():
    """Row 0 has an image of two tiles and one of one, row 1 one of two over a chunk's border."""
    found = np.random.default_rng(1).integers(0, PATCH, (2, LENGTH), np.int32)
    for row, first in ((0, 5), (0, 16), (0, 70), (1, 25), (1, 141)):
        found[row, first : first + PER_TILE] = PATCH
    return found


def seen_by_meta(theirs, ids, tiles):
    """Meta's embedding of both rows' images, at the places of their tokens."""
    from llama_models.llama4.datatypes import MaskedEmbedding

    tiles, mask = torch.tensor(tiles), torch.tensor(ids == PATCH)[..., None]
    with torch.inference_mode():
        nothing = torch.zeros(*ids.shape, theirs.args.dim)
        batch = [[tiles[:2], tiles[2:3]], [tiles[3:]]]
        return MaskedEmbedding(theirs.vision_embeddings(batch, mask, nothing), mask)


@pytest.mark.parametrize("name", params(NAMES, ["llama4-scout"]))
def test_features_and_logits_equal_metas(name, tmp_path):
    from l4jax.models.multimodal import arrange

    (theirs, ours), ids, tiles = both(name, tmp_path), tokens(), pixels()
    image = seen_by_meta(theirs, ids, tiles)
    with torch.inference_mode():
        features = theirs.vision_projection(image.embedding)[image.mask[..., 0]].numpy()
    found = jax.jit(lambda model, tiles: model.vision(tiles))(ours, tiles).reshape(-1, 64)
    assert features.std() > 0.1
    assert relative(found, features) <= TOLERANCE
    expected = their_logits(name, theirs, ids, image)
    images = arrange(ids, tiles, ours.vision.config, patch_id=PATCH, multiple=4)
    run = jax.jit(lambda model, images: model(jnp.asarray(ids), images=images))
    logits = np.asarray(run(ours, images))
    assert expected.std() > 0.9
    assert relative(logits, expected) <= TOLERANCE
    assert relative(their_logits(name, theirs, ids), expected) > 0.5


class Once(torch.nn.Module):
    """gelu, the first time that it is called."""

    called = False

    def forward(self, x):
        self.called, called = True, self.called
        return x if called else torch.nn.functional.gelu(x)


def test_the_comparison_notices_a_second_gelu_that_is_left_out(tmp_path):
    theirs, ours = both("llama-guard-4", tmp_path)
    theirs.vision_embeddings.vision_adapter.mlp.non_linearity = Once()
    image = seen_by_meta(theirs, tokens(), pixels())
    with torch.inference_mode():
        features = theirs.vision_projection(image.embedding)[image.mask[..., 0]].numpy()
    found = ours.vision(jnp.asarray(pixels())).reshape(-1, 64)
    assert relative(found, features) > 100 * TOLERANCE
