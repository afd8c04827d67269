"""Llama 4 in Hugging Face's and in Meta's checkpoints: configuration fields and tensor names.

Sources: transformers' `models/llama4` (4.51 to 5.23), Meta's `llama4/model.py` and `moe.py`, and
the published checkpoints' names.
"""

from __future__ import annotations

from typing import Any

from l4jax.checkpoints.fields import Fields, rope_from, rope_to, shortest_pattern
from l4jax.checkpoints.rows import Join
from l4jax.checkpoints.tables import (
    HALVES,
    SAME,
    TRANSPOSED,
    TRANSPOSED_EXPERTS,
    MetaRule,
    Rule,
    heads,
    heads_out,
    stacked_rows,
)
from l4jax.config import Attention, AttentionKind, Layer, MoE, Temperature, TextConfig

MODEL_TYPES = ("llama4_text", "llama4")
TEXT_PREFIX = "language_model."
"""Before every text tensor of a checkpoint that has vision as well."""
IMAGE_TOKENS = {"boi_token_index": 200080, "eoi_token_index": 200081, "image_token_index": 200092}
"""Meta's ids of `<|image_start|>`, `<|image_end|>` and `<|patch|>`."""


def rules(config: TextConfig, prefix: str = "", *, split_experts: bool = False) -> list[Rule]:
    """Every text tensor.

    Args:
        config: the architecture.
        prefix: `TEXT_PREFIX` in a checkpoint with vision.
        split_experts: every expert has tensors of its own, with its number for `{e}`, as quantized
            packages need it; otherwise a layer's experts share two tensors.
    """
    size = config.attention.head_dim
    layer, ffn = f"{prefix}model.layers.{{l}}.", f"{prefix}model.layers.{{l}}.feed_forward."
    table = [
        Rule(f"{prefix}model.embed_tokens.weight", ("embed",), SAME),
        Rule(f"{prefix}model.norm.weight", ("norm.scale",), SAME),
        Rule(f"{layer}input_layernorm.weight", ("layers.{l}.attention_norm.scale",), SAME),
        Rule(f"{layer}post_attention_layernorm.weight", ("layers.{l}.ffn_norm.scale",), SAME),
        Rule(
            f"{layer}self_attn.q_proj.weight",
            ("layers.{l}.attention.q",),
            heads(size, interleaved=True),
        ),
        Rule(
            f"{layer}self_attn.k_proj.weight",
            ("layers.{l}.attention.k",),
            heads(size, interleaved=True),
        ),
        Rule(f"{layer}self_attn.v_proj.weight", ("layers.{l}.attention.v",), heads(size)),
        Rule(f"{layer}self_attn.o_proj.weight", ("layers.{l}.attention.o",), heads_out(size)),
        Rule(f"{ffn}router.weight", ("layers.{l}.ffn.router",), TRANSPOSED, is_moe),
    ]
    if not split_experts:
        both = ("layers.{l}.ffn.gate", "layers.{l}.ffn.up")
        table.append(Rule(f"{ffn}experts.gate_up_proj", both, HALVES, is_moe))
        table.append(Rule(f"{ffn}experts.down_proj", ("layers.{l}.ffn.down",), SAME, is_moe))
    for name in ("gate", "up", "down"):
        ours, theirs = f"layers.{{l}}.ffn.{name}", f"{name}_proj.weight"
        if split_experts:
            expert = f"{ffn}experts.{{{{e}}}}.{theirs}"
            table.append(Rule(expert, (ours,), TRANSPOSED_EXPERTS, is_moe))
        table.append(Rule(ffn + theirs, (ours,), TRANSPOSED, is_dense))
        shared = f"layers.{{l}}.ffn.shared.{name}"
        table.append(Rule(f"{ffn}shared_expert.{theirs}", (shared,), TRANSPOSED, is_moe))
    if not config.tie_embeddings:
        table.append(Rule(f"{prefix}lm_head.weight", ("head",), TRANSPOSED))
    return table


