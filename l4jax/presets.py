"""The values: one function for each published model, and a tiny twin of any of them.

Sources: Meta's model cards and reference code, and the checkpoints' configuration files. What Meta
did not publish is listed in a preset's `assumed` and shown by `l4jax info`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import NamedTuple

from l4jax.config import (
    Attention,
    AttentionKind,
    FeedForwardKind,
    Layer,
    MoE,
    Rope,
    RopeScaling,
    Temperature,
    TextConfig,
    VisionConfig,
)

_CHUNKED_TO_GLOBAL: tuple[AttentionKind, ...] = ("chunked", "chunked", "chunked", "global")
_LLAMA31_CONTEXT = 131_072


class Preset(NamedTuple):
    """A published model: its architecture and what a user should know beside it."""

    make: Callable[[], TextConfig]
    licence: str
    note: str = ""
    assumed: tuple[str, ...] = ()
    """Values that Meta did not publish: our assumptions, in words."""
    vision: VisionConfig | None = None
    """Of the published package's image encoder, if it has one."""


def llama4_scout(max_context: int = 10_485_760) -> TextConfig:
    """Llama 4 Scout (17B active, 16 experts): every layer routed, queries and keys normalised."""
    return TextConfig(
        num_layers=48,
        embed_dim=5120,
        vocab_size=202_048,
        mlp_dim=16_384,
        max_context=max_context,
        attention=_llama4_attention(
            qk_norm=True,
            rope=Rope(scaling=RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0)),
        ),
        pattern=tuple(Layer(kind, "moe") for kind in _CHUNKED_TO_GLOBAL),
        moe=MoE(num_experts=16, mlp_dim=8192, shared_mlp_dim=8192),
    )


def llama4_maverick(max_context: int = 1_048_576) -> TextConfig:
    """Llama 4 Maverick (17B active, 128 experts): dense and routed layers alternate."""
    ffns: tuple[FeedForwardKind, ...] = ("dense", "moe", "dense", "moe")
    return TextConfig(
        num_layers=48,
        embed_dim=5120,
        vocab_size=202_048,
        mlp_dim=16_384,
        max_context=max_context,
        attention=_llama4_attention(qk_norm=False, rope=Rope()),
        pattern=tuple(map(Layer, _CHUNKED_TO_GLOBAL, ffns)),
        moe=MoE(num_experts=128, mlp_dim=8192, shared_mlp_dim=8192),
    )


def llama4_behemoth() -> TextConfig:
    """A model of Llama 4 Behemoth's announced size: 288 B active, 16 experts, about 2 T total."""
    return dataclasses.replace(
        llama4_scout(max_context=262_144),
        num_layers=120,
        embed_dim=14_336,
        mlp_dim=44_544,
        attention=dataclasses.replace(llama4_scout().attention, num_heads=112),
        moe=MoE(num_experts=16, mlp_dim=22_272, shared_mlp_dim=22_272),
    )


def llama_guard_4() -> TextConfig:
    """Llama Guard 4 (12B): Scout's decoder with only the shared expert left, all causal."""
    scout = llama4_scout()
    return dataclasses.replace(
        scout,
        mlp_dim=8192,
        max_context=8192,
        attention=dataclasses.replace(scout.attention, chunk_size=None, temperature=None),
        pattern=(Layer("causal", "dense"),),
        moe=None,
    )


def llama4_vision() -> VisionConfig:
    """The image encoder that every published Llama 4 carries."""
    return VisionConfig(
        num_layers=34,
        embed_dim=1408,
        num_heads=16,
        mlp_dim=5632,
        output_dim=4096,
        image_size=336,
        patch_size=14,
    )


def llama3_8b(*, scaled: bool = False) -> TextConfig:
    """Llama 3 8B; `scaled` for 3.1, whose RoPE is stretched to 128 Ki tokens."""
    return _llama3(32, 4096, 14_336, heads=32, head_dim=128, factor=8.0 if scaled else None)


def llama3_70b(*, scaled: bool = False) -> TextConfig:
    """Llama 3 70B; `scaled` for 3.1 and 3.3."""
    return _llama3(80, 8192, 28_672, heads=64, head_dim=128, factor=8.0 if scaled else None)


def llama31_405b() -> TextConfig:
    """Llama 3.1 405B."""
    return _llama3(126, 16_384, 53_248, heads=128, head_dim=128, factor=8.0)


def llama32_1b() -> TextConfig:
    """Llama 3.2 1B, whose head is its embedding table."""
    return _llama3(16, 2048, 8192, heads=32, head_dim=64, factor=32.0, tied=True)


def llama32_3b() -> TextConfig:
    """Llama 3.2 3B, whose head is its embedding table."""
    return _llama3(28, 3072, 8192, heads=24, head_dim=128, factor=32.0, tied=True)


