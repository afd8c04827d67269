"""Damaged sources, bad destinations and full disks: one line that names it, and nothing is lost."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import (
    INDEX,
    call,
    convert,
    copied,
    edit,
    flip,
    holder,
    in_memory,
    model_of,
    patch,
    place_of,
    pth_place,
    refuse,
    rewrite,
    shards,
    snapshot,
    vision_of,
    write_hf,
)
from safetensors.numpy import load_file, save_file

TYPES = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn")
SLOW = pytest.mark.slow
Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def run(capsys):
    """Calls the command line in this process."""
    return functools.partial(call, capsys)


@pytest.fixture
def refused(capsys):
    return functools.partial(refuse, capsys)


@pytest.fixture
def tmp_path():
    with in_memory() as directory:
        yield directory


@pytest.fixture(scope="module")
def kept():
    with in_memory() as directory:
        yield directory


@pytest.fixture(scope="module")
def good(kept):
    """Checkpoints of a small model in each format, to be copied before they are damaged."""
    model = model_of("llama3.1-8b", "bfloat16", 3)
    made = {"plain": write_hf(kept / "hf", model)}
    made["shards"] = write_hf(kept / "hf-shards", model, max_shard_bytes=60_000)
    made["hf"] = convert(made["plain"], kept / "sums", "hf", max_shard_bytes=60_000)
    made["meta"] = convert(made["plain"], kept / "meta", "meta", shards=4)
    made["orbax"] = convert(made["plain"], kept / "orbax", "orbax")
    return made


def data_file(directory):
    """The largest file of an Orbax directory: the one with arrays."""
    files = [p for p in (directory / "parameters").rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


# --- Ways to damage a source: each gives the words that must be told -----------------------------
def truncated(directory):
    file = shards(directory)[2]
    last = list(json.loads(file.read_bytes()[8:].split(b"}}")[0] + b"}}"))[-1]
    file.write_bytes(file.read_bytes()[:-10])
    return file.name, last


def flipped(directory):
    file = holder(directory, Q)
    flip(file, place_of(file, Q)[0] + 100)
    return file.name, Q


def flipped_pth(directory):
    name = "layers.1.attention.wq.weight"
    file = shards(directory)[2]
    flip(file, pth_place(file, name) + 100)
    return file.name, name


def flipped_pth_without_sums(directory):
    (directory / "checksums.json").unlink()
    return flipped_pth(directory)


def swapped(directory):
    one, two = shards(directory)[1:3]
    one.rename(directory / "x")
    two.rename(one)
    (directory / "x").rename(two)
    (directory / "checksums.json").unlink(missing_ok=True)
    return (one.name,)


def unindexed(directory):
    edit(directory / INDEX, lambda v: v["weight_map"].pop(Q))
    return holder(directory, Q).name, Q


def unknown_in_index(directory):
    file = shards(directory)[1].name
    edit(directory / INDEX, lambda v: v["weight_map"].update(extra=file))
    return file, "extra"


def twice(directory):
    one, two = holder(directory, Q), shards(directory)[0]
    assert one != two
    save_file(load_file(two) | {Q: load_file(one)[Q]}, two)
    return two.name, Q


def lost(directory):
    file = shards(directory)[1]
    file.unlink()
    return (file.name,)


def escaping(directory):
    file = holder(directory, Q).name
    shutil.copy(directory / file, directory.parent / "outside.safetensors")
    edit(directory / INDEX, lambda v: v["weight_map"].update({Q: "../outside.safetensors"}))
    return INDEX, "../outside.safetensors"


def changed(directory, name, change):
    file = holder(directory, name)
    tensors = load_file(file)
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    save_file(tensors, file)
    return file.name, name


def mixed(directory):
    """The third shard is of another training run."""
    (directory / "checksums.json").unlink()
    other = write_hf(directory.parent / "other", model_of("llama3.1-8b", "bfloat16", 3))
    rewrite(other, lambda w: w.update({k: -x for k, x in w.items()}))
    meta = convert(other, directory.parent / "other-meta", "meta", shards=4)
    name = "consolidated.02.pth"
    shutil.copy(meta / name, directory / name)
    return name, "norm.weight"


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def executable(directory):
    file, stream = shards(directory)[1], io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("consolidated.01/data.pkl", pickle.dumps(Evil(directory / "pwned"), 2))
        archive.writestr("consolidated.01/version", "3\n")
    file.write_bytes(stream.getvalue())
    return file.name, "refused"


def other_config(directory):
    edit(directory / "config.json", lambda v: v.update(num_key_value_heads=4))
    return "k_proj.weight", "(64, 64)"


def chunk(directory):
    file = data_file(directory)
    middle = file.stat().st_size // 2
    patch(file, middle, bytes(b ^ 1 for b in file.read_bytes()[middle : middle + 4]))
    return (directory.name,)


def cut_chunk(directory):
    file = data_file(directory)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (directory / "checksums.json").unlink()
    return (directory.name,)


def lost_chunk(directory):
    data_file(directory).unlink()
    (directory / "checksums.json").unlink()
    return (directory.name,)


def behind_the_end(directory):
    file = shards(directory)[0]
    file.write_bytes(file.read_bytes() + b"\0" * 64)
    return (file.name,)


integer = functools.partial(changed, name=Q, change=lambda x: x.astype(np.int32))
turned = functools.partial(changed, name=Q, change=lambda x: x.reshape(32, -1))
short = functools.partial(changed, name=Q, change=lambda x: x[:-1])
infinite = functools.partial(
    changed, name=Q, change=lambda x: np.where(x == x.max(), x.dtype.type(np.inf), x)
)

DAMAGES = [
    ("shards", truncated),
    ("hf", flipped),
    ("meta", flipped_pth),
    ("meta", flipped_pth_without_sums),
    ("shards", swapped),
    ("meta", swapped),
    ("shards", unindexed),
    ("shards", unknown_in_index),
    ("shards", twice),
    ("shards", lost),
    ("meta", lost),
    ("shards", escaping),
    ("shards", integer),
    ("shards", turned),
    ("shards", short),
    ("shards", infinite),
    ("shards", other_config),
    ("shards", behind_the_end),
    ("meta", mixed),
    ("meta", executable),
    ("orbax", chunk),
    ("orbax", cut_chunk),
    ("orbax", lost_chunk),
]


@pytest.mark.parametrize("number", range(len(DAMAGES)))
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_source_is_refused_and_left_alone(number, good, refused, tmp_path):
    kind, damage = DAMAGES[number]
    source = copied(good[kind], tmp_path / "damaged")
    words = damage(source)
    before = snapshot(source)
    refused(["verify", source], *words)
    refused(["convert", source, tmp_path / "x", "--to", ("hf", "orbax")[number % 2]], *words)
    assert not (tmp_path / "x").exists()
    assert snapshot(source) == before


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [np.nan, pytest.param(np.inf, marks=SLOW), -np.inf])
def test_a_number_that_is_none_is_found_in_every_type(dtype, value, refused, tmp_path):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    if dtype == "float8_e4m3fn":
        if not np.isnan(value):
            pytest.skip("float8_e4m3fn has no infinity")
        plain = write_hf(tmp_path / "plain", model_of("llama3.1-8b", "bfloat16", 3))
        source = convert(plain, tmp_path / "source", "hf", scheme="fp8")
        (source / "checksums.json").unlink()
        name = "model.layers.1.mlp.up_proj.weight"
    else:
        source = write_hf(tmp_path / "source", model_of("llama3.1-8b", "bfloat16", 3))
        rewrite(source, lambda w: w.update({k: x.astype(kind) for k, x in w.items()}))
        name = Q
    file = source / "model.safetensors"
    (start, size), one = place_of(file, name), np.array(value, kind)
    patch(file, start + size - one.nbytes, one.tobytes())
    words = file.name, name, "nan" if np.isnan(value) else str(float(value))
    refused(["verify", source], *words)
    refused(["convert", source, tmp_path / "x", "--to", "orbax"], *words)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_number_that_is_none_is_found_in_orbax_and_meta_directories(value, refused, tmp_path):
    from l4jax import checkpoints

    model = jax.tree.map(lambda x: x + 0, model_of("llama3.1-8b", "float32", 3))
    model.layers[0].ffn_norm.scale[...] = model.layers[0].ffn_norm.scale[...].at[1, 5].set(value)
    checkpoints.save(model, tmp_path / "orbax", to="orbax")
    words = "layers.1.ffn_norm.scale", str(value), "finite"
    refused(["verify", tmp_path / "orbax"], *words)
    refused(["convert", tmp_path / "orbax", tmp_path / "x", "--to", "hf"], *words)
    plain = write_hf(tmp_path / "plain", model_of("llama3.1-8b", "float32", 3))
    meta = convert(plain, tmp_path / "meta", "meta", shards=2)
    name, file = "layers.1.ffn_norm.weight", meta / "consolidated.01.pth"
    patch(file, pth_place(file, name) + 20, np.array(value, np.float32).tobytes())
    refused(["verify", meta], file.name, name, str(value))
    refused(["convert", meta, tmp_path / "y", "--to", "hf"], file.name, name, str(value))
    assert not any((tmp_path / name).exists() for name in "xy")


def test_a_tied_head_that_is_another_matrix_is_refused(refused, tmp_path):
    """Meta's files hold it beside the embedding table; neither may win silently."""
    source = write_hf(tmp_path / "hf", model_of("llama3-8b"))
    meta = convert(source, tmp_path / "meta", "meta", shards=2)
    edit(meta / "params.json", lambda v: v["l4jax"]["config"].update(tie_embeddings=True))
    (meta / "checksums.json").unlink()
    refused(["convert", meta, tmp_path / "x", "--to", "hf"], "output.weight")
    refused(["verify", meta], "output.weight")
    assert not (tmp_path / "x").exists()


