"""Llama 3 dense models as Hugging Face keeps them: configuration fields and tensor names.

Source: transformers' `models/llama`. Query and key rows are half-split there, as they are here.
"""

from __future__ import annotations

from typing import Any

from l4jax.checkpoints.fields import Fields, rope_from, rope_to
from l4jax.checkpoints.tables import SAME, TRANSPOSED, Rule, heads, heads_out
from l4jax.config import Attention, Layer, TextConfig

MODEL_TYPES = ("llama",)


def rules(config: TextConfig) -> list[Rule]:
    """Every tensor of the model."""
    size, layer = config.attention.head_dim, "model.layers.{l}."
    table = [
        Rule("model.embed_tokens.weight", ("embed",), SAME),
        Rule("model.norm.weight", ("norm.scale",), SAME),
        Rule(f"{layer}input_layernorm.weight", ("layers.{l}.attention_norm.scale",), SAME),
        Rule(f"{layer}post_attention_layernorm.weight", ("layers.{l}.ffn_norm.scale",), SAME),
        Rule(f"{layer}self_attn.o_proj.weight", ("layers.{l}.attention.o",), heads_out(size)),
    ]
    for name in ("q", "k", "v"):
        theirs = f"{layer}self_attn.{name}_proj.weight"
        table.append(Rule(theirs, (f"layers.{{l}}.attention.{name}",), heads(size)))
    for name in ("gate", "up", "down"):
        theirs = f"{layer}mlp.{name}_proj.weight"
        table.append(Rule(theirs, (f"layers.{{l}}.ffn.{name}",), TRANSPOSED))
    if not config.tie_embeddings:
        table.append(Rule("lm_head.weight", ("head",), TRANSPOSED))
    return table


def config_from(fields: Fields) -> TextConfig:
    """The architecture that a `llama` configuration describes."""
    heads_number, hidden = fields.take("num_attention_heads", int), fields.take("hidden_size", int)
    fields.expect("hidden_act", "silu")
    fields.expect("attention_bias", False)
    fields.expect("mlp_bias", False)
    fields.expect("attention_dropout", 0.0)
    return TextConfig(
        num_layers=fields.take("num_hidden_layers", int),
        embed_dim=hidden,
        vocab_size=fields.take("vocab_size", int),
        mlp_dim=fields.take("intermediate_size", int),
        max_context=fields.take("max_position_embeddings", int),
        attention=Attention(
            num_heads=heads_number,
            num_kv_heads=fields.take("num_key_value_heads", int, heads_number),
            head_dim=fields.take("head_dim", int, hidden // heads_number),
            rope=rope_from(fields, default_theta=10_000.0),
        ),
        pattern=(Layer("causal", "dense"),),
        norm_eps=fields.take("rms_norm_eps", float, 1e-6),
        tie_embeddings=fields.take("tie_word_embeddings", bool, False),
    )


def fits(config: TextConfig) -> bool:
    """Whether this format can describe the architecture."""
    return set(config.layers) == {Layer("causal", "dense")} and not config.attention.qk_norm


def config_to(config: TextConfig) -> dict[str, Any]:
    """The `llama` configuration of this architecture."""
    attention = config.attention
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **rope_to(attention.rope),
    }
