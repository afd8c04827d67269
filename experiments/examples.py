"""What recipes train on: files that become tokens, mixtures of them, and batches on this mesh."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

import l4jax.data.images as pictures
from experiments.console import CONSOLE, say, told
from experiments.leaves import Recipe
from l4jax import checkpoints, distributed, sharding
from l4jax.data import conversations, corpus, pipeline, sources, store, tokenizing
from l4jax.data.mixture import Mixture
from l4jax.data.tokenizer import Tokenizer
from l4jax.training.trainer import batch_sharding, spread

MOST_SEGMENTS = 32
"""In a row, where a recipe must know them apart."""


# --- Files ---------------------------------------------------------------------------------------
def stores(paths: Sequence[str], encode: Any, recipe: Recipe, name: str) -> list[store.Store]:
    """Tokenized files, in folders under `out`.

    A resumed run goes on with the tokens that it began with, whatever became of the files.
    """
    # Documents to be cut are stored whole: packing cuts them where rows end.
    cut = recipe.files.too_long == "split" and isinstance(encode, conversations.Documents)
    how: dict[str, Any] = {
        "max_length": None if cut else recipe.length,
        "too_long": recipe.files.too_long,
        "on_error": recipe.files.on_error,
    }
    if jax.process_count() > 1 and "://" not in recipe.out:
        # Every host makes the same store, in a place of its own.
        name = f"{name}-{jax.process_index()}"
    found = []
    for number, path in enumerate(paths):
        folder = _cache(recipe) / f"{name}-{number}"
        made = tokenizing.made(folder, encode, **how) if recipe.resume else None
        if made is None:
            source, workers = sources.Source(path), recipe.files.workers
            made = tokenizing.tokenize(
                source, encode, folder, **how, workers=workers, console=CONSOLE
            )
            report = sources.Report(**json.loads((made.folder / "report.json").read_text()))
            say(f"{path}: {report.summary()}, {made.meta['tokens']:,} tokens")
            for reason in report.reasons[:3]:
                say(f"  {reason}")
        elif not _unchanged(path, made):
            say(f"{path}: is gone or has changed; going on with its tokens in {folder}")
        found.append(made)
    return found


def _unchanged(path: str, made: store.Store) -> bool:
    """Whether a store is of the files that are there now."""
    try:
        return made.meta["source"]["fingerprint"] == sources.Source(path).fingerprint()
    except FileNotFoundError:
        return False


def mixtures(
    recipe: Recipe, encode: Any, embedded: Callable[[], Iterable[Any]], about: str
) -> tuple[Mixture, Mixture | None]:
    """What to train on, and what is only measured on: files, or what the recipe brings.

    Args:
        recipe: names the files.
        encode: makes examples of records.
        embedded: the records of both sides, where no files are named.
        about: says that these are being made.
    """
    files = recipe.files
    if files.data:
        train = stores(files.data, encode, recipe, "train")
        rest = stores(files.eval_data, encode, recipe, "held-out")
        return Mixture(train, files.weights), Mixture(rest) if rest else None
    with told(about):
        sides = [tokenizing.encoded(side, encode) for side in embedded()]
    if not isinstance(encode, conversations.Documents):  # which packing cuts
        sides = [fitting(side, recipe) for side in sides]
    return Mixture(sides[:1]), Mixture(sides[1:])


def standard_library() -> list[list[dict[str, str]]]:
    """The standard library's texts as records, to train on and held out."""
    return [[{"text": text} for text in side] for side in corpus.standard_library()]


def _cache(recipe: Recipe) -> epath.Path:
    if "://" in recipe.out:  # a store is read by memory maps
        of = f"{recipe.folder.name}-{hashlib.sha256(recipe.out.encode()).hexdigest()[:12]}"
        return epath.Path(os.path.expanduser("~/.cache/l4jax/data")) / of
    return recipe.folder / "data"


