"""Llama 4's image encoder in checkpoints: configuration fields and tensor names of every format.

Sources: transformers' `models/llama4`, Meta's `llama4/vision`. Rotated pairs lie half a head apart
in our arrays, as in the decoder's; linear maps are (in, out); layers are numbered from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from l4jax.checkpoints.fields import Fields
from l4jax.checkpoints.rows import Join
from l4jax.checkpoints.tables import (
    SAME,
    TRANSPOSED,
    Layout,
    Match,
    Place,
    head_bias,
    heads,
    heads_out,
)
from l4jax.config import VisionConfig

_HF, _HF_LAYER = "vision_model.", "vision_model.model.layers.{l}."
_META = "vision_embeddings.vision_encoder."
_META_LAYER = f"{_META}transformer.resblocks.{{l}}."
HF_PREFIXES = (_HF, "multi_modal_projector.")
META_PREFIXES = ("vision_embeddings.", "vision_projection.")


class Array(NamedTuple):
    """One of our arrays: its name and shape, and what the formats call it.

    join: how Meta's shards hold it.
    """

    ours: str
    shape: tuple[int, ...]
    layout: Layout
    hf: str
    meta: str
    join: Join


def arrays(config: VisionConfig, text_dim: int) -> list[Array]:
    """Every array, layer by layer; `text_dim` is the decoder's width."""
    c, d, size = config, config.embed_dim, config.head_dim
    columns, rows, whole = Join(0), Join(1), Join(None)
    inside = c.channels * c.patch_size**2
    stacked = d * c.pixel_shuffle**2
    adapter = "vision_adapter.mlp."
    found = [
        Array(
            "vision.patches",
            (inside, d),
            TRANSPOSED,
            f"{_HF}patch_embedding.linear.weight",
            f"{_META}conv1._linear.weight",
            columns,
        ),
        *(
            Array(f"vision.{ours}", shape, SAME, _HF + theirs, _META + theirs, whole)
            for ours, theirs, shape in (
                ("class_embedding", "class_embedding", (d,)),
                ("positions", "positional_embedding_vlm", (c.side**2 + 1, d)),
            )
        ),
        *_norm("vision.norm_before", d, f"{_HF}layernorm_pre.", f"{_META}ln_pre."),
        *_norm("vision.norm_after", d, f"{_HF}layernorm_post.", f"{_META}ln_post."),
    ]
    for name, shape, hf, meta, join in (
        ("up", (stacked, c.output_dim), "fc1", "c_fc", columns),
        ("down", (c.output_dim, c.output_dim), "fc2", "c_proj", rows),
    ):
        theirs = f"{_HF}{adapter}{hf}.weight", f"vision_embeddings.{adapter}{meta}.weight"
        found.append(Array(f"vision.adapter.{name}", shape, TRANSPOSED, *theirs, join))
    projector = ("multi_modal_projector.linear_1.weight", "vision_projection.weight")
    shape = (c.output_dim, text_dim)
    found.append(Array("vision.projector", shape, TRANSPOSED, *projector, columns))
    for number in range(c.num_layers):
        for array in _layer(c, size):
            ours, hf, meta = (x.format(l=number) for x in (array.ours, array.hf, array.meta))
            found.append(array._replace(ours=ours, hf=hf, meta=meta))
    return found


def _layer(c: VisionConfig, size: int) -> list[Array]:
    """The arrays of a layer, its number left open."""
    d, n, ours = c.embed_dim, c.num_heads, "vision.layers.{l}."
    columns, rows, whole = Join(0), Join(1), Join(None)
    found = [
        *_norm(f"{ours}attention_norm", d, f"{_HF_LAYER}input_layernorm.", f"{_META_LAYER}ln_1."),
        *_norm(
            f"{ours}ffn_norm", d, f"{_HF_LAYER}post_attention_layernorm.", f"{_META_LAYER}ln_2."
        ),
    ]

    def linear(
        name: str,
        theirs: tuple[str, str],
        weight: tuple[Layout, tuple[int, ...]],
        bias: tuple[Layout, tuple[int, ...]],
        joins: tuple[Join, Join],
    ) -> None:
        for suffix, kind, (layout, shape), join in zip(
            ("", "_bias"), ("weight", "bias"), (weight, bias), joins, strict=True
        ):
            hf, meta = f"{_HF_LAYER}{theirs[0]}.{kind}", f"{_META_LAYER}{theirs[1]}.{kind}"
            found.append(Array(f"{ours}{name}{suffix}", shape, layout, hf, meta, join))

    for x in "qkv":
        turned = x != "v"
        linear(
            f"attention.{x}",
            (f"self_attn.{x}_proj", f"attn.w{x}"),
            (heads(size, interleaved=turned), (d, n, size)),
            (head_bias(size, interleaved=turned), (n, size)),
            (columns, columns),
        )
    out = (heads_out(size), (n, size, d))
    linear("attention.o", ("self_attn.o_proj", "attn.wo"), out, (SAME, (d,)), (rows, whole))
    up, down = (TRANSPOSED, (d, c.mlp_dim)), (TRANSPOSED, (c.mlp_dim, d))
    linear("ffn.up", ("mlp.fc1", "mlp.c_fc"), up, (SAME, (c.mlp_dim,)), (columns, columns))
    linear("ffn.down", ("mlp.fc2", "mlp.c_proj"), down, (SAME, (d,)), (rows, whole))
    return found


