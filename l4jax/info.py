"""What a preset or a checkpoint is, in numbers: the facts behind `l4jax info`."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from typing import Any

from rich.console import Console
from rich.table import Table

import l4jax.checkpoints.licences as licences
from l4jax import checkpoints, presets, roofline


def describe(name: str, *, context: int | None = None) -> dict[str, Any]:
    """The facts of a preset, or of the checkpoint in a directory, as plain JSON values.

    Args:
        name: a preset's name, or a path; a directory that exists is taken for a checkpoint.
        context: tokens of context for operations per token; by default 8192, or all it allows.

    Raises:
        FileNotFoundError, ValueError: neither a preset nor a whole checkpoint has this name.
    """
    path = pathlib.Path(name)
    if name not in presets.PRESETS and (path.exists() or path.is_absolute() or "/" in name):
        (config, vision), about = checkpoints.read_model(path), _checkpoint(path)
    else:
        preset = presets.get(name)
        config, vision = preset.make(), preset.vision
        about = {"preset": name, "licence": preset.licence, "note": preset.note}
        about["assumed"] = list(preset.assumed)
        if preset.licence.startswith("Llama"):
            about |= _licence(preset.licence)
    context = min(8192, config.max_context) if context is None else context
    if not 1 <= context <= config.max_context:
        raise ValueError(f"context {context} must be from 1 to the model's {config.max_context}")
    counts = roofline.parameters(config)
    encoder = roofline.vision_parameters(vision, config.embed_dim) if vision else 0
    total = counts.total + encoder
    first, later = roofline.kv_bytes_per_token(config)
    return about | {
        # Active are those of a word's token; those of images cost the encoder once.
        "parameters": {
            "total": total,
            "active": counts.active,
            "decoder": counts.total,
            "encoder": encoder,
            **counts._asdict(),
        },
        "bytes": {dtype: int(total * n) for dtype, n in roofline.DTYPE_BYTES.items()},
        "kv_cache_bfloat16": {
            "bytes_per_token": first,
            "bytes_per_token_after_first_chunk": later,
            "max_context": config.max_context,
            "bytes_at_max_context": roofline.kv_bytes(config, config.max_context),
        },
        "flops_per_token": {
            "context": context,
            "forward": roofline.forward_flops(config, context),
            "training": roofline.training_flops(config, context),
        },
        "layers": [list(layer) for layer in config.layers],
        "config": dataclasses.asdict(config),
        "vision": vision and {"parameters": encoder, "config": dataclasses.asdict(vision)},
    }


def show(facts: dict[str, Any], console: Console) -> None:
    """Prints what `describe` found, for people."""
    name = facts.get("preset") or facts["checkpoint"]
    console.print(name, style="bold", markup=False, highlight=False)
    for key in ("note", "format", "licence"):
        if facts.get(key):
            console.print(f"{key}: {facts[key]}", highlight=False, markup=False)
    counts, cache, flops = (
        facts[key] for key in ("parameters", "kv_cache_bfloat16", "flops_per_token")
    )
    kinds = collections.Counter(f"{a} {f}" for a, f in facts["layers"])
    sizes = ", ".join(f"{dtype} {_bytes(n)}" for dtype, n in facts["bytes"].items())
    parts = ""
    if counts["encoder"]:
        parts = (
            f": {_count(counts['decoder'])} in the decoder, "
            f"{_count(counts['encoder'])} in the image encoder"
        )
    table = Table(show_header=False, box=None)
    for row in (
        (
            "parameters",
            f"{_count(counts['total'])} in total, {_count(counts['active'])} active{parts}",
        ),
        ("weights", sizes),
        ("layers", ", ".join(f"{n} {kind}" for kind, n in kinds.items())),
        (
            "KV cache (bfloat16)",
            f"{_bytes(cache['bytes_per_token'])} per token"
            + _after(cache)
            + f"; {_bytes(cache['bytes_at_max_context'])} at {cache['max_context']:,} tokens",
        ),
        (
            f"FLOPs per token at {flops['context']:,}",
            f"{flops['forward'] / 1e9:,.4g} G forward, {flops['training'] / 1e9:,.4g} G training",
        ),
    ):
        table.add_row(*row)
    console.print(table)
    for line in facts.get("assumed", []):
        console.print(f"[yellow]our assumption, not published:[/yellow] {line}", highlight=False)
    if facts.get("duties"):
        console.print("Whoever passes these weights on, or builds on them, must:")
        for line in facts["duties"]:
            console.print(f"- {line}", highlight=False, markup=False)


def _checkpoint(path: pathlib.Path) -> dict[str, Any]:
    """What only a checkpoint has: where it is, its format, its size on disk, whose licence."""
    directory, kind = checkpoints.detect(path)
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    names = {"orbax": "l4jax (Orbax)", "hf": "Hugging Face safetensors", "meta": "Meta shards"}
    about = {"checkpoint": str(directory), "format": names[kind], "bytes_on_disk": size}
    version = checkpoints.licence_of(directory, *checkpoints.describe(directory))
    known = version not in (None, "none")
    return about | (_licence(str(version)) if known else {"licence": None})


def _licence(name: str) -> dict[str, Any]:
    """Which agreement the weights come under, and what it asks."""
    agreement = licences.get(name)
    return {
        "licence": agreement.title,
        "licence_version": agreement.version,
        "notice": agreement.notice,
        "duties": list(agreement.duties),
    }


def _after(cache: dict[str, int]) -> str:
    later = cache["bytes_per_token_after_first_chunk"]
    if later == cache["bytes_per_token"]:
        return ""
    return f", {_bytes(later)} after the first chunk"


def _count(n: int) -> str:
    """A number with three or four digits and its unit."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n:.0f}"


def _bytes(n: int) -> str:
    """Bytes in binary units."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f} B"