# --- Batches -------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Batches that are read anew whenever they are measured on: images would fill the memory.

    more: what else belongs to each of them, laid out on the mesh.
    """

    batches: pipeline.Batches
    most: int
    more: Sequence[Mapping[str, Any]] | None = None

    def __iter__(self) -> Iterator[pipeline.Batch]:
        first = itertools.islice(self.batches, self.most)
        if self.more is None:
            return first
        pairs = zip(first, self.more, strict=True)
        return ({**spread(batch), **more} for batch, more in pairs)


def training_batches(
    mixture: Mixture,
    recipe: Recipe,
    *,
    packing: Any,
    segments: int | None = None,
    sizes: Any = None,
    images: pipeline.Images | None = None,
) -> pipeline.Batches:
    """Batches without end; of several processes each makes its own rows."""
    batches = pipeline.batches(
        mixture,
        length=recipe.length,
        batch_size=sizes or recipe.batch,
        seed=recipe.seed,
        packing=packing,
        segments=segments,
        workers=recipe.files.workers,
        rows=_own_rows(recipe.length),
    )
    return _with_images(batches, images, recipe.optimization.accumulate)


def held_out_batches(
    mixture: Mixture,
    recipe: Recipe,
    *,
    packing: Any,
    segments: int | None = None,
    images: pipeline.Images | None = None,
    most: int = 16,
) -> HeldOut:
    """The first `most` batches of one epoch, in their order."""
    batches = pipeline.batches(
        Mixture(mixture.stores, epochs=1),
        length=recipe.length,
        batch_size=recipe.batch,
        seed=None,
        packing=packing,
        segments=segments,
        rows=_own_rows(recipe.length),
    )
    return HeldOut(_with_images(batches, images), most)


def fitting(examples: Any, recipe: Recipe) -> Any:
    """A store's examples that are no longer than a row."""
    numbers = np.flatnonzero(examples.lengths <= recipe.length)
    if not len(numbers):
        raise ValueError(f"no example is as short as --length {recipe.length}")
    if len(numbers) < len(examples):
        say(f"{len(examples) - len(numbers):,} examples are longer than a row and left out")
    return store.Subset(examples, numbers)


def one_epoch(
    store: Any,
    recipe: Recipe,
    *,
    segments: int | None = None,
    images: pipeline.Images | None = None,
) -> Iterable[pipeline.Batch]:
    """All examples of a store once, in their order, with `example`."""
    batches = pipeline.batches(
        Mixture([store], epochs=1),
        length=recipe.length,
        batch_size=recipe.batch,
        seed=None,
        packing="best_fit",
        segments=segments or min(recipe.length, MOST_SEGMENTS),
        rows=_own_rows(recipe.length),
    )
    return _with_images(batches, images)


def _own_rows(length: int) -> Callable[[int], Sequence[int]] | None:
    if jax.process_count() == 1:
        return None
    return lambda size: distributed.local_rows(batch_sharding(size, length), size)


# --- Images --------------------------------------------------------------------------------------
def sight(recipe: Recipe, path: str, tokenizer: Tokenizer) -> pipeline.Images | None:
    """How a checkpoint's model reads images, if it shall: for encoders of records and batches."""
    vision = checkpoints.read_model(path).vision
    if not recipe.files.images:
        if vision is not None:
            say(f"{path}: its image encoder is left out; --images keeps it")
        return None
    if vision is None:
        raise ValueError(f"images: the model of {path} has no image encoder; leave --images out")
    patch = pictures.special(tokenizer, pictures.PATCH)
    return pipeline.Images(settings=pictures.of_checkpoint(path, vision), patch_id=patch)


def reading(recipe: Recipe, images: pipeline.Images | None) -> dict[str, Any]:
    """What encoders of records are told of images."""
    if images is None:
        return {}
    return {"images": images.settings, "folder": recipe.files.image_folder}


def _with_images(
    batches: pipeline.Batches, images: pipeline.Images | None, pieces: int = 1
) -> pipeline.Batches:
    """Batches with the images of their examples, as many tiles as the mesh can share out."""
    if images is None:
        return batches
    mesh = jax.sharding.get_mesh().shape
    shards = math.prod(mesh.get(axis, 1) for axis in sharding.BATCH)
    return batches.with_images(dataclasses.replace(images, multiple=shards, pieces=pieces))


def check_text(recipe: Recipe) -> None:
    """Whether a recipe that trains on text alone is asked for no more."""
    if recipe.files.images:
        raise ValueError("images: this recipe reads text only; use pretrain, sft or dpo")