def meta_rules(config: TextConfig) -> list[MetaRule]:
    """Every text tensor of Meta's own files.

    `wqkv` and `fc1` hold their parts one below the other *inside each shard*; experts are folded
    into the first dimension, and cut along the hidden one.
    """
    a, layer, ffn = config.attention, "layers.{l}.", "layers.{l}.feed_forward."
    pairs, plain = heads(a.head_dim, interleaved=True), heads(a.head_dim)
    rows = (a.num_heads * a.head_dim, *(a.num_kv_heads * a.head_dim,) * 2)
    whole, columns, across = Join(None), Join(0), Join(1)
    qkv = tuple(f"layers.{{l}}.attention.{x}" for x in "qkv")
    dense = (config.mlp_dim, config.mlp_dim)
    names = {name: f"layers.{{l}}.ffn.{name}" for name in ("gate", "up", "down", "router")}
    table = [
        MetaRule("tok_embeddings.weight", ("embed",), SAME, columns),
        MetaRule("output.weight", ("embed" if config.tie_embeddings else "head",), SAME, columns),
        MetaRule("norm.weight", ("norm.scale",), SAME, whole),
        MetaRule(
            f"{layer}attention.wqkv.weight",
            qkv,
            stacked_rows((pairs, pairs, plain), rows),
            Join(0, sections=rows),
        ),
        MetaRule(
            f"{layer}attention.wqkv.layer_norm_weight",
            ("layers.{l}.attention_norm.scale",),
            SAME,
            whole,
        ),
        MetaRule(
            f"{layer}attention.wo.weight",
            ("layers.{l}.attention.o",),
            heads_out(a.head_dim),
            across,
        ),
        MetaRule(f"{ffn}norm.weight", ("layers.{l}.ffn_norm.scale",), SAME, whole, is_moe),
        MetaRule(f"{ffn}router_DE", (names["router"],), SAME, whole, is_moe),
        MetaRule(
            f"{ffn}mlp.layer_norm_weight", ("layers.{l}.ffn_norm.scale",), SAME, whole, is_dense
        ),
        MetaRule(
            f"{ffn}mlp.fc1_weight",
            (names["gate"], names["up"]),
            stacked_rows((TRANSPOSED, TRANSPOSED), dense),
            Join(0, sections=dense),
            is_dense,
        ),
        MetaRule(f"{ffn}mlp.fc2_weight", (names["down"],), TRANSPOSED, across, is_dense),
    ]
    if not config.tie_embeddings:
        table[1] = table[1]._replace(layout=TRANSPOSED)
    for name, routed, shared, axis in (
        ("gate", "moe_w_in_eD_F", "w_in_shared_FD", 2),
        ("up", "moe_w_swiglu_eD_F", "w_swiglu_FD", 2),
        ("down", "moe_w_out_eF_D", "w_out_shared_DF", 1),
    ):
        expert = MetaRule(f"{ffn}experts.{routed}", (names[name],), SAME, Join(axis), is_moe)
        table.append(expert)
        ours, join = (f"layers.{{l}}.ffn.shared.{name}",), across if name == "down" else columns
        table.append(MetaRule(f"{ffn}{shared}.weight", ours, TRANSPOSED, join, is_moe))
    return table


def is_moe(layer: Layer) -> bool:
    """Whether the layer routes to experts."""
    return layer.ffn == "moe"


def is_dense(layer: Layer) -> bool:
    """Whether the layer has one feed-forward network."""
    return layer.ffn == "dense"


