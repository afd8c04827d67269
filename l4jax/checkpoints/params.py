"""Meta's params.json: the architecture that it describes, and the one to write.

Sources: `ModelArgs` of Meta's `llama3/args.py` and `llama4/args.py`. Widths follow there from the
model's width by a rule; the longest context is not said at all. What the rules cannot say exactly
goes into a section of our own, which Meta's code ignores as it does every unknown key.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import l4jax.checkpoints.vision as vision
from l4jax import presets
from l4jax.checkpoints.fields import shortest_pattern
from l4jax.checkpoints.formats import Model, is_llama3
from l4jax.checkpoints.orbax import from_json
from l4jax.config import (
    Attention,
    AttentionKind,
    Layer,
    MoE,
    Rope,
    RopeScaling,
    Temperature,
    TextConfig,
)

OURS = "l4jax"
_KNOWN = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "multiple_of",
    "ffn_dim_multiplier", "ffn_exp", "norm_eps", "rope_theta", "use_scaled_rope",
    "rope_scaling_factor", "rope_high_freq_factor", "use_qk_norm", "nope_layer_interval",
    "attention_chunk_size", "attn_temperature_tuning", "floor_scale", "attn_scale", "vision_args",
    "moe_args",
}  # fmt: skip


def read(file: pathlib.Path) -> dict[str, Any]:
    """The values of a params.json, whether or not they lie under "model".

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is no JSON object.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file}: missing")
    try:
        values = json.loads(file.read_text())
        inner = values.get("model", values)
        inner["dim"], inner["n_layers"], inner["n_heads"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: no valid params.json: {error!r}") from None
    if not all(isinstance(inner[name], int) for name in ("dim", "n_layers", "n_heads")):
        raise ValueError(f"{file}: dim, n_layers and n_heads must be whole numbers")
    for name in ("quantization_args", "lora_args"):
        if inner.get(name):
            raise ValueError(
                f"{file}: {name} {inner[name]!r}: checkpoints with these are not read; Meta's "
                f"quantized 1B and 3B packages are of that kind"
            )
    return inner


def model_from(
    values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], shards: int
) -> Model:
    """The architecture of a checkpoint of Meta's.

    Args:
        values: of its params.json.
        shapes: of the tensors in its first shard, which say the widths without Meta's rules.
        shards: how many there are.

    Raises:
        ValueError: the values contradict the tensors, or describe what is not supported.
    """
    if OURS in values:
        section = values[OURS]
        text = from_json(TextConfig, section["config"])
        images = values.get("vision_args")
        model = Model(text, images and vision.args_from(images))
        for name, expected in values_to(model, None).items():
            if name != OURS and values.get(name, expected) != expected:
                raise ValueError(
                    f"params.json: {name} {values[name]!r} contradicts the section {OURS!r} beside "
                    f"it, which calls for {expected!r}; change or remove that section"
                )
        return model
    try:
        llama_4 = any(".wqkv." in name for name in shapes)
        make = _llama4 if llama_4 else _llama3
        return make(values, shapes, shards)
    except (KeyError, TypeError) as error:
        raise ValueError(f"params.json and the tensors do not fit together: {error!r}") from None


def _llama3(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], shards: int) -> Model:
    dim, heads = values["dim"], values["n_heads"]
    scaling = None
    if values.get("use_scaled_rope"):
        # Meta's code knows one scaling; other factors are written by us only.
        scaling = RopeScaling(
            factor=float(values.get("rope_scaling_factor") or 8),
            low_freq_factor=1.0,
            high_freq_factor=float(values.get("rope_high_freq_factor") or 4),
        )
    vocab = _vocabulary(values, shapes, shards)
    return Model(
        TextConfig(
            num_layers=values["n_layers"],
            embed_dim=dim,
            vocab_size=vocab,
            mlp_dim=shapes["layers.0.feed_forward.w1.weight"][0] * shards,
            max_context=131_072 if scaling else 8192,
            attention=Attention(
                num_heads=heads,
                num_kv_heads=values.get("n_kv_heads") or heads,
                head_dim=values.get("head_dim") or dim // heads,
                rope=Rope(theta=float(values.get("rope_theta", 500_000)), scaling=scaling),
            ),
            pattern=(Layer("causal", "dense"),),
            norm_eps=float(values.get("norm_eps", 1e-5)),
            tie_embeddings=_tied(values),
        )
    )


