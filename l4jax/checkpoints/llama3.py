"""Llama 3 dense models in Hugging Face's and in Meta's checkpoints: fields and tensor names.

Sources: transformers' `models/llama`, whose query and key rows are half-split as ours are, and
Meta's `llama3/model.py`, whose rotated pairs lie side by side.
"""

from __future__ import annotations

from typing import Any

from l4jax.checkpoints.fields import Fields, rope_from, rope_to
from l4jax.checkpoints.rows import Join
from l4jax.checkpoints.tables import SAME, TRANSPOSED, MetaRule, Rule, heads, heads_out
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


def meta_rules(config: TextConfig) -> list[MetaRule]:
    """Every tensor of Meta's own files; with a tied head, `output` repeats the embedding table."""
    size, layer, kv = config.attention.head_dim, "layers.{l}.", config.attention.num_kv_heads
    whole, columns, across = Join(None), Join(0), Join(1)
    attention = "layers.{l}.attention."
    tied = config.tie_embeddings
    output = ("embed" if tied else "head",)
    table = [
        MetaRule("tok_embeddings.weight", ("embed",), SAME, columns),
        MetaRule("output.weight", output, SAME if tied else TRANSPOSED, columns),
        MetaRule("norm.weight", ("norm.scale",), SAME, whole),
        MetaRule(
            f"{layer}attention_norm.weight", ("layers.{l}.attention_norm.scale",), SAME, whole
        ),
        MetaRule(f"{layer}ffn_norm.weight", ("layers.{l}.ffn_norm.scale",), SAME, whole),
        MetaRule(f"{attention}wo.weight", (f"{attention}o",), heads_out(size), across),
    ]
    for name in "qkv":
        # More shards than key-value heads repeat each head in neighbouring shards.
        join = columns if name == "q" else Join(0, holders=kv)
        layout = heads(size, interleaved=name != "v")
        table.append(MetaRule(f"{attention}w{name}.weight", (attention + name,), layout, join))
    for theirs, name in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
        ours, join = (f"layers.{{l}}.ffn.{name}",), across if name == "down" else columns
        table.append(MetaRule(f"{layer}feed_forward.{theirs}.weight", ours, TRANSPOSED, join))
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
