"""Tiny checkpoints on disk, and what tests see of them without our readers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import tempfile
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from conftest import build
from safetensors import deserialize
from safetensors.numpy import load_file, save_file

INDEX = "model.safetensors.index.json"
EXPERT = re.compile(r"(model\.layers\.(\d+)\.feed_forward\.)experts\.(\d+)\.(\w+)_proj\.weight")
"""A routed expert's weight in a directory whose experts lie one by one."""
COMPANIONS = {
    "tokenizer.json": b'{"odd":  "spacing"}',
    "tokenizer_config.json": b"{}\n\n",
    "special_tokens_map.json": b"{ }",
    "generation_config.json": b'{"eos_token_id": [1, 2]}',
    "chat_template.jinja": "{{ 'ü' }}\r\n".encode(),
    "preprocessor_config.json": b'{"p": 1}',
    "processor_config.json": b'{"q": 1}',
    "LICENSE": b"Mine.\n",
}


@contextlib.contextmanager
def in_memory():
    """A new folder, in memory if it can be: a disk is waited for at every tensor written."""
    shared = pathlib.Path("/dev/shm")
    place = shared if os.access(shared, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix="l4jax-") as directory:
        yield pathlib.Path(directory)


@functools.cache
def model_of(name, dtype="float32", layers=None, **attention):
    """By default a layer more than the pattern has: a scanned part and a tail."""
    from l4jax import presets

    config = presets.get(f"tiny-{name}").make()
    config = dataclasses.replace(
        config,
        num_layers=layers or len(config.pattern) + 1,
        attention=dataclasses.replace(config.attention, **attention),
    )
    return jax.tree.map(lambda x: x.astype(dtype), build(config))


def write_hf(directory, model, *, vision=None, max_shard_bytes=10**9, files=()):
    """A Hugging Face directory; with `vision`, a VisionConfig, as the published ones have it."""
    from l4jax import checkpoints
    from l4jax.checkpoints import vision as encoder

    checkpoints.save(model, directory, to="hf", max_shard_bytes=max_shard_bytes)
    if vision is not None:
        whole = load_file(directory / "model.safetensors")
        rng = np.random.default_rng(3)
        whole = {f"language_model.{name}": x for name, x in whole.items()}
        for array in encoder.arrays(vision, model.config.embed_dim):
            x = rng.standard_normal(array.shape).astype(next(iter(whole.values())).dtype)
            whole[array.hf] = np.ascontiguousarray(array.layout.save((x,)))
        save_file(whole, directory / "model.safetensors")
        text = json.loads((directory / "config.json").read_text())
        values = {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "image_token_index": 3,
            "text_config": text,
            "vision_config": encoder.config_to(vision),
        }
        (directory / "config.json").write_text(json.dumps(values))
    for name in files:
        (directory / name).write_bytes(COMPANIONS[name])
    return directory


@functools.cache
def vision_of(name):
    from l4jax import presets

    return presets.get(f"tiny-{name}").vision


def stored(directory):
    """Type, shape and bytes of every tensor of a Hugging Face directory, by its package."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, x in deserialize(file.read_bytes()):
            assert name not in found
            found[name] = x["dtype"], tuple(x["shape"]), bytes(x["data"])
    return found


def same(one, other):
    """Asserts that two directories hold equal tensors."""
    one, other = stored(one), stored(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor == other[name], name


_KINDS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8"}
_KINDS |= {"F8_E4M3": "float8_e4m3fn", "I32": "int32", "I64": "int64"}


def numbers(directory):
    """Every tensor of a Hugging Face directory as an array."""
    return {
        name: np.frombuffer(data, np.dtype(getattr(ml_dtypes, _KINDS[kind], _KINDS[kind]))).reshape(
            shape
        )
        for name, (kind, shape, data) in stored(directory).items()
    }


def snapshot(directory):
    """Every file and its bytes."""
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def rewrite(directory, change):
    """Applies `change` to the tensors of a directory with one safetensors file."""
    whole = load_file(directory / "model.safetensors")
    change(whole)
    save_file(whole, directory / "model.safetensors")


def place_of(file, name):
    """First byte of a tensor in a safetensors file, and its number of bytes."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    start, stop = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    return 8 + length + start, stop - start


def patch(file, offset, data):
    """Overwrites bytes in the middle of a file."""
    with open(file, "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def flip(file, offset):
    """Turns the lowest bit of one byte."""
    patch(file, offset, bytes([file.read_bytes()[offset] ^ 1]))


def copied(directory, to):
    return pathlib.Path(shutil.copytree(directory, to))


def convert(src, dst, to, **settings):
    """Converts and returns the destination; options and arguments alike go by name."""
    from l4jax import checkpoints

    fields = checkpoints.Options._fields
    options = {key: settings.pop(key) for key in fields if key in settings}
    checkpoints.convert(src, dst, to=to, options=checkpoints.Options(**options), **settings)
    return pathlib.Path(dst)


def multiplied(directory):
    """Weights of a quantized directory by name: values · scale, and each value's scale."""
    found, tensors = {}, numbers(directory)
    for name, scale in tensors.items():
        if not name.endswith("_scale"):
            continue
        stem = name.removesuffix("_scale")
        values = tensors.get(stem)
        if values is None:
            words = tensors[f"{stem}_packed"].view(np.uint32)
            nibbles = [(words >> shift & 15).astype(np.int8) - 8 for shift in range(0, 32, 4)]
            values = np.stack(nibbles, -1).reshape(len(words), -1)
            assert tuple(tensors[f"{stem}_shape"]) == values.shape
        scale = np.repeat(scale, values.shape[1] // scale.shape[1], axis=1).astype(np.float32)
        found[stem] = values.astype(np.float32) * scale, scale
    return found


def fused(experts, prefix, layer_names=("gate", "up")):
    """Experts one by one, as Hugging Face's unquantized files hold them."""
    count = 1 + max(int(EXPERT.fullmatch(name)[3]) for name in experts)
    parts = [
        np.stack([experts[f"{prefix}experts.{e}.{x}_proj.weight"].T for e in range(count)])
        for x in layer_names
    ]
    return np.concatenate(parts, axis=-1)


def shards(directory):
    return sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.pth"))


def holder(directory, name):
    """The safetensors file that holds a tensor."""
    return next(f for f in shards(directory) if name in load_file(f))


def pth_place(file, name):
    """First byte of a tensor in a .pth file, found by what torch's package wrote about it."""
    from l4jax.checkpoints import pth

    return pth.scan_file(file)[name].offset


def edit(file, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


class Result(NamedTuple):
    code: int
    out: str
    err: str


def call(capsys, *arguments):
    """Calls the command line in this process."""
    from l4jax import cli

    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    return Result(code, *capsys.readouterr())


def refuse(capsys, arguments, *words):
    """Asserts that a command fails with one line that has these words."""
    result = call(capsys, *arguments)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("l4jax: ")
    assert result.err.count("\n") == 1
    for word in words:
        assert str(word) in result.err
    return result
