"""Our reader and writer against the safetensors package, and files that must be refused."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from l4jax.checkpoints import safetensors

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def arrays(rng):
    return {
        "a.weight": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal((7,)).astype(BFLOAT16),
        "c": rng.integers(0, 9, (2, 1, 2)).astype(np.int8),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(2.5),
        "half": rng.standard_normal((2, 2)).astype(np.float16),
    }


def tensors(named):
    return [safetensors.Tensor(name, x.shape, x.dtype, lambda x=x: x) for name, x in named.items()]


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, x in expected.items():
        assert found[name].dtype == x.dtype, name
        assert found[name].shape == x.shape, name
        assert found[name].tobytes() == x.tobytes(), name


def write_raw(file, header, data=b"\0" * 64):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(shape=(4,), dtype="F32", offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_the_package_reads_what_we_write(tmp_path, rng):
    safetensors.write(tmp_path, tensors(arrays(rng)))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same(load_file(tmp_path / "model.safetensors"), arrays(np.random.default_rng(0)))
    with safe_open(tmp_path / "model.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_we_read_what_the_package_writes(tmp_path, rng):
    expected = arrays(rng)
    save_file(expected, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = {name: e.read() for name, e in safetensors.scan(tmp_path).items()}
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "BF16", "BOOL", "I64"])
def test_every_type_comes_back_bit_for_bit(dtype, tmp_path, rng):
    kind = safetensors.DTYPES[dtype]
    value = rng.standard_normal((5, 3)).astype(kind)
    safetensors.write(tmp_path, tensors({"x": value}))
    assert_same({"x": safetensors.scan(tmp_path)["x"].read()}, {"x": value})


def test_shards_hold_what_their_index_says(tmp_path, rng):
    expected = {f"x{i}": rng.standard_normal((10,)).astype(np.float32) for i in range(7)}
    safetensors.write(tmp_path, tensors(expected), max_shard_bytes=100)
    index = json.loads((tmp_path / safetensors.INDEX).read_text())
    assert index["metadata"]["total_size"] == 7 * 40
    assert len(set(index["weight_map"].values())) == 4
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(tmp_path / file)[name], expected[name])
        assert (tmp_path / file).stat().st_size < 400
    assert_same({n: e.read() for n, e in safetensors.scan(tmp_path).items()}, expected)


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path, rng):
    expected = {f"x{i}": rng.standard_normal((100,)).astype(np.float32) for i in range(2)}
    safetensors.write(tmp_path, tensors(expected), max_shard_bytes=8)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_a_tensor_that_is_not_what_was_announced_leaves_no_file(tmp_path):
    wrong = safetensors.Tensor("x", (3,), np.dtype(np.float32), lambda: np.zeros(4, np.float32))
    with pytest.raises(AssertionError, match="x: announced"):
        safetensors.write(tmp_path, [wrong])
    assert not (tmp_path / "model.safetensors").exists()


def test_every_truncation_is_noticed(tmp_path, rng):
    file = tmp_path / "model.safetensors"
    safetensors.write(tmp_path, tensors(arrays(rng)))
    whole = file.read_bytes()
    for size in (0, 4, 7, 8, 50, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="model.safetensors"):
            safetensors.scan(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\xff\xfe{", "not valid"),
        (b'{"a": ', "not valid"),
        (b"[1, 2]", "not valid"),
        (b"3", "not valid"),
        (b'{"a": 1}', "malformed"),
        (b'{"a": {}}', "malformed"),
        (json.dumps({"a": entry()}).encode()[:-1] + b', "a": 1}', "'a' is there twice"),
        ({"a": entry(dtype="F4")}, "unknown dtype 'F4'"),
        ({"a": entry(shape=(5,))}, "has 16 bytes"),
        ({"a": entry(shape=(-4,))}, "malformed"),
        ({"a": entry(offsets=(16, 0))}, "bytes"),
        ({"a": entry(shape=(64,), offsets=(0, 256))}, "truncated"),
        ({"a": entry(offsets=(-16, 0))}, "malformed"),
        ({"a": entry(offsets=(0, 16, 32))}, "malformed"),
    ],
)
def test_a_damaged_header_is_refused(header, message, tmp_path):
    write_raw(tmp_path / "model.safetensors", header)
    with pytest.raises(ValueError, match=message):
        safetensors.scan(tmp_path)


def test_a_header_length_beyond_the_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        safetensors.scan(tmp_path)


def indexed(directory, weight_map, text=None):
    (directory / safetensors.INDEX).write_text(text or json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x", "sub/x.safetensors", "..", ""])
def test_an_index_may_not_leave_its_directory(name, tmp_path):
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    for place in (tmp_path / "x.safetensors", inside / "sub" / "x.safetensors"):
        save_file({"a": np.zeros(2, np.float32)}, place)
    indexed(inside, {"a": name})
    with pytest.raises(ValueError, match="leaves the directory"):
        safetensors.scan(inside)


@pytest.mark.parametrize(
    ("weight_map", "error", "message"),
    [
        ({"a": "one.safetensors", "b": "two.safetensors"}, FileNotFoundError, "two.safetensors"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, ValueError, "lacks b"),
    ],
)
def test_an_index_that_disagrees_with_the_files_is_refused(weight_map, error, message, tmp_path):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "one.safetensors")
    indexed(tmp_path, weight_map)
    with pytest.raises(error, match=message):
        safetensors.scan(tmp_path)


def test_a_tensor_that_its_index_does_not_name_is_refused(tmp_path):
    both = {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
    save_file(both, tmp_path / "one.safetensors")
    indexed(tmp_path, {"a": "one.safetensors"})
    with pytest.raises(ValueError, match="holds b, which .* places in no file"):
        safetensors.scan(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for name in ("one.safetensors", "two.safetensors"):
        save_file({"a": np.zeros(2, np.float32), name: np.zeros(1)}, tmp_path / name)
    names = {"one.safetensors": "one.safetensors", "two.safetensors": "two.safetensors"}
    indexed(tmp_path, {"a": "one.safetensors"} | names)
    with pytest.raises(ValueError, match="holds a, which"):
        safetensors.scan(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "x", "a": "y"}}']
)
def test_an_index_that_is_none_is_refused(text, tmp_path):
    (tmp_path / safetensors.INDEX).write_text(text)
    with pytest.raises(ValueError, match="index"):
        safetensors.scan(tmp_path)


def test_an_empty_directory_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither"):
        safetensors.scan(tmp_path)
