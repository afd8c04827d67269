"""What a run leaves when it has ended: its model, adapters, and curves."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import matplotlib.figure
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

import l4jax.data.images as pictures
from l4jax import checkpoints
from l4jax.checkpoints import orbax, peft
from l4jax.checkpoints.formats import model_of
from l4jax.data import companions, templates
from l4jax.data.tokenizer import Tokenizer
from l4jax.models.llama4 import Llama
from l4jax.models.multimodal import Multimodal
from l4jax.training import checkpointing, tracking


def finite(model: nnx.Module) -> bool:
    """Whether all numbers of a model are finite."""
    arrays = jax.tree.leaves(nnx.state(model))
    floats = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
    return all(bool(jnp.isfinite(x).all()) for x in floats)


def save_model(
    model: Llama,
    tokenizer: Tokenizer,
    folder: epath.Path,
    *,
    to: Literal["orbax", "hf"] = "orbax",
    origin: str | None = None,
    images: pictures.Settings | None = None,
) -> None:
    """Writes a model for `checkpoints.load` and `l4jax generate`, in place of an earlier one.

    On a disk the earlier one goes when the new one is whole. At an address nothing can be renamed:
    the earlier one goes first, and what marks the new one as whole is written last.

    Args:
        model: what to save.
        tokenizer: goes with it.
        folder: of the model; a gs:// address for Orbax's format.
        to: the format.
        origin: the checkpoint that training began with; its licence and settings are copied.
        images: how images become tiles, where no checkpoint says it.
    """
    if "://" in str(folder):
        save_at_address(model, tokenizer, folder, origin=origin, images=images)
        return
    extra = None
    if to == "hf":
        extra = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.stop_ids)}
    with _replaced(folder) as new:
        checkpoints.save(model, new, to=to, extra=extra)
        if jax.process_index() == 0:
            _complete(new, model, tokenizer, origin, to, images)


def save_at_address(
    model: Llama,
    tokenizer: Tokenizer,
    folder: epath.Path,
    *,
    origin: str | None = None,
    images: pictures.Settings | None = None,
) -> None:
    """`save_model` where folders cannot be renamed: each process writes its own arrays there."""
    first = jax.process_index() == 0
    if first and folder.exists():
        (folder / orbax.MARKER).unlink(missing_ok=True)
        folder.rmtree()
    multihost_utils.sync_global_devices(f"{folder} is free")
    orbax.save_parameters(model, folder / orbax.PARAMETERS)
    if not first:
        return
    with tempfile.TemporaryDirectory() as name:
        here = pathlib.Path(name)
        _complete(here, model, tokenizer, origin, "orbax", images)
        orbax.write_marker(here, orbax.Marker(model_of(model), {}))
        for file in sorted(here.iterdir(), key=lambda file: file.name == orbax.MARKER):
            (folder / file.name).write_bytes(file.read_bytes())


def _complete(  # noqa: PLR0913 - all that goes with a model
    folder: pathlib.Path,
    model: Llama,
    tokenizer: Tokenizer,
    origin: str | None,
    to: str,
    images: pictures.Settings | None,
) -> None:
    """Adds what goes with a model to its folder."""
    tokenizer.save(folder)
    if isinstance(model, Multimodal) and images is not None:
        vision = model.vision.config
        files = companions.processor_configs(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            max_tiles=images.max_tiles,
            shuffle_ratio=1 / vision.pixel_shuffle,
        )
        for name, values in files.items():
            (folder / name).write_text(json.dumps(values, indent=2))
    if to == "hf" and tokenizer.family and tokenizer.stop_ids:
        (folder / "chat_template.jinja").write_text(templates.chat_template(tokenizer.family))
        settings = companions.generation_config(
            bos_id=tokenizer.bos_id, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id
        )
        (folder / "generation_config.json").write_text(json.dumps(settings, indent=2))
    if origin and pathlib.Path(origin).is_dir():
        for name, file in checkpoints.carried(pathlib.Path(origin)).items():
            if not (folder / name).exists():
                (folder / name).write_bytes(file.read_bytes())


@contextlib.contextmanager
def _replaced(folder: epath.Path) -> Iterator[pathlib.Path]:
    """A path at which to make a folder that takes an earlier one's place when the block ends."""
    final, first = pathlib.Path(folder), jax.process_index() == 0
    new, old = (final.with_name(f".{final.name}.{kind}") for kind in ("new", "old"))
    if first:
        shutil.rmtree(new, ignore_errors=True)
    try:
        yield new
        if first:
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)
                final.rename(old)
            new.rename(final)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if first:
            shutil.rmtree(new, ignore_errors=True)
        raise
    multihost_utils.sync_global_devices(f"{final} is whole")


def save_adapters(model: Llama, folder: epath.Path) -> None:
    """Writes adapters as PEFT reads them, in place of earlier ones.

    Raises:
        ValueError: PEFT's format cannot hold them, or they would lie at an address.
    """
    if "://" in str(folder):
        raise ValueError(f"{folder} is no folder on a disk")
    with _replaced(folder) as new:
        peft.save(model, new)


def curves(folder: epath.Path) -> None:
    """`curves.png`: what `metrics.jsonl` says by step, a panel for each kind of number."""
    lines = tracking.read(folder / "metrics.jsonl")
    panels = {
        name: [key for key in keys if any(key in line for line in lines)]
        for name, keys in {
            "loss (nats)": ("loss", "eval_loss", "nll", "eval_nll", "eval_short_loss"),
            "share": ("accuracy", "eval_accuracy", "eval_needle"),
            "reward": ("margin", "eval_margin", "chosen_reward", "rejected_reward"),
            "gradient norm": ("grad_norm",),
            "learning rate": ("learning_rate",),
        }.items()
    }
    panels = {name: keys for name, keys in panels.items() if keys}
    figure = matplotlib.figure.Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axes, (name, keys) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if key in line]
            style = {"marker": "o", "markersize": 4} if key.startswith("eval_") else {"alpha": 0.8}
            axes.plot(*zip(*points, strict=True), label=key, **style)
        axes.set(xlabel="step", ylabel=name)
        axes.legend(fontsize="small")
    with checkpointing.appearing(folder / "curves.png") as path, path.open("wb") as file:
        figure.savefig(file, dpi=120, format="png")
