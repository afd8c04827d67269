"""One way in and out, whatever the format: a directory is detected by the files in it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
from jax.experimental import multihost_utils

import l4jax.checkpoints.arrays as arrays
import l4jax.checkpoints.huggingface as huggingface
import l4jax.checkpoints.loading as loading
import l4jax.checkpoints.meta as meta
import l4jax.checkpoints.orbax as orbax
from l4jax import weights
from l4jax.checkpoints.formats import Format, Model, Source
from l4jax.config import Execution, TextConfig
from l4jax.lora import LowRank
from l4jax.models.llama4 import Llama
from l4jax.quantization import LowPrecision

_DTYPES = ("float32", "bfloat16")


def detect(path: str | os.PathLike[str]) -> tuple[pathlib.Path, Format]:
    """The directory and the format of the checkpoint in it.

    Raises:
        FileNotFoundError: there is no such directory, or no checkpoint in it.
    """
    directory = pathlib.Path(path)
    if not directory.exists():
        raise FileNotFoundError(f"{directory}: no such directory")
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory}: a checkpoint is a directory, this is a file")
    if (directory / orbax.MARKER).exists():
        return directory, "orbax"
    if (directory / huggingface.CONFIG).exists():
        return directory, "hf"
    if (directory / meta.PARAMS).exists():
        return directory, "meta"
    raise FileNotFoundError(
        f"{directory}: no checkpoint: neither {orbax.MARKER} (ours) nor {huggingface.CONFIG} "
        f"(Hugging Face) nor {meta.PARAMS} (Meta)"
    )


def source(path: str | os.PathLike[str]) -> Source:
    """What a checkpoint holds, checked but not read; raises as `load` does."""
    directory, kind = detect(path)
    return {"orbax": arrays, "hf": huggingface, "meta": meta}[kind].source(directory)


def describe(path: str | os.PathLike[str]) -> tuple[Model, Mapping[str, Any]]:
    """The architectures in a checkpoint, and what it says of the model, by format.

    Raises as `load` does.
    """
    directory, kind = detect(path)
    if kind == "orbax":
        return orbax.read_marker(directory)
    if kind == "hf":
        found = huggingface.describe(directory / huggingface.CONFIG)
        return found.model, {"huggingface": found.values}
    opened = meta.source(directory)
    return opened.model, opened.described


def read_model(path: str | os.PathLike[str]) -> Model:
    """The architectures of a checkpoint's text and vision parts; raises as `load` does."""
    return describe(path)[0]


def read_config(path: str | os.PathLike[str]) -> TextConfig:
    """The text architecture of a checkpoint, without its parameters; raises as `load` does."""
    return read_model(path).text


def load(
    path: str | os.PathLike[str],
    *,
    vision: bool = True,
    dtype: Literal["float32", "bfloat16"] | None = None,
    execution: Execution | None = None,
) -> Llama:
    """The model in a directory, sharded on the current mesh (`sharding.use`) as it is read.

    Args:
        path: a directory of Hugging Face's (Llama 4, with or without vision; Llama 3), of Meta's,
            or one that `save` or `convert` wrote.
        vision: whether the image encoder comes too, if there is one: the model is then a
            `models.multimodal.Multimodal`. Without it memory holds the text part alone, and so
            will what `save` makes of it.
        dtype: of the parameters; as stored by default, quantized ones included.
        execution: how the model computes; by default in the parameters' type.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: the checkpoint is damaged, incomplete, of another architecture, or has a
            configuration field that might matter and is unknown. The message names it.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} must be one of {', '.join(_DTYPES)}")
    directory, kind = detect(path)
    if kind == "orbax":
        return orbax.load(directory, vision=vision, dtype=dtype, execution=execution)
    found = source(path)
    if not vision:
        found = found._replace(model=Model(found.model.text))
    return loading.build(found, dtype=dtype, execution=execution)


def save(
    model: Llama,
    path: str | os.PathLike[str],
    *,
    to: Format,
    max_shard_bytes: int = 5_000_000_000,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model as a new directory, which appears whole or not at all.

    Args:
        model: parameters keep their type.
        path: must not exist, or be an empty directory.
        to: "orbax", or "hf" for safetensors that transformers loads.
        max_shard_bytes: size at which a new safetensors file begins.
        extra: further fields of Hugging Face's config.json, such as token ids.

    Raises:
        FileExistsError: something is already there.
        ValueError: the format is unknown or cannot describe the model, or a weight has an adapter
            or low precision in its place.
    """
    if to not in ("orbax", "hf"):
        raise ValueError(f"format {to!r} must be one of orbax, hf; `convert` writes the others")
    for kind, plain in ((LowRank, "lora.merge"), (LowPrecision, "quantization.full")):
        for matrix in weights.standing(model, kind):
            raise ValueError(f"{matrix.name} is no array but {kind.__name__}: {plain} gives one")
    with new_directory(path) as directory:
        if to == "orbax":
            orbax.save(model, directory)
        else:
            huggingface.save(model, directory, max_shard_bytes=max_shard_bytes, extra=extra)


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A directory to fill; it takes its real name when the block ends without an error.

    Several processes fill it together; the first one makes it and gives it its name.

    Raises:
        FileExistsError: there is already something at `path`.
    """
    final = pathlib.Path(path).absolute()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise FileExistsError(f"{final}: already exists and is not empty")
    partial, first = final.with_name(f".{final.name}.partial"), jax.process_index() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    multihost_utils.sync_global_devices(f"{final} is made")
    try:
        yield partial
        multihost_utils.sync_global_devices(f"{final} is filled")
        if first:
            os.replace(partial, final)
    except BaseException:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    multihost_utils.sync_global_devices(f"{final} has its name")
