"""A reward model: a language model's decoder with one number read where it has read an answer.

Letters: see `models.layers`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Int

from l4jax.models.layers import weight
from l4jax.models.llama4 import Llama
from l4jax.models.moe import Routing
from l4jax.sharding import constrain


class RewardModel(nnx.Module):
    """r(token) = norm(hidden) · head after each token; an answer's is that of its last token.

    It trains as a Llama does, with `objectives.ranking`. Its parameters are `backbone.…`, those of
    the Llama without an untied head, and `head` [d].

    Args:
        model: where to start; its arrays are shared, not copied.
        rngs: random keys of the new head, which is small, so that rewards start near 0.
    """

    def __init__(self, model: Llama, *, rngs: nnx.Rngs) -> None:
        self.backbone = nnx.merge(*nnx.split(model))
        self.backbone.head = None
        d = model.embed.shape[1]
        self.head = weight(rngs, (d,), ("embed",), fan_in=d * d)
        self.head.set_value(constrain(self.head[...], "embed"))

    def rewards(
        self,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        **images: Any,
    ) -> tuple[Float32[Array, "b t"], Routing | None]:
        """The reward after each token, in float32, and what the routers did.

        Arguments as for the backbone: `images`, too, if it reads them.
        """
        hidden, routing = self.backbone.hidden(
            tokens, positions=positions, segment_ids=segment_ids, **images
        )
        normal: Any = self.backbone.norm(hidden)
        head = self.head[...].astype(normal.dtype)
        return jnp.einsum("btd,d->bt", normal, head, preferred_element_type=jnp.float32), routing
