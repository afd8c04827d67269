"""Parameters, bytes and floating-point operations: arithmetic on a configuration, no arrays.

Letters: see `models.layers`.
"""

from __future__ import annotations

from typing import NamedTuple

from l4jax.config import TextConfig, VisionConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5}


class Parameters(NamedTuple):
    """Parameter counts by what they are for."""

    embedding: int
    head: int
    """0 when the head is the embedding table."""
    attention: int
    dense: int
    """Feed-forward networks that every token uses: dense layers and shared experts."""
    routers: int
    routed: int
    norms: int
    routed_active: int
    """Of `routed`, what one token uses."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.active - self.routed_active + self.routed

    @property
    def active(self) -> int:
        """Parameters that one token uses, its row of the embedding table counted as the table."""
        return (
            self.embedding + self.head + self.attention + self.dense + self.routers + self.norms
        ) + self.routed_active

    @property
    def multiplied(self) -> int:
        """Parameters that one token is multiplied with: active ones, but no lookup and no norm."""
        head = self.head or self.embedding
        return head + self.attention + self.dense + self.routers + self.routed_active


def parameters(config: TextConfig) -> Parameters:
    """Counts of a model of this architecture."""
    d, v, a, moe = config.embed_dim, config.vocab_size, config.attention, config.moe
    per_attention = 2 * d * (a.num_heads + a.num_kv_heads) * a.head_dim
    routed_layers = sum(layer.ffn == "moe" for layer in config.layers)
    dense = (config.num_layers - routed_layers) * 3 * d * config.mlp_dim
    routers = routed = active = 0
    if moe is not None:
        dense += routed_layers * 3 * d * moe.shared_mlp_dim
        routers = routed_layers * d * moe.num_experts
        expert = routed_layers * 3 * d * moe.mlp_dim
        routed, active = expert * moe.num_experts, expert * moe.experts_per_token
    return Parameters(
        embedding=v * d,
        head=0 if config.tie_embeddings else v * d,
        attention=config.num_layers * per_attention,
        dense=dense,
        routers=routers,
        routed=routed,
        norms=(2 * config.num_layers + 1) * d,
        routed_active=active,
    )


def vision_parameters(config: VisionConfig, text_dim: int) -> int:
    """Parameters of the image encoder, its adapter, and the projector to the decoder's width."""
    d, out = config.embed_dim, config.output_dim
    linear = 4 * (d * d + d) + 2 * d * config.mlp_dim + config.mlp_dim + d
    layers = config.num_layers * (linear + 4 * d)
    patches = config.channels * config.patch_size**2 * d + (config.side**2 + 1) * d + d
    adapter = config.pixel_shuffle**2 * d * out + out * out
    return patches + 4 * d + layers + adapter + out * text_dim


def vision_flops(config: VisionConfig, text_dim: int) -> int:
    """Operations of the image encoder, forward, for one tile: all its patches see each other."""
    d, out, squares = config.embed_dim, config.output_dim, config.side**2
    seen = squares + 1
    layer = 2 * (4 * d * d + 2 * d * config.mlp_dim) * seen + 4 * d * seen**2
    patches = 2 * config.channels * config.patch_size**2 * d * squares
    merged = config.pixel_shuffle**2
    adapter = 2 * (merged * d * out + out * out + out * text_dim) * (squares // merged)
    return patches + config.num_layers * layer + adapter


def kv_bytes(config: TextConfig, context: int, *, dtype: str = "bfloat16") -> int:
    """Bytes of one row's key-value cache at `context` tokens; chunked layers hold one chunk."""
    a = config.attention
    slots = sum(config.cache_slots(layer.attention, context) for layer in config.layers)
    return int(slots * 2 * a.num_kv_heads * a.head_dim * DTYPE_BYTES[dtype])


def kv_bytes_per_token(config: TextConfig, *, dtype: str = "bfloat16") -> tuple[int, int]:
    """Bytes that one more token adds to a cache: within the first chunk, and after it."""
    chunk = config.attention.chunk_size or 1
    after = kv_bytes(config, chunk + 1, dtype=dtype) - kv_bytes(config, chunk, dtype=dtype)
    return kv_bytes(config, 1, dtype=dtype), after


def forward_flops(config: TextConfig, context: int) -> int:
    """Operations of the token at position `context - 1`: 2 per weight, 4·h per key and head.

    Training takes three times as many: once forward, twice for the two gradients.
    """
    a, last = config.attention, context - 1
    seen = sum(
        last % a.chunk_size + 1 if layer.attention == "chunked" and a.chunk_size else context
        for layer in config.layers
    )
    return 2 * parameters(config).multiplied + 4 * a.num_heads * a.head_dim * seen


def training_flops(config: TextConfig, length: int) -> int:
    """Operations per token, forward and backward, in sequences of `length` tokens."""
    a = config.attention
    seen = 0.0
    for layer in config.layers:
        span = (
            min(a.chunk_size, length) if layer.attention == "chunked" and a.chunk_size else length
        )
        whole, rest = divmod(length, span)
        seen += (whole * span * (span + 1) / 2 + rest * (rest + 1) / 2) / length
    return int(6 * parameters(config).multiplied + 12 * a.num_heads * a.head_dim * seen)