def tiny(config: TextConfig) -> TextConfig:
    """`config` small enough for a test on a CPU, with every boundary crossed within 64 tokens.

    Keeps the layer pattern (twice over), tied or untied head, qk-norm, temperature, shared expert
    and whether RoPE is scaled; the context is 16 chunks long.
    """
    attention, moe = config.attention, config.moe
    scaling = attention.rope.scaling
    return dataclasses.replace(
        config,
        num_layers=2 * len(config.pattern),
        embed_dim=64,
        vocab_size=512,
        mlp_dim=160,
        max_context=256,
        attention=dataclasses.replace(
            attention,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            chunk_size=attention.chunk_size and 16,
            rope=dataclasses.replace(
                attention.rope,
                scaling=scaling and dataclasses.replace(scaling, original_context=64),
            ),
            temperature=attention.temperature
            and dataclasses.replace(attention.temperature, floor=8),
        ),
        moe=moe
        and dataclasses.replace(
            moe,
            num_experts=min(moe.num_experts // 4, 8),
            mlp_dim=96,
            shared_mlp_dim=moe.shared_mlp_dim and 96,
        ),
    )


def tiny_vision(config: VisionConfig) -> VisionConfig:
    """`config` at test size."""
    return dataclasses.replace(
        config,
        num_layers=3,
        embed_dim=32,
        num_heads=4,
        mlp_dim=128,
        output_dim=48,
        image_size=24,
        patch_size=6,
    )


def same_but_context(one: TextConfig, other: TextConfig) -> bool:
    """Whether two architectures differ in nothing but the longest context."""
    return dataclasses.replace(one, max_context=other.max_context) == other


def get(name: str) -> Preset:
    """The preset called `name`; `tiny-NAME` is the tiny twin of NAME.

    Raises:
        ValueError: no preset has that name; the message gives the nearest ones.
    """
    base = name.removeprefix("tiny-")
    if base not in PRESETS:
        near = difflib.get_close_matches(base, PRESETS, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(PRESETS)}"
        raise ValueError(f"no preset is called {name!r}; {hint}")
    preset = PRESETS[base]
    if base == name:
        return preset
    return preset._replace(
        make=lambda: tiny(preset.make()),
        note=f"Tiny twin of {base}, for tests.",
        assumed=(),
        vision=preset.vision and tiny_vision(preset.vision),
    )


def _llama4_attention(*, qk_norm: bool, rope: Rope) -> Attention:
    """What Scout and Maverick share."""
    return Attention(
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        chunk_size=8192,
        qk_norm=qk_norm,
        rope=rope,
        temperature=Temperature(),
    )


def _llama3(
    num_layers: int,
    embed_dim: int,
    mlp_dim: int,
    *,
    heads: int,
    head_dim: int,
    factor: float | None,
    tied: bool = False,
) -> TextConfig:
    """A dense Llama 3; `factor` stretches RoPE from 8 Ki to 128 Ki tokens, None leaves it."""
    scaling = factor and RopeScaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0)
    return TextConfig(
        num_layers=num_layers,
        embed_dim=embed_dim,
        vocab_size=128_256,
        mlp_dim=mlp_dim,
        max_context=_LLAMA31_CONTEXT if scaling else 8192,
        attention=Attention(
            num_heads=heads, num_kv_heads=8, head_dim=head_dim, rope=Rope(scaling=scaling or None)
        ),
        pattern=(Layer("causal", "dense"),),
        tie_embeddings=tied,
    )


_FACTOR_32 = (
    "RoPE factor 32, as Hugging Face configurations of this model are reported to say; Meta's own "
    "code applies 8 to every size. A loaded checkpoint's own value always wins."
)

PRESETS: dict[str, Preset] = {
    "llama4-scout": Preset(
        llama4_scout, "Llama 4", "Instruction-tuned: 10 Mi tokens.", vision=llama4_vision()
    ),
    "llama4-scout-base": Preset(
        lambda: llama4_scout(262_144),
        "Llama 4",
        "Pre-trained: 256 Ki tokens.",
        vision=llama4_vision(),
    ),
    "llama4-maverick": Preset(
        llama4_maverick, "Llama 4", "Instruction-tuned: 1 Mi tokens.", vision=llama4_vision()
    ),
    "llama4-maverick-base": Preset(
        lambda: llama4_maverick(262_144),
        "Llama 4",
        "Pre-trained: 256 Ki tokens.",
        vision=llama4_vision(),
    ),
    "llama4-behemoth": Preset(
        llama4_behemoth,
        "never released; your own model",
        "Meta announced 288 B active parameters, 16 experts and nearly 2 T in total; no more.",
        assumed=(
            "layers 120, width 14336, 112 query and 8 key-value heads of 128",
            "expert and shared-expert width 22272, every layer routed to one of 16 experts",
            "vocabulary 202048, context 262144, untied head",
            "layer pattern, chunk 8192, qk-norm, RoPE scaling 16/1/1 and temperature as in Scout",
        ),
    ),
    "llama-guard-4": Preset(
        llama_guard_4,
        "Llama 4",
        "Safety classifier cut from Scout's pre-trained checkpoint.",
        assumed=(
            "qk-norm and RoPE scaling as in Scout; its own configuration file was not readable",
            "context 8192, the limit that servers set for it",
        ),
        vision=llama4_vision(),
    ),
    "llama3-8b": Preset(llama3_8b, "Llama 3"),
    "llama3-70b": Preset(llama3_70b, "Llama 3"),
    "llama3.1-8b": Preset(lambda: llama3_8b(scaled=True), "Llama 3.1"),
    "llama3.1-70b": Preset(lambda: llama3_70b(scaled=True), "Llama 3.1"),
    "llama3.1-405b": Preset(llama31_405b, "Llama 3.1"),
    "llama3.2-1b": Preset(llama32_1b, "Llama 3.2", assumed=(_FACTOR_32,)),
    "llama3.2-3b": Preset(llama32_3b, "Llama 3.2", assumed=(_FACTOR_32,)),
    "llama3.3-70b": Preset(lambda: llama3_70b(scaled=True), "Llama 3.3"),
}
