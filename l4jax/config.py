"""What can be set: frozen dataclasses, composed, one section for each part that reads it.

A section is validated when it is made and never changed afterwards; variants are made with
`dataclasses.replace`. The values of the published models are in `presets`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, get_args

AttentionKind = Literal["chunked", "causal", "global"]
FeedForwardKind = Literal["dense", "moe"]
Remat = Literal["none", "dots", "attention", "full", "offload"]


def positive(section: object, *names: str) -> None:
    """Raises ValueError if one of the named fields is not greater than 0."""
    for name in names:
        value = getattr(section, name)
        if not value > 0:
            raise ValueError(f"{type(section).__name__}.{name} {value!r} must be greater than 0")


class Layer(NamedTuple):
    """What one decoder layer is made of.

    attention: "chunked" rotates positions (RoPE) and sees its own chunk only; "causal" rotates and
        sees everything before it; "global" has no positions (NoPE), sees everything before it and
        scales its queries by the attention temperature.
    ffn: "dense" is one SwiGLU; "moe" routes to experts, beside an optional shared expert.
    """

    attention: AttentionKind
    ffn: FeedForwardKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's frequency-dependent stretching of RoPE, which Llama 4 Scout uses as well."""

    factor: float
    """Wavelengths longer than `original_context / low_freq_factor` grow by this factor."""
    low_freq_factor: float
    high_freq_factor: float
    """Wavelengths shorter than `original_context / high_freq_factor` stay as they are."""
    original_context: int = 8192

    def __post_init__(self) -> None:
        positive(self, "factor", "low_freq_factor", "high_freq_factor", "original_context")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low > high:
            raise ValueError(f"RoPE low_freq_factor {low} must not exceed high_freq_factor {high}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding of "chunked" and "causal" layers."""

    theta: float = 500_000.0
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        positive(self, "theta")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Temperature:
    """Query scale of "global" layers: 1 + scale · ln(⌊(position + 1) / floor⌋ + 1)."""

    floor: int = 8192
    scale: float = 0.1

    def __post_init__(self) -> None:
        positive(self, "floor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    chunk_size: int | None = None
    """Tokens in a chunk of "chunked" layers; chunks do not overlap."""
    qk_norm: bool = False
    """Weightless RMS norm of queries and keys after RoPE."""
    rope: Rope = Rope()
    temperature: Temperature | None = None

    def __post_init__(self) -> None:
        positive(self, "num_heads", "num_kv_heads", "head_dim")
        n, k = self.num_heads, self.num_kv_heads
        if n % k:
            raise ValueError(f"num_heads {n} must be a multiple of num_kv_heads {k}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: RoPE rotates pairs")
        if self.chunk_size is not None:
            positive(self, "chunk_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoE:
    """Mixture of experts: a sigmoid router scales each chosen expert's input."""

    num_experts: int
    mlp_dim: int
    """Hidden width of each routed expert."""
    shared_mlp_dim: int = 0
    """Hidden width of the expert that sees every token; 0 leaves it out."""
    experts_per_token: int = 1

    def __post_init__(self) -> None:
        positive(self, "num_experts", "mlp_dim", "experts_per_token")
        if self.shared_mlp_dim < 0:
            raise ValueError(f"shared_mlp_dim {self.shared_mlp_dim} must be 0 or more")
        e, k = self.num_experts, self.experts_per_token
        if k > e:
            raise ValueError(f"experts_per_token {k} exceeds num_experts {e}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The architecture of a decoder-only language model."""

    num_layers: int
    embed_dim: int
    vocab_size: int
    mlp_dim: int
    """Hidden width of "dense" layers."""
    max_context: int
    """Longest context, in tokens, that the checkpoint is meant for."""
    attention: Attention
    pattern: tuple[Layer, ...]
    """The kinds of the first layers; repeated until `num_layers` are reached."""
    moe: MoE | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    """The output head is the transposed embedding table."""

    def __post_init__(self) -> None:
        positive(self, "num_layers", "embed_dim", "vocab_size", "mlp_dim", "max_context")
        positive(self, "norm_eps")
        if not self.pattern:
            raise ValueError("pattern is empty: it must name the kind of at least one layer")
        known = {"attention": get_args(AttentionKind), "ffn": get_args(FeedForwardKind)}
        for layer in self.pattern:
            for part, kind in layer._asdict().items():
                if kind not in known[part]:
                    raise ValueError(f"{part} kind {kind!r}: choose from {known[part]}")
        used = self.layers
        if any(x.attention == "chunked" for x in used) and self.attention.chunk_size is None:
            raise ValueError("the pattern has chunked layers, but attention.chunk_size is None")
        if any(x.ffn == "moe" for x in used) and self.moe is None:
            raise ValueError("the pattern has moe layers, but moe is None")

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The kind of every layer, first to last."""
        period = len(self.pattern)
        return tuple(self.pattern[i % period] for i in range(self.num_layers))

    def cache_slots(self, kind: AttentionKind, context: int) -> int:
        """Tokens that a layer of this kind keeps of `context`: a chunked one, its chunk only."""
        chunk = self.attention.chunk_size
        return min(chunk, context) if kind == "chunked" and chunk is not None else context


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The architecture of Llama 4's vision encoder, its adapter and its projector."""

    num_layers: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    output_dim: int
    """Width of the adapter, which the projector turns into the decoder's."""
    image_size: int
    """Pixels of a tile's side."""
    patch_size: int
    channels: int = 3
    pixel_shuffle: int = 2
    """Patches on a side that become one; their channels are stacked."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        positive(self, *(field.name for field in dataclasses.fields(self)))
        if self.embed_dim % self.num_heads or self.head_dim % 4:
            raise ValueError(
                f"vision embed_dim {self.embed_dim} over {self.num_heads} heads must give a "
                f"multiple of 4: RoPE turns pairs along two axes"
            )
        if self.image_size % self.patch_size or self.side % self.pixel_shuffle:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size} "
                f"times pixel_shuffle {self.pixel_shuffle}"
            )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.embed_dim // self.num_heads

    @property
    def side(self) -> int:
        """Patches on a tile's side."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How a model computes, which changes its speed and memory but not what it is."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products and activations. Norms, softmax, router, RoPE angles, temperature and
    logits are float32 whatever this says."""
    remat: Remat = "none"
    """What a layer's backward pass computes again instead of keeping: nothing ("none"), all but
    matrix products ("dots"), all but attention ("attention"), or everything ("full"). "offload" is
    "full" with the layers' inputs waiting in host memory."""
    scan: bool = True
    """Run the periods of the layer pattern as one compiled loop; False unrolls every layer."""
    capacity: float | None = None
    """Most tokens that a row gives an expert, relative to an even share; what exceeds is dropped
    (its shared expert still sees it). None drops nothing. Passes with a cache never drop."""

    def __post_init__(self) -> None:
        if self.capacity is not None:
            positive(self, "capacity")