def config_from(fields: Fields) -> TextConfig:
    """The architecture that a `llama4_text` configuration describes."""
    layers = fields.take("num_hidden_layers", int)
    heads_number = fields.take("num_attention_heads", int)
    hidden = fields.take("hidden_size", int)
    # Absent it has a default; null, as in Llama Guard 4, means that there are no chunks.
    absent = None if fields.has("attention_chunk_size") else 8192
    chunk = fields.take("attention_chunk_size", int, absent)
    interval = fields.take("no_rope_layer_interval", int, 4)
    rotates = fields.take("no_rope_layers", list, None) or [
        int((i + 1) % interval != 0) for i in range(layers)
    ]
    step = fields.take("interleave_moe_layer_step", int, 1)
    routed = fields.take("moe_layers", list, None)
    if routed is None:
        # Dense models say so by a step of 0.
        routed = list(range(step - 1, layers, step)) if step > 0 else []
    types = fields.take("layer_types", list, None)
    fields.expect("hidden_act", "silu")
    fields.expect("attention_bias", False)
    fields.expect("router_jitter_noise", 0.0)
    fields.expect("attention_dropout", 0.0)
    if len(rotates) < layers or (types is not None and len(types) != layers):
        raise ValueError(f"no_rope_layers and layer_types must name each of the {layers} layers")
    unknown = set(types or ()) - {"chunked_attention", "full_attention"}
    if unknown:
        raise ValueError(f"layer_types {sorted(unknown)} are not supported")
    if not set(routed) <= set(range(layers)):
        raise ValueError(f"moe_layers {routed} must lie between 0 and {layers - 1}")
    kinds = []
    for i in range(layers):
        chunked = chunk is not None and (types[i] if types else "chunked") != "full_attention"
        if not rotates[i] and types is not None and types[i] != "full_attention":
            raise ValueError(f"layer {i} has no RoPE but layer_type {types[i]!r}")
        rotating: AttentionKind = "chunked" if chunked else "causal"
        kinds.append(Layer(rotating if rotates[i] else "global", "moe" if i in routed else "dense"))
    width = fields.take("intermediate_size", int)
    experts = fields.take("num_local_experts", int, 16)
    per_token = fields.take("num_experts_per_tok", int, 1)
    floor, scale = fields.take("floor_scale", int, 8192), fields.take("attn_scale", float, 0.1)
    # Early configurations hold the integer 4 here, meaning true.
    tuned = bool(fields.take("attn_temperature_tuning", int, True))
    return TextConfig(
        num_layers=layers,
        embed_dim=hidden,
        vocab_size=fields.take("vocab_size", int),
        mlp_dim=fields.take("intermediate_size_mlp", int),
        max_context=fields.take("max_position_embeddings", int),
        attention=Attention(
            num_heads=heads_number,
            num_kv_heads=fields.take("num_key_value_heads", int),
            head_dim=fields.take("head_dim", int),
            chunk_size=chunk if any(kind.attention == "chunked" for kind in kinds) else None,
            qk_norm=fields.take("use_qk_norm", bool, True),
            rope=rope_from(fields, default_theta=500_000.0),
            temperature=Temperature(floor=floor, scale=scale) if tuned else None,
        ),
        pattern=shortest_pattern(kinds),
        moe=MoE(
            num_experts=experts,
            experts_per_token=per_token,
            mlp_dim=width,
            shared_mlp_dim=width,
        )
        if routed
        else None,
        norm_eps=fields.take("rms_norm_eps", float, 1e-5),
        tie_embeddings=fields.take("tie_word_embeddings", bool, False),
    )


def config_to(config: TextConfig) -> dict[str, Any]:
    """The `llama4_text` configuration of this architecture.

    Raises:
        ValueError: the format cannot say it.
    """
    attention, moe = config.attention, config.moe
    if moe is not None and moe.shared_mlp_dim != moe.mlp_dim:
        raise ValueError(
            f"Hugging Face's Llama 4 gives shared and routed experts one width; this model has "
            f"{moe.shared_mlp_dim} and {moe.mlp_dim}"
        )
    temperature = attention.temperature or Temperature()
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": moe.mlp_dim if moe else config.mlp_dim,
        "intermediate_size_mlp": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "num_experts_per_tok": moe.experts_per_token if moe else 1,
        "num_local_experts": moe.num_experts if moe else 1,
        "moe_layers": [i for i, x in enumerate(config.layers) if x.ffn == "moe"],
        "use_qk_norm": attention.qk_norm,
        "no_rope_layers": [int(x.attention != "global") for x in config.layers],
        # transformers 5 cannot do without a number; one that no context exceeds changes nothing.
        "attention_chunk_size": attention.chunk_size or config.max_context,
        "layer_types": [
            "chunked_attention" if x.attention == "chunked" else "full_attention"
            for x in config.layers
        ],
        "attn_temperature_tuning": attention.temperature is not None,
        "floor_scale": temperature.floor,
        "attn_scale": temperature.scale,
        **rope_to(attention.rope),
    }