def _tied(values: Mapping[str, Any]) -> bool:
    """Meta's files repeat a tied head, and params.json does not say it: the small ones have it."""
    return (values["dim"], values["n_layers"]) in {
        (config.embed_dim, config.num_layers)
        for preset in presets.PRESETS.values()
        if (config := preset.make()).tie_embeddings
    }


def _vocabulary(
    values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], shards: int
) -> int:
    """The number of rows of the embedding table, which params.json may leave at -1."""
    rows = shapes["tok_embeddings.weight"][0] * shards
    said = values.get("vocab_size", -1)
    if said not in (-1, rows):
        raise ValueError(f"params.json: vocab_size {said}, but the shards hold {rows} embeddings")
    return rows


def _llama4(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], shards: int) -> Model:
    dim, heads, moe = values["dim"], values["n_heads"], values.get("moe_args")
    layers, interval = values["n_layers"], values.get("nope_layer_interval")
    chunk = values.get("attention_chunk_size")
    rotating: AttentionKind = "chunked" if chunk else "causal"
    step = (moe or {}).get("interleave_moe_layer_step", 1)
    kinds = [
        Layer(
            "global" if interval and (i + 1) % interval == 0 else rotating,
            "moe" if moe and (i + 1) % step == 0 else "dense",
        )
        for i in range(layers)
    ]
    dense = shapes.get(f"layers.{_first(kinds, 'dense')}.feed_forward.mlp.fc1_weight", (0,))[0] // 2
    shared = f"layers.{_first(kinds, 'moe')}.feed_forward.w_in_shared_FD.weight"
    width = shapes[shared][0] * shards if shared in shapes else 0
    scaling = None
    if values.get("use_scaled_rope"):
        scaling = RopeScaling(
            factor=float(values.get("rope_scaling_factor") or 16),
            low_freq_factor=1.0,
            high_freq_factor=float(values.get("rope_high_freq_factor") or 1),
        )
    # Meta's own default is off; the published models are served with it, as Hugging Face's
    # configurations of them say.
    tuned = values.get("attn_temperature_tuning", True) and any(
        kind.attention == "global" for kind in kinds
    )
    temperature = Temperature(
        floor=int(values.get("floor_scale", 8192)), scale=float(values.get("attn_scale", 0.1))
    )
    images = values.get("vision_args")
    text = TextConfig(
        num_layers=layers,
        embed_dim=dim,
        vocab_size=_vocabulary(values, shapes, shards),
        mlp_dim=dense * shards or 2 * width,
        max_context=8192,
        attention=Attention(
            num_heads=heads,
            num_kv_heads=values.get("n_kv_heads") or heads,
            head_dim=values.get("head_dim") or dim // heads,
            chunk_size=chunk if any(kind.attention == "chunked" for kind in kinds) else None,
            qk_norm=bool(values.get("use_qk_norm", False)),
            rope=Rope(theta=float(values.get("rope_theta", 500_000)), scaling=scaling),
            temperature=temperature if tuned else None,
        ),
        pattern=shortest_pattern(kinds),
        moe=MoE(
            num_experts=moe["num_experts"],
            experts_per_token=moe.get("top_k", 1),
            mlp_dim=width,
            shared_mlp_dim=width,
        )
        if moe
        else None,
        norm_eps=float(values.get("norm_eps", 1e-5)),
    )
    text = dataclasses.replace(text, max_context=_published_context(text))
    has_vision = any(name.startswith(vision.META_PREFIXES) for name in shapes)
    return Model(text, vision.args_from(images) if images and has_vision else None)


def _first(kinds: list[Layer], ffn: str) -> int | None:
    return next((i for i, kind in enumerate(kinds) if kind.ffn == ffn), None)


def _published_context(text: TextConfig) -> int:
    """The longest context of the published model with this architecture, else of any Llama 4."""
    for preset in presets.PRESETS.values():
        config = preset.make()
        if presets.same_but_context(config, text):
            return config.max_context
    return 262_144 if text.attention.chunk_size else 8192