def _norm(ours: str, d: int, hf: str, meta: str) -> list[Array]:
    return [
        Array(f"{ours}.{name}", (d,), SAME, hf + theirs, meta + theirs, Join(None))
        for name, theirs in (("scale", "weight"), ("bias", "bias"))
    ]


def places(config: VisionConfig, paths: Iterable[tuple]) -> dict[str, Place]:
    """Canonical name → place, for the state paths of an encoder, whose layers lie stacked."""
    found = {}
    for path in paths:
        if path[1] != "layers":
            found[".".join(map(str, path))] = Place(path, None)
            continue
        for number in range(config.num_layers):
            found[".".join(map(str, (*path[:2], number, *path[2:])))] = Place(path, number)
    return found


def matches(found: Sequence[Array], theirs: Callable[[Array], str]) -> list[Match]:
    """One match for every array, under the names that `theirs` picks."""
    return [Match(theirs(array), (array.ours,), array.layout) for array in found]


def config_from(fields: Fields) -> VisionConfig:
    """The encoder that a `llama4_vision_model` configuration describes.

    The defaults are those of transformers' class, which leave out what a file may leave out.
    """
    ratio = fields.take("pixel_shuffle_ratio", float, 0.5)
    shuffle = round(1 / ratio) if ratio > 0 else 0
    if shuffle < 1 or shuffle * ratio != 1:
        raise ValueError(f"{fields.source}: pixel_shuffle_ratio {ratio} must be 1 / a whole number")
    config = VisionConfig(
        num_layers=fields.take("num_hidden_layers", int, 34),
        embed_dim=fields.take("hidden_size", int, 768),
        num_heads=fields.take("num_attention_heads", int, 16),
        mlp_dim=fields.take("intermediate_size", int, 5632),
        output_dim=fields.take("vision_output_dim", int, 7680),
        image_size=fields.take("image_size", int, 448),
        patch_size=fields.take("patch_size", int, 14),
        channels=fields.take("num_channels", int, 3),
        pixel_shuffle=shuffle,
        rope_theta=_theta(fields),
        norm_eps=fields.take("norm_eps", float, 1e-5),
    )
    for name in ("projector_input_dim", "projector_output_dim"):
        fields.expect(name, config.output_dim)
    if config.mlp_dim != config.embed_dim * shuffle**2:
        raise ValueError(
            f"{fields.source}: intermediate_size {config.mlp_dim} must be hidden_size "
            f"{config.embed_dim} times {shuffle**2}: the adapter's first layer has that width"
        )
    fields.expect("hidden_act", "gelu")
    fields.expect("multi_modal_projector_bias", False)
    for name in ("attention_dropout", "projector_dropout"):
        fields.expect(name, 0.0)
    for name in ("vision_feature_select_strategy", "vision_feature_layer"):
        fields.take(name, object, None)
    fields.finish()
    return config


def config_to(config: VisionConfig) -> dict[str, Any]:
    """The `llama4_vision_model` configuration of this encoder."""
    return {
        "model_type": "llama4_vision_model",
        "hidden_size": config.embed_dim,
        "hidden_act": "gelu",
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_channels": config.channels,
        "intermediate_size": config.mlp_dim,
        "vision_output_dim": config.output_dim,
        "projector_input_dim": config.output_dim,
        "projector_output_dim": config.output_dim,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "norm_eps": config.norm_eps,
        "pixel_shuffle_ratio": 1 / config.pixel_shuffle,
        "multi_modal_projector_bias": False,
        "vision_feature_select_strategy": "default",
        "rope_theta": config.rope_theta,
    }


def args_from(args: dict[str, Any]) -> VisionConfig:
    """The encoder that `vision_args` of a params.json describe."""
    image, patch = args["image_size"], args["patch_size"]
    if image["height"] != image["width"] or patch["height"] != patch["width"]:
        raise ValueError(f"vision_args: image_size {image} and patch_size {patch} must be squares")
    return VisionConfig(
        num_layers=args["n_layers"],
        embed_dim=args["dim"],
        num_heads=args["n_heads"],
        mlp_dim=int(args["mlp_ratio"] * args["dim"]),
        output_dim=args["output_dim"],
        image_size=image["height"],
        patch_size=patch["height"],
        pixel_shuffle=round(1 / args["pixel_shuffle_ratio"]),
    )


def args_to(config: VisionConfig) -> dict[str, Any]:
    """The `vision_args` of this encoder."""
    return {
        "image_size": {"height": config.image_size, "width": config.image_size},
        "patch_size": {"height": config.patch_size, "width": config.patch_size},
        "dim": config.embed_dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "mlp_ratio": config.mlp_dim / config.embed_dim,
        "output_dim": config.output_dim,
        "pixel_shuffle_ratio": 1 / config.pixel_shuffle,
    }


def _theta(fields: Fields) -> float:
    """`rope_theta`, or the one of transformers 5's `rope_parameters`."""
    theta = fields.take("rope_theta", float, None)
    inner = Fields(fields.take("rope_parameters", dict, {}), f"{fields.source}: rope_parameters")
    inner.expect("rope_type", "default")
    found = inner.take("rope_theta", float, 10_000.0 if theta is None else theta)
    inner.finish()
    if theta not in (None, found):
        raise ValueError(f"{fields.source}: rope_theta {theta} and rope_parameters {found} differ")
    return found
