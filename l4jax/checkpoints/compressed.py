"""Quantized weights as the compressed-tensors package keeps them in a Hugging Face directory.

Source: the package's `quant_args` and `compressors`. A weight (out, in) of 8 bits lies as it is,
one of 4 bits eight values to a word (`weight_packed`, with its true shape as `weight_shape`);
`weight_scale` is (out, groups).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from l4jax.checkpoints.formats import SCALE
from l4jax.checkpoints.tables import Layout, Match, constant
from l4jax.kernels.quantized import Scheme, pack_words, unpack_words

PACKED, SCALED, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
_FORMATS = {
    "fp8": ("float-quantized", "float", 8),
    "int8": ("int-quantized", "int", 8),
    "int4": ("pack-quantized", "int", 4),
}
_IGNORED = (
    "re:.*lm_head",
    "re:.*self_attn",
    "re:.*router",
    "re:.*shared_expert.*",
    r"re:.*feed_forward\.(gate|up|down)_proj",
    "re:vision_model.*",
    "re:multi_modal_projector.*",
)


def check(section: dict[str, Any] | None, source: str) -> None:
    """Raises ValueError unless a `quantization_config` is one whose weights are read here."""
    if section is None:
        return
    method, kind = section.get("quant_method"), section.get("format")
    formats = [name for name, _, _ in _FORMATS.values()]
    if method != "compressed-tensors" or kind not in formats:
        raise ValueError(
            f"{source}: quantization_config with quant_method {method!r} and format {kind!r} is "
            f"not read; only compressed-tensors with {', '.join(formats)}"
        )
    expected = next((t, bits) for name, t, bits in _FORMATS.values() if name == kind)
    for name, group in (section.get("config_groups") or {}).items():
        weights = group.get("weights") or {}
        found = (weights.get("type", "int"), weights.get("num_bits"))
        if found != expected or not weights.get("symmetric", True):
            raise ValueError(
                f"{source}: quantization_config.config_groups.{name}: weights of type {found[0]!r} "
                f"with {found[1]} bits, symmetric {weights.get('symmetric', True)}, do not fit "
                f"format {kind!r}"
            )


def ignored(narrow: Collection[str], plain: Iterable[str], *, llama3: bool) -> tuple[str, ...]:
    """Names of linear layers left as they were, and patterns ("re:…") of them.

    Patterns are those of published packages of Llama 4, as far as they fit no quantized layer.

    Args:
        narrow: names of the quantized layers.
        plain: names of the decoder's other linear layers.
        llama3: whether the model is of that family, whose packages have names only.
    """
    patterns = [
        pattern
        for pattern in (() if llama3 else _IGNORED)
        if not any(re.match(pattern.removeprefix("re:"), name) for name in narrow)
    ]
    known = [pattern.removeprefix("re:") for pattern in patterns]
    names = (name for name in plain if not any(re.match(pattern, name) for pattern in known))
    return (*names, *(patterns or ["lm_head"]))


def describe(scheme: Scheme, *, groups: int | None, ignored: tuple[str, ...]) -> dict[str, Any]:
    """The `quantization_config` of an export.

    Args:
        scheme: of the weights.
        groups: inputs that share a scale; None for one scale per output channel.
        ignored: names of linear layers left as they were, or patterns; see `ignored`.
    """
    kind, number, bits = _FORMATS[scheme]
    weights = {
        "num_bits": bits,
        "type": number,
        "symmetric": True,
        "strategy": "channel" if groups is None else "group",
        "group_size": groups,
        "dynamic": False,
    }
    tokens = {"num_bits": 8, "type": number, "symmetric": True, "strategy": "token"}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": list(ignored),
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": tokens | {"dynamic": True} if scheme == "fp8" else None,
            }
        },
        "kv_cache_scheme": None,
    }


def split(
    match: Match, shape: tuple[int, ...], scale: tuple[int, ...], scheme: Scheme, heads: int
) -> list[tuple[Match, tuple[int, ...]]]:
    """The tensors of one quantized weight and their shapes.

    Args:
        match: of the weight when it is not quantized.
        shape: theirs of the weight, (…, out, in).
        scale: theirs of the scale, (…, out, groups).
        scheme: of the weight.
        heads: of queries in the decoder.
    """
    stem, (name,) = match.theirs.removesuffix(".weight"), match.ours
    scales = Match(stem + SCALED, (name + SCALE,), scale_layout(match.layout, heads)), scale
    if scheme != "int4":
        return [(match, shape), scales]
    words = Match(stem + PACKED, (name,), _packed(match.layout)), (*shape[:-1], shape[-1] // 8)
    size = np.array(shape[-2:], np.int64)
    if len(shape) == 3:
        size = np.tile(size, (shape[0], 1))
    return [words, scales, (Match(stem + SHAPE, (), constant(size)), size.shape)]


def _packed(layout: Layout) -> Layout:
    """`layout` for int4 values that lie in words."""
    return layout._replace(
        load=lambda x: layout.load(unpack_words(x)),
        save=lambda parts: pack_words(np.ascontiguousarray(layout.save(parts))),
    )


def scale_layout(layout: Layout, heads: int) -> Layout:
    """How the scale of a weight with this layout is laid out: as the weight, groups for inputs.

    The inputs of the output projection, (d, heads · h) ↔ (heads, h, d), are two dimensions of ours:
    a group is a part of a head, or several whole heads.
    """
    if layout.cut != 2:
        return layout

    def load(x: Any) -> tuple[Any, ...]:
        groups = x.shape[1]
        if groups % heads and heads % groups:
            raise ValueError(
                f"{groups} groups of inputs lie across the {heads} heads of an output projection; "
                f"only groups inside a head, or of whole heads, are read"
            )
        outer = min(groups, heads)
        return (x.T.reshape(outer, groups // outer, -1),)

    return Layout(load, lambda parts: parts[0].reshape(-1, parts[0].shape[2]).T, cut=2)
