"""Images: files to tiles per second, and tiles to features, of l4jax and of transformers.

The same JPEG files, photos that scikit-learn and llama-models ship, in three sizes, go through our
`process` and through transformers' Llama4ImageProcessor, all of a size in one call. Decoding the
files is part of it on both sides, by Pillow; where torchvision is not installed, the processor runs
on stand-ins for its functions (`image_peers`). Then a small encoder with the same weights on both
sides takes tiles of the published size. torch is run with every core and with one; ratios are
against the better of the two.

Large arrays come and go here, so it matters whether the C library keeps their memory: torch's own
half of the work then takes half the time. By default nothing is changed, as in a user's program.

    python -m experiments.benchmarks.images [--copies 3] [--keep-memory 0] [--repetitions 5]
                                            [--out DIR] [--json]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import numpy as np

from experiments.benchmarks import peers

SIZES = {"300 × 200": (300, 200), "1280 × 960": (1280, 960), "4032 × 3024": (4032, 3024)}
"""Width and height: an icon, a screen, a phone's camera."""


def main() -> None:
    args = peers.arguments(__doc__ or "", copies=3, tiles=5, keep_memory=0, repetitions=5)
    if args.keep_memory:
        peers.keep_memory()
    groups, results = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, size in SIZES.items():
            files = photos(pathlib.Path(folder), size, args.copies)
            apart = difference(files)
            groups[name], results[name] = measured(processors(files), len(files), args)
            results[name] |= {"files": len(files), "difference": apart}
    title, unit = "Files to tiles", "images per second"
    figures = [("images", peers.bars(title, groups, unit))]
    features, apart = encoders(args)
    group, found = measured(features, args.tiles, args)
    found |= {"tiles": args.tiles, "difference": apart}
    figures.append(("encoder", peers.bars("Tiles to features", {"": group}, "tiles per second")))
    versions = {name: importlib.metadata.version(name) for name in ("pillow", "numpy")}
    environment = peers.environment()
    report: dict[str, Any] = {
        "benchmark": "images",
        **environment,
        "versions": environment["versions"] | versions,  # type: ignore[operator]
        "dtype": args.dtype,
        "torchvision": torchvision(),
        "memory_kept": bool(args.keep_memory),
        "results": {**results, "encoder": found},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    figures[1][1].savefig(args.out / "images_encoder.png", dpi=150, bbox_inches="tight")
    peers.write("images", report, args, figures[0][1])


def measured(
    runs: dict[str, Callable[[], object]], count: int, args: argparse.Namespace
) -> tuple[dict[str, float], dict[str, Any]]:
    """Items per second of each contestant, the ratio to the best of transformers, and all times."""
    for run in runs.values():
        run()
    times = peers.alternate(runs, args.repetitions)
    rates = {name: count / t["seconds"] for name, t in times.items()}
    theirs = [name for name in runs if name.startswith("transformers")]
    best = min(times[name]["seconds_best"] for name in theirs)
    return rates, {
        "per_second": rates,
        "ratio": rates["l4jax"] / max(rates[name] for name in theirs),
        "ratio_of_best": best / times["l4jax"]["seconds_best"],
        "ratio_of_cpu_time": min(times[name]["cpu_seconds"] for name in theirs)
        / times["l4jax"]["cpu_seconds"],
        "times": times,
    }


# --- Files to tiles ------------------------------------------------------------------------------
def photos(folder: pathlib.Path, size: tuple[int, int], copies: int) -> list[pathlib.Path]:
    """JPEG files of this size, each photo as often as asked."""
    from PIL import Image

    folders = [resources.files(name) for name in ("llama_models.resources", "sklearn.datasets")]
    found = sorted(
        file
        for place in folders
        for pattern in ("*.jp*g", "images/*.jpg")
        for file in pathlib.Path(str(place)).glob(pattern)
    )
    files = []
    for n, file in enumerate(found * copies):
        files.append(folder / f"{size[0]}-{n}.jpg")
        image = Image.open(file).convert("RGB").resize(size, Image.Resampling.BICUBIC)
        image.save(files[-1], quality=90)
    return files


def processors(files: Sequence[pathlib.Path]) -> dict[str, Callable[[], object]]:
    """Functions that turn the files into tiles."""
    import torch
    from PIL import Image

    from experiments.benchmarks import image_peers
    from l4jax.data import images

    peer = image_peers.transformers_processor()

    def theirs(threads: int) -> Callable[[], object]:
        def run() -> object:
            torch.set_num_threads(threads)
            opened = [Image.open(file) for file in files]
            return peer(opened, return_tensors="pt")

        return run

    return {
        "l4jax": lambda: images.process(files),
        "l4jax (1 thread)": lambda: [images.process([file]) for file in files],
    } | {f"transformers ({n} threads)": theirs(n) for n in sorted({1, peers.THREADS})}


def difference(files: Sequence[pathlib.Path]) -> float:
    """The largest difference between both sides' tiles, of values from -1 to 1."""
    runs = processors(files[:4])
    theirs = runs["transformers (1 threads)"]().pixel_values.float().numpy()
    ours = np.concatenate([image.tiles for image in runs["l4jax"]()])
    return float(np.abs(ours - theirs).max())


def torchvision() -> str:
    """What stands behind the functions that transformers' processor calls."""
    from experiments.benchmarks import image_peers

    return "installed" if image_peers.has_torchvision() else "stand-ins for its functions"


# --- Tiles to features ---------------------------------------------------------------------------
def encoders(args: argparse.Namespace) -> tuple[dict[str, Callable[[], object]], float]:
    """Functions that encode the same tiles with the same weights, and how far they are apart."""
    import jax
    import jax.numpy as jnp
    import torch
    from flax import nnx

    from l4jax import presets, sharding
    from l4jax.config import Execution, VisionConfig
    from l4jax.models.multimodal import Multimodal

    vision = VisionConfig(
        num_layers=4,
        embed_dim=352,
        num_heads=4,
        mlp_dim=1408,
        output_dim=512,
        image_size=336,
        patch_size=14,
    )
    text = presets.get("tiny-llama4-scout").make()
    how = Execution(dtype=args.dtype)
    model = sharding.create(lambda: Multimodal(text, vision, execution=how, rngs=nnx.Rngs(0)))
    model = jax.tree.map(lambda x: x.astype(args.dtype), model)
    shape = (args.tiles, 3, vision.image_size, vision.image_size)
    tiles = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    encode = jax.jit(lambda encoder, tiles: encoder(tiles))
    ours, given = model.vision, jnp.asarray(tiles, args.dtype)
    peer = _transformers_encoder(model, args)
    theirs = torch.tensor(tiles, dtype=getattr(torch, args.dtype), device=args.device)

    def run(threads: int) -> Callable[[], Any]:
        def encoded() -> Any:
            torch.set_num_threads(threads)
            with torch.inference_mode():
                features = peer.vision_model(theirs).last_hidden_state
                found = peer.multi_modal_projector(features.reshape(-1, features.shape[-1]))
                return found.float().cpu().numpy()

        return encoded

    runs = {f"transformers ({n} threads)": run(n) for n in sorted({1, peers.THREADS})}
    expected = runs["transformers (1 threads)"]()
    found = np.asarray(encode(ours, given), np.float32).reshape(expected.shape)
    apart = float(np.abs(found - expected).max() / np.abs(expected).max())
    return {"l4jax": lambda: encode(ours, given).block_until_ready(), **runs}, apart


def _transformers_encoder(model: Any, args: argparse.Namespace) -> Any:
    """transformers' model with the weights of ours, by way of an export."""
    import torch
    from transformers import Llama4ForConditionalGeneration

    from l4jax import checkpoints

    with tempfile.TemporaryDirectory() as scratch:
        tokens = {"bos_token_id": None, "eos_token_id": None}
        checkpoints.save(model, pathlib.Path(scratch) / "model", to="hf", extra=tokens)
        theirs = Llama4ForConditionalGeneration.from_pretrained(
            pathlib.Path(scratch) / "model", dtype=getattr(torch, args.dtype)
        )
    return theirs.to(args.device)


if __name__ == "__main__":
    main()
