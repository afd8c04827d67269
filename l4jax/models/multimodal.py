"""Early fusion: a decoder whose tokens are words and pieces of images.

    model = checkpoints.load(path)
    images = arrange(tokens, tiles, model.vision.config, patch_id=200092)
    logits = model(tokens, images=images)

Features of images take the places of the embeddings of certain tokens, and are ordinary causal
tokens from there on (Meta's `llama4/model.py`, transformers' `Llama4ForConditionalGeneration`).

Letters: see `models.vision`; r features of all tiles, m · p.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from l4jax.config import Execution, TextConfig, VisionConfig
from l4jax.models.cache import Cache
from l4jax.models.llama4 import Fused, Ids, Ints, Llama, Outputs
from l4jax.models.moe import Routing
from l4jax.models.vision import VisionEncoder, tile_features


class Images(NamedTuple):
    """The images of a batch of rows.

    tiles: normalised pixels of all rows' tiles, in order; what nothing refers to is padding.
    places: of each token the feature in its place, counted through all tiles; -1 for a word.
    """

    tiles: Float[Array | np.ndarray, "m c y x"]
    places: Int[Array | np.ndarray, "b t"]


class Multimodal(Llama):
    """A Llama with an image encoder; without images, the Llama.

    Args:
        config: the decoder's architecture.
        vision: the encoder's.
        execution: as for `Llama`.
        rngs: as for `Llama`. Parameters of the encoder are called `vision.…`: leave them out of
            `training.Update(trainable=…)` to freeze them.
    """

    def __init__(
        self,
        config: TextConfig,
        vision: VisionConfig,
        *,
        execution: Execution = Execution(),
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, execution=execution, rngs=rngs)
        self.vision = VisionEncoder(vision, config.embed_dim, execution=execution, rngs=rngs)

    def __call__(
        self,
        tokens: Ids,
        *,
        positions: Ints | None = None,
        segment_ids: Ints | None = None,
        images: Images | None = None,
    ) -> Float32[Array, "b t v"]:
        """Logits of the token after each token; see `Llama`, and `Images`."""
        fused = self.fuse(tokens, images)
        return super().__call__(fused, positions=positions, segment_ids=segment_ids)

    def outputs(
        self,
        tokens: Ids,
        *,
        positions: Ints | None = None,
        segment_ids: Ints | None = None,
        images: Images | None = None,
    ) -> Outputs:
        """Logits and what the routers did; arguments as for a plain call."""
        fused = self.fuse(tokens, images)
        return super().outputs(fused, positions=positions, segment_ids=segment_ids)

    def hidden(
        self,
        tokens: Ids,
        *,
        positions: Ints | None = None,
        segment_ids: Ints | None = None,
        images: Images | None = None,
    ) -> tuple[Float[Array, "b t d"], Routing | None]:
        """What `logits` turns into logits, and what the routers did; arguments as for a call."""
        fused = self.fuse(tokens, images)
        return super().hidden(fused, positions=positions, segment_ids=segment_ids)

    def prefill(
        self,
        tokens: Ids,
        counts: Int[Array, " b"] | None = None,
        *,
        context: int,
        images: Images | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """A cache that holds each row's first `counts` tokens; see `Llama`."""
        return super().prefill(self.fuse(tokens, images), counts, context=context)

    def extend(
        self,
        tokens: Ids,
        cache: Cache,
        counts: Int[Array, " b"] | None = None,
        *,
        images: Images | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """Hidden states of tokens that continue each row, and the cache with them; see `Llama`.

        Each call with images encodes all of its tiles: `fuse` a prompt that comes in pieces first.
        """
        return super().extend(self.fuse(tokens, images), cache, counts)

    def fuse(self, tokens: Ids, images: Images | None) -> Ids:
        """Tokens with features in the places of those that images take; without any, themselves.

        The result may be given to every method in the place of tokens and images. So a prompt
        whose images are encoded once may come in pieces: `fused._replace(ids=fused.ids[:, a:b])`.

        Raises:
            ValueError: places have another shape than tokens, or these are fused already.
        """
        if images is None:
            return tokens
        tiles, there = jnp.asarray(images.tiles), jnp.asarray(images.places)
        if isinstance(tokens, Fused) or tokens.shape != there.shape:
            kind = type(tokens).__name__
            raise ValueError(
                f"places of shape {there.shape} must come with ids of that shape, not with {kind} "
                f"of shape {tokens.shape}"
            )
        features = self.vision(tiles)
        ids = jnp.where(there < 0, tokens, self.config.vocab_size + there)
        return Fused(ids, features.reshape(-1, features.shape[-1]))


def places(tokens: np.ndarray, patch_id: int) -> np.ndarray:
    """Int32[b t]: which feature stands at each token, -1 where none does.

    Patch tokens take features in order, row by row, as tiles come; the rest are words.
    """
    tokens = np.asarray(tokens)
    patches = tokens == patch_id
    return np.where(patches, np.cumsum(patches).reshape(tokens.shape) - 1, -1).astype(np.int32)


def arrange(
    tokens: np.ndarray, tiles: np.ndarray, config: VisionConfig, *, patch_id: int, multiple: int = 1
) -> Images:
    """The images of rows of tokens, on the host; tiles are in the order of the rows' patch tokens.

    Args:
        tokens: ids [b t].
        tiles: normalised pixels [m c y x].
        config: the encoder's.
        patch_id: the token that a feature stands in the place of.
        multiple: of tiles; black ones that nothing refers to round their number up, from 1 on. Best
            as many as a mesh has devices with different tokens, or more, to compile few shapes.

    Raises:
        ValueError: there are more or fewer patch tokens than the tiles have features.
    """
    found = places(tokens, patch_id)
    per_tile, asked = tile_features(config), int((found >= 0).sum())
    if asked != len(tiles) * per_tile:
        raise ValueError(
            f"{asked} tokens of id {patch_id} do not fit {len(tiles)} tiles of {per_tile} features "
            f"each: there must be {len(tiles) * per_tile}"
        )
    missing = max(1, -(-len(tiles) // multiple)) * multiple - len(tiles)
    padded = np.pad(np.asarray(tiles), ((0, missing), *((0, 0),) * 3), constant_values=-1)
    return Images(padded, found)