# --- Writing -------------------------------------------------------------------------------------
def values_to(model: Model, before: dict[str, Any] | None) -> dict[str, Any]:
    """The params.json of a model; what it said before is kept.

    Raises:
        ValueError: Meta's format cannot say it.
    """
    if before is not None:
        return before
    text, a, moe = model.text, model.text.attention, model.text.moe
    scaling = a.rope.scaling
    values: dict[str, Any] = {
        "dim": text.embed_dim,
        "n_layers": text.num_layers,
        "n_heads": a.num_heads,
        "n_kv_heads": a.num_kv_heads,
        "vocab_size": text.vocab_size,
        "norm_eps": text.norm_eps,
        "rope_theta": a.rope.theta,
        "use_scaled_rope": scaling is not None,
    }
    if a.head_dim * a.num_heads != text.embed_dim:
        raise ValueError(
            f"Meta's code gives a head dim / n_heads = {text.embed_dim // a.num_heads} numbers; "
            f"this model's heads have {a.head_dim}"
        )
    if not is_llama3(model):
        values |= _llama4_values(text)
        if scaling is not None:
            values["rope_scaling_factor"] = scaling.factor
            values["rope_high_freq_factor"] = scaling.high_freq_factor
    elif scaling is not None and (scaling.factor, scaling.high_freq_factor) != (8, 4):
        values["rope_scaling_factor"] = scaling.factor
        values["rope_high_freq_factor"] = scaling.high_freq_factor
    dense = text.mlp_dim if any(k.ffn == "dense" for k in text.layers) else None
    values |= _widths(text.embed_dim, dense, moe.mlp_dim if moe else None)
    if moe is not None:
        step = next(i for i, kind in enumerate(text.layers, 1) if kind.ffn == "moe")
        values["moe_args"] = {
            "num_experts": moe.num_experts,
            "capacity_factor": 1.0,
            "auto_scale_F": True,
            "top_k": moe.experts_per_token,
            "interleave_moe_layer_step": step,
        }
    if model.vision is not None:
        values["vision_args"] = vision.args_to(model.vision)
    return values | {OURS: {"config": dataclasses.asdict(text)}}


def _llama4_values(text: TextConfig) -> dict[str, Any]:
    """What only Llama 4's arguments have."""
    a, kinds = text.attention, text.layers
    interval = next((i for i, kind in enumerate(kinds, 1) if kind.attention == "global"), None)
    step = next((i for i, kind in enumerate(kinds, 1) if kind.ffn == "moe"), None)
    for i, kind in enumerate(kinds, 1):
        expected = ("global" if interval and i % interval == 0 else "", step and i % step == 0)
        if (kind.attention == "global", kind.ffn == "moe") != (
            bool(expected[0]),
            bool(expected[1]),
        ):
            raise ValueError(
                f"Meta's format has global and moe layers at every so manieth place only; layer "
                f"{i - 1} of this model is {kind.attention} {kind.ffn}"
            )
    if text.moe is not None and text.moe.shared_mlp_dim != text.moe.mlp_dim:
        raise ValueError(
            f"Meta's Llama 4 gives shared and routed experts one width; this model has "
            f"{text.moe.shared_mlp_dim} and {text.moe.mlp_dim}"
        )
    if text.tie_embeddings:
        raise ValueError("Meta's Llama 4 has a head of its own; this model's is tied")
    temperature = a.temperature or Temperature()
    return {
        "ffn_exp": 4.0,
        "attention_chunk_size": a.chunk_size,
        "nope_layer_interval": interval,
        "use_qk_norm": a.qk_norm,
        "attn_temperature_tuning": a.temperature is not None,
        "floor_scale": float(temperature.floor),
        "attn_scale": temperature.scale,
    }


def _widths(dim: int, dense: int | None, routed: int | None) -> dict[str, Any]:
    """`multiple_of` and `ffn_dim_multiplier` from which Meta's code works out these widths.

    It takes two thirds of 4 · dim, times the multiplier, halves it for experts (one routed, one
    shared), and rounds up to the multiple.

    Raises:
        ValueError: there are none.
    """
    plain = int(2 * 4 * dim / 3)
    wanted = [(width, parts) for width, parts in ((dense, 1), (routed, 2)) if width]

    def width(multiplier: float, multiple: int, parts: int) -> int:
        hidden = int(int(multiplier * plain) / parts)
        return hidden + -hidden % multiple

    for multiple in (4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1):
        if any(w % multiple for w, _ in wanted):
            continue
        tries = {
            round(parts * (w - multiple / 4) / plain, n) for w, parts in wanted for n in (1, 3)
        }
        tries |= {round(parts * w / plain, 6) for w, parts in wanted}
        for multiplier in sorted(tries):
            if all(width(multiplier, multiple, parts) == w for w, parts in wanted):
                return {"multiple_of": multiple, "ffn_dim_multiplier": multiplier}
    raise ValueError(
        f"Meta's rules for widths cannot give dense {dense} and routed {routed} at width {dim}"
    )