# --- verify --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["hf", "meta", "orbax"])
def test_whole_checkpoints_are_called_whole(kind, good, run, tmp_path):
    result = run("verify", good[kind], "--json")
    assert (result.code, result.out.count("\n")) == (0, 1)
    report = json.loads(result.out)
    assert report.keys() == {
        *("checkpoint", "format", "whole", "tensors", "bytes", "checksums", "md5_sums")
    }
    assert (report["format"], report["whole"]) == (kind, True)
    assert report["checkpoint"] == str(good[kind])
    assert report["checksums"] == report["tensors"] > 20
    assert report["bytes"] >= sum(x.nbytes for x in load_file(shards(good["plain"])[0]).values())
    bare = copied(good[kind], tmp_path / "x")
    (bare / "checksums.json").unlink()
    result = json.loads(run("verify", bare, "--json").out)
    assert result == report | {"checkpoint": str(bare), "checksums": 0}
    text = run("verify", good[kind])
    assert text.code == 0
    assert "whole" in text.out


@pytest.mark.parametrize("kind", ["hf", *(pytest.param(x, marks=SLOW) for x in ("meta", "orbax"))])
def test_checksums_that_do_not_fit_are_told(kind, good, refused, tmp_path):
    file = copied(good[kind], tmp_path / "x") / "checksums.json"
    text = file.read_text()
    name = sorted(json.loads(text)["tensors"])[7]

    def told(change, *words):
        file.write_text(text)
        edit(file, change)
        refused(["verify", file.parent], *words)
        refused(["convert", file.parent, tmp_path / "y", "--to", "hf"], *words[:1])

    told(lambda v: v["tensors"].pop(name), name, "checksums.json")
    told(lambda v: v["tensors"][name].update(digest="0" * 32), name, "0" * 32)
    told(lambda v: v["tensors"][name].update(dtype="float16"), name, "float16")
    told(lambda v: v["tensors"][name].update(shape=[1, 2]), name, "(1, 2)")
    told(lambda v: v["tensors"].update(extra=v["tensors"][name]), "extra")
    told(lambda v: v.update(algorithm="md5"), "checksums.json", "md5")
    told(lambda v: v.pop("tensors"), "checksums.json")
    for broken in ("", "[]", "null", "{", text[:-100], '{"format": 1}'):
        file.write_text(broken)
        refused(["verify", file.parent], "checksums.json")


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_a_vision_part_that_is_gone_is_missed(kind, refused, tmp_path):
    """Without checksums it would be a text model, which is one as well."""
    model, vision = model_of("llama-guard-4", "bfloat16", 1), vision_of("llama-guard-4")
    both = write_hf(tmp_path / "both", model, vision=vision)
    both = convert(both, tmp_path / "x", kind)
    text = convert(write_hf(tmp_path / "text", model), tmp_path / "y", kind)
    if kind == "hf":
        rewrite(both, lambda w: [w.pop(name) for name in [*w] if name.startswith(("vis", "mul"))])
    else:
        shutil.rmtree(both / "parameters")
        shutil.copytree(text / "parameters", both / "parameters")
    for command in (["verify", both], ["convert", both, tmp_path / "z", "--to", "hf"]):
        refused(command, "checksums.json", "vision" if kind == "orbax" else "")
    assert not (tmp_path / "z").exists()


def test_md5_sums_of_meta_are_checked(good, refused, run, tmp_path):
    source = copied(good["meta"], tmp_path / "x")
    (source / "checksums.json").unlink()
    (source / "tokenizer.model").write_bytes(b"ranks")
    files = [*shards(source), source / "params.json", source / "tokenizer.model"]
    sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in files}
    listed = source / "checklist.chk"

    def write(**changes):
        lines = (f"{value}  {name}\n" for name, value in (sums | changes).items())
        listed.write_text("".join(lines))

    write()
    assert json.loads(run("verify", source, "--json").out)["md5_sums"] == 6
    for name, value in sums.items():
        write(**{name: "0" * 32})
        refused(["verify", source], name, "MD5", value)
    write(**{"consolidated.04.pth": "1" * 32})
    refused(["verify", source], "consolidated.04.pth")
    listed.write_text("nonsense")
    refused(["verify", source], "checklist.chk", "nonsense")
