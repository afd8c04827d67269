"""Reading a Hugging Face config.json so that no field is overlooked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from l4jax.config import Layer, Rope, RopeScaling

T = TypeVar("T")

# fmt: off
HARMLESS = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "architectures",
    "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "cache_implementation", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "for_llm_compressor",
    "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range",
    "is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "max_length",
    "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_router_logits", "output_scores", "pad_token_id", "prefix", "pretraining_tp",
    "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty",
    "return_dict", "return_dict_in_generate", "router_aux_loss_coef", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16",
    "use_cache",
})
# fmt: on
"""Fields that change neither the parameters nor the logits of an inference pass."""

_REQUIRED: Any = object()


class Fields:
    """A configuration's fields, each to be taken, expected or known to be harmless.

    Args:
        values: the JSON object.
        source: what to call it in errors: the file's path, and the section if not the whole.
    """

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.source = source
        self._values = dict(values)

    def take(self, name: str, kind: type[T], default: Any = _REQUIRED) -> T:
        """The value of a field, which thereby counts as read.

        Raises:
            ValueError: it is absent and there is no default, or not of this kind.
        """
        value = self._values.pop(name, None)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self.source}: the field {name!r} is missing")
            return default
        if kind is float and isinstance(value, int):
            value = float(value)
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, kind):
            raise ValueError(f"{self.source}: {name} {value!r} must be of type {kind.__name__}")
        return value

    def has(self, name: str) -> bool:
        """Whether the field is there, be it null."""
        return name in self._values

    def expect(self, name: str, only: Any) -> None:
        """Raises ValueError if the field is there and has another value than the supported one."""
        value = self._values.pop(name, only)
        if value != only:
            raise ValueError(f"{self.source}: {name} {value!r} is not supported, only {only!r}")

    def finish(self) -> None:
        """Raises ValueError if a field was neither read nor is known to be harmless."""
        unknown = sorted(
            name
            for name, value in self._values.items()
            if name not in HARMLESS and value is not None
        )
        if unknown:
            name = unknown[0]
            raise ValueError(
                f"{self.source}: field {name!r} (value {self._values[name]!r}) is unknown; as it "
                f"might change the model, it is not ignored"
            )


def rope_from(fields: Fields, *, default_theta: float) -> Rope:
    """RoPE from either spelling: `rope_theta` with `rope_scaling`, or `rope_parameters`."""
    theta = fields.take("rope_theta", float, None)
    old, new = fields.take("rope_scaling", dict, None), fields.take("rope_parameters", dict, None)
    if new and theta is not None and new.get("rope_theta", theta) != theta:
        raise ValueError(f"rope_theta {theta} and rope_parameters {new} contradict each other")
    if new and old and {"rope_theta": None} | old != new | {"rope_theta": None}:
        raise ValueError(f"rope_scaling {old} and rope_parameters {new} contradict each other")
    theta = default_theta if theta is None else theta
    spelling = "rope_parameters" if new else "rope_scaling"
    section = Fields(new or old or {}, f"{fields.source}: {spelling}")
    theta = section.take("rope_theta", float, theta)
    older = section.take("type", str, None)
    kind = section.take("rope_type", str, older or "default")
    if older not in (None, kind):
        raise ValueError(f"{spelling}: type {older!r} contradicts rope_type {kind!r}")
    if kind == "default":
        section.finish()
        return Rope(theta=theta)
    if kind != "llama3":
        raise ValueError(f"{section.source}: rope_type {kind!r} is not supported, only 'llama3'")
    scaling = RopeScaling(
        factor=section.take("factor", float),
        low_freq_factor=section.take("low_freq_factor", float),
        high_freq_factor=section.take("high_freq_factor", float),
        original_context=section.take("original_max_position_embeddings", int),
    )
    section.finish()
    return Rope(theta=theta, scaling=scaling)


def rope_to(rope: Rope) -> dict[str, Any]:
    """The older spelling, which every version of transformers and vLLM understands."""
    scaling = rope.scaling and {
        "rope_type": "llama3",
        "factor": rope.scaling.factor,
        "low_freq_factor": rope.scaling.low_freq_factor,
        "high_freq_factor": rope.scaling.high_freq_factor,
        "original_max_position_embeddings": rope.scaling.original_context,
    }
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def shortest_pattern(kinds: Sequence[Layer]) -> tuple[Layer, ...]:
    """The shortest pattern whose repetition gives these layers."""
    for period in range(1, len(kinds) + 1):
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
            return tuple(kinds[:period])
    return ()
