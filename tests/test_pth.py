"""Our reader and writer against torch, and archives that must be refused, made without it."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest

from l4jax.checkpoints import pth

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NAMES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool uint16 uint32 uint64"
DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in [*re.split(" ", NAMES), "float8_e4m3fn", "float8_e5m2"]
}


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def arrays(rng):
    """Of every type an odd matrix, a scalar and an empty one."""
    shapes = {"matrix": (3, 5), "scalar": (), "empty": (0, 7)}
    return {
        f"{name}.{kind}": np.asarray(rng.integers(0, 2, shape)).astype(dtype)
        for name, dtype in DTYPES.items()
        for kind, shape in shapes.items()
    }


def write(file, named, archive="consolidated.00"):
    """Returns how often each byte was written."""
    plan = pth.plan([pth.Spec(n, x.shape, x.dtype) for n, x in named.items()], archive=archive)
    parts = [(plan.offsets[name], x.tobytes()) for name, x in named.items()]
    parts += plan.framing({name: zlib.crc32(x.tobytes()) for name, x in named.items()})
    content, written = bytearray(plan.size), np.zeros(plan.size, int)
    for offset, part in parts:
        content[offset : offset + len(part)] = part
        written[offset : offset + len(part)] += 1
    file.write_bytes(content)
    return written


def bytes_of(tensor):
    return bytes(tensor.detach().contiguous().reshape(-1).untyped_storage())


def push(value):
    """Opcodes that push a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def tensor(key="0", kind="FloatStorage", numel=6, offset=0, shape=(2, 3), strides=(3, 1), rest=b""):
    pid = b"(" + push("storage") + f"ctorch\n{kind}\n".encode() + push(key) + push("cpu")
    view = b"".join(map(push, (offset, shape, strides)))
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + push(numel) + b"tQ" + view + hooks + rest
    ) + b"tR"


def flat(**items):
    return b"\x80\2}(" + b"".join(push(name) + ops for name, ops in items.items()) + b"u."


def save(file, pickled, *, folder="archive", compression=zipfile.ZIP_STORED, **records):
    """An archive of a pickle, storage 0 (six float32) and other records, `__` for a slash."""
    records = {"data.pkl": pickled, "data/0": np.arange(6, dtype="<f4").tobytes()} | {
        name.replace("__", "/"): content for name, content in records.items()
    }
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            if content is not None:
                archive.writestr(f"{folder}/{name}", content)


def refused(file, *messages):
    """Refused with the file's name and the messages."""
    with pytest.raises(ValueError, match=file.name) as error:
        pth.scan_file(file)
    for message in messages:
        assert message in str(error.value)


def test_torch_reads_what_we_write(tmp_path, rng, torch):
    file, expected = tmp_path / "consolidated.00.pth", arrays(rng)
    write(file, expected)
    for mmap in (False, True):
        found = torch.load(file, weights_only=True, mmap=mmap)
        assert type(found) is dict
        assert list(found) == list(expected)
        for name, x in expected.items():
            assert str(found[name].dtype) == f"torch.{x.dtype}"
            assert tuple(found[name].shape) == x.shape
            assert found[name].is_contiguous()
            assert bytes_of(found[name]) == x.tobytes(), name
        del found
    write(file, {})
    assert torch.load(file, weights_only=True) == pth.scan_file(file) == {}


def test_we_read_what_we_write(tmp_path, rng):
    file, expected = tmp_path / "consolidated.00.pth", arrays(rng)
    assert (write(file, expected) == 1).all()
    found = pth.scan_file(file)
    assert list(found) == list(expected)
    for name, x in expected.items():
        assert found[name].offset % 64 == 0
        assert found[name].dtype == x.dtype
        assert found[name].shape == x.shape
        assert found[name].read().tobytes() == x.tobytes(), name
    assert pth.stored_crcs(file) == {name: zlib.crc32(x.tobytes()) for name, x in expected.items()}
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        assert {name.split("/")[0] for name in archive.namelist()} == {"consolidated.00"}
    first = file.read_bytes()
    write(file, expected)
    assert file.read_bytes() == first


@pytest.mark.parametrize("length", range(1, 70, 3))
def test_tensors_are_aligned_whatever_the_archive_is_called(length, tmp_path):
    file = tmp_path / "x.pth"
    named = {"a": np.arange(5, dtype=np.int8), "b": np.arange(3, dtype=np.int16)}
    assert (write(file, named, "é" * length) == 1).all()
    found = pth.scan_file(file)
    assert all(entry.offset % 64 == 0 for entry in found.values())
    assert found["b"].read().tobytes() == named["b"].tobytes()


@pytest.mark.slow
def test_many_tensors_need_more_records_than_zip_counts(tmp_path, torch):
    file = tmp_path / "x.pth"
    named = {f"x{i}": np.array([i % 128], np.int8) for i in range(66_000)}
    write(file, named, "x")
    assert pth.scan_file(file)["x65999"].read().tolist() == [65999 % 128]
    assert torch.load(file, weights_only=True, mmap=True)["x65999"].tolist() == [65999 % 128]


def test_sizes_and_offsets_beyond_32_bits(tmp_path, torch):
    """Written sparse: 9 GB of zeros, whose CRC nobody computes."""
    file, gib = tmp_path / "consolidated.07.pth", 1 << 30
    shapes = {"before": (3,), "large": (5 * gib + 1,), "wide": (2, 1, gib), "behind": (7,)}
    dtypes = {"large": np.dtype(np.uint8), "wide": BFLOAT16}
    specs = [pth.Spec(n, s, dtypes.get(n, np.dtype(np.int32))) for n, s in shapes.items()]
    plan = pth.plan(specs, archive="consolidated.07")
    assert plan.size > 9 * gib
    behind = np.arange(7, dtype=np.int32)
    try:
        with open(file, "wb") as stream:
            stream.truncate(plan.size)
            parts = plan.framing(dict.fromkeys(shapes, 0) | {"behind": zlib.crc32(behind)})
            for offset, part in [*parts, (plan.offsets["behind"], behind.tobytes())]:
                stream.seek(offset)
                stream.write(part)
        assert file.stat().st_size == plan.size
        with zipfile.ZipFile(file) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            assert archive.read("consolidated.07/data/3") == behind.tobytes()
            with archive.open("consolidated.07/data/1") as record:
                assert record.read(9) == bytes(9)
        assert sizes["consolidated.07/data/1"] == 5 * gib + 1
        assert sizes["consolidated.07/data/2"] == 4 * gib
        found = pth.scan_file(file)
        assert {name: entry.offset for name, entry in found.items()} == plan.offsets
        assert {name: entry.shape for name, entry in found.items()} == shapes
        assert pth.stored_crcs(file) == {"behind": zlib.crc32(behind)}
        loaded = torch.load(file, weights_only=True, mmap=True)
        assert {name: tuple(x.shape) for name, x in loaded.items()} == shapes
        assert loaded["behind"].tolist() == behind.tolist() == found["behind"].read().tolist()
        assert loaded["large"][-1] == 0
        del loaded
    finally:
        file.unlink()


def test_what_cannot_be_written_is_named():
    spec = pth.Spec("a.weight", (2,), np.dtype(np.float32))
    with pytest.raises(ValueError, match="a.weight is there twice"):
        pth.plan([spec, spec], archive="x")
    for archive in ("", "a/b", "a\\b", "a\0"):
        with pytest.raises(ValueError, match="archive .* should be a name"):
            pth.plan([spec], archive=archive)
    for dtype in (np.dtype(np.complex64), np.dtype(">f4"), np.dtype(ml_dtypes.int4)):
        with pytest.raises(ValueError, match="a.weight has unknown dtype"):
            pth.plan([spec._replace(dtype=dtype)], archive="x")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_we_read_what_torch_writes(protocol, tmp_path, rng, torch):
    file, numpy = tmp_path / "consolidated.00.pth", arrays(rng)
    expected = {}
    for name, x in numpy.items():
        plain = torch.from_numpy(np.frombuffer(x.tobytes() or b"\0", np.uint8).copy())
        typed = plain.view(getattr(torch, str(x.dtype))) if x.size else torch.empty(0)
        expected[name] = typed.reshape(x.shape) if x.size else typed.reshape(0, 7)
    torch.save(expected, file, pickle_protocol=protocol)
    found, crcs = pth.scan_file(file), pth.stored_crcs(file)
    assert set(found) == set(expected) == set(crcs)
    for name, x in expected.items():
        assert found[name].offset % 64 == 0 or not x.numel()
        assert found[name].shape == tuple(x.shape)
        assert x.numel() == 0 or found[name].dtype == numpy[name].dtype
        assert found[name].read().tobytes() == bytes_of(x), name
        assert crcs[name] == zlib.crc32(bytes_of(x))


def test_torchs_modules_parameters_and_views(tmp_path, torch):
    file, base = tmp_path / "views.pt", torch.arange(30, dtype=torch.bfloat16).reshape(5, 6)
    module = torch.nn.Linear(3, 2)
    state = module.state_dict()
    assert state._metadata
    state |= {"slice": base[1:4], "again": base, "row": base[2, 1:4], "nothing": base[5:]}
    state |= {"column": base[2:3, 3:4].T, "parameter": module.weight}
    torch.save(state, file)
    found = pth.scan_file(file)
    assert set(found) == set(state)
    for name, x in state.items():
        assert found[name].shape == tuple(x.shape)
        plain = x.detach().clone(memory_format=torch.contiguous_format)
        assert found[name].read().tobytes() == bytes_of(plain)
    assert found["slice"].offset == found["again"].offset + 12
    assert set(pth.stored_crcs(file)) == {"weight", "bias", "again", "parameter"}


def test_a_transposed_tensor_is_refused(tmp_path, torch):
    for view in (torch.ones(3, 5).T, torch.ones(3, 5)[:, :2], torch.ones(1).expand(3)):
        torch.save({"a.weight": view}, tmp_path / "x.pth")
        refused(tmp_path / "x.pth", "a.weight", ".contiguous()")


def test_extra_states_are_left_out(tmp_path, torch):
    file = tmp_path / "x.pth"
    values = [None, b"", b"bytes", io.BytesIO(b"buffer"), torch.empty(0), io.BytesIO()]
    state = {f"{i}._extra_state": value for i, value in enumerate(values)} | {"a": torch.ones(3)}
    for protocol in (2, 4):
        torch.save(state, file, pickle_protocol=protocol)
        assert list(pth.scan_file(file)) == ["a"]
        for value in (b"bytes", io.BytesIO(b"buffer")):
            torch.save({"odd": value}, tmp_path / "y.pth", pickle_protocol=protocol)
            refused(tmp_path / "y.pth", "'odd' is no tensor")


def test_crcs_that_torch_did_not_compute_are_none(tmp_path, torch):
    file = tmp_path / "x.pth"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3), "empty": torch.ones(0)}, file)
    finally:
        torch.serialization.set_crc32_options(True)
    assert pth.scan_file(file)["a"].read().tolist() == [1, 1, 1]
    assert pth.stored_crcs(file) == {"empty": 0}


def test_an_archive_made_by_hand(tmp_path):
    file = tmp_path / "x.pth"
    save(file, flat(a=tensor(), b=tensor(shape=(1, 2), strides=(99, 1), offset=4)))
    found = pth.scan_file(file)
    assert found["a"].read().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["b"].read().tolist() == [[4, 5]]
    assert list(pth.stored_crcs(file)) == ["a"]
    save(file, flat(a=tensor()), byteorder=b"little", version=b"3\n", code__x=b"anything")
    assert list(pth.scan_file(file)) == ["a"]


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_a_dict_of_nothing_but_a_model_is_descended_into(key, tmp_path):
    file, inner = tmp_path / "x.pth", flat(a=tensor(), b=tensor())[2:-1]
    save(file, flat(**{key: inner}))
    assert list(pth.scan_file(file)) == ["a", "b"]
    save(file, flat(**{key: tensor()}))
    assert list(pth.scan_file(file)) == [key]
    save(file, flat(**{key: inner, "optimizer": inner}))
    refused(file, f"{key!r} is no tensor")
    save(file, flat(other=inner))
    refused(file, "'other' is no tensor")
    save(file, b"\x80\2}q\0" + push(key) + b"h\0s.")
    refused(file, f"{key!r} is no tensor")


class Evil:
    """Pickles as a call of os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


SYSTEM = f"{os.system.__module__}.system"
RUNNING = {
    "reduce": lambda c: flat(a=b"cos\nsystem\n" + push((c,)) + b"R"),
    "eval": lambda c: flat(
        a=b"cbuiltins\neval\n" + push((f"__import__('os').system({c!r})",)) + b"R"
    ),
    "nested": lambda c: flat(a=b"](cos\nsystem\n" + push((c,)) + b"Re"),
    "class": lambda c: pickle.dumps({"a": Evil(c)}, 2),
    "stack_global": lambda c: pickle.dumps({"a": Evil(c)}, 4),
    "extra_state": lambda c: pickle.dumps({"a._extra_state": Evil(c)}, 2),
    "key": lambda c: pickle.dumps([Evil(c)], 2),
    "inst": lambda c: flat(a=b"(" + push(c) + b"ios\nsystem\n"),
    "obj": lambda c: flat(a=b"(cos\nsystem\n" + push(c) + b"o"),
    "replaced": lambda c: b"\x80\2}(" + push("a") + b"cos\nsystem\n" + push((c,)) + b"R"
    + push("a") + push(1) + b"u.",
    # An object whose __setstate__ is os.system, for BUILD to call.
    "build": lambda c: flat(
        a=b"ctypes\nSimpleNamespace\n)R}" + push("__setstate__") + b"cos\nsystem\nsb" + push(c)
        + b"b"
    ),
    "getattr": lambda c: flat(
        a=b"cbuiltins\ngetattr\nc__builtin__\n__import__\n" + push(("os",)) + b"R" + push("system")
        + b"\x86R" + push((c,)) + b"R"
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", RUNNING)
def test_no_pickle_runs_anything(attack, tmp_path):
    named = {"eval": "builtins.eval", "getattr": "builtins.getattr", "inst": "INST os system"}
    named |= dict.fromkeys(("class", "stack_global", "extra_state", "key"), SYSTEM)
    named |= {"obj": "OBJ", "build": "types.SimpleNamespace"}
    file, marker = tmp_path / "x.pth", tmp_path / "marker"
    pickled = RUNNING[attack](f"touch {marker}")
    pickle.loads(pickled)
    assert marker.exists(), "this would be no attack"
    marker.unlink()
    save(file, pickled)
    refused(file, f"{named.get(attack, 'os.system')} is refused", "could run code")
    assert not marker.exists()


REBUILD, ORDERED = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"


@pytest.mark.parametrize(
    "ops",
    {
        "persistent id is text": push("storage") + b"Q",
        "persistent id is a number": push(5) + b"Q",
        "persistent id is a list": push(["storage", 1, 2, 3, 4]) + b"Q",
        "persistent id of protocol 0": b"Pstorage\n",
        "persistent id of another kind": push(("module", "x", "0", "cpu", 6)) + b"Q",
        "persistent id is short": push(("storage", "x")) + b"Q",
        "extension": b"\x82\1",
        "huge memo index": push(1) + b"r\xff\xff\xff\x7f",
        "stand-in altered": REBUILD + push((None, {"run": 1})) + b"b",
        "stand-in given a dict": REBUILD + push({"run": 1}) + b"b",
        "stand-in class altered": ORDERED + push((None, {"__setstate__": 1})) + b"b",
        "stand-in class given a dict": ORDERED + push({"x": 1}) + b"b",
        "stand-in made anew": REBUILD + b")\x81",
        "type altered": b"ctorch\nFloatStorage\n" + push((3, "<", None, None, None, 1, 1)) + b"b",
        "type called": b"ctorch\nFloatStorage\n)R",
        "tensor called": tensor() + b")R",
        "text called": push("x") + b")R",
        "tensor given a dict": tensor() + push({"shape": (1,)}) + b"b",
        "too few arguments": REBUILD + push((1, 2)) + b"R",
        "no storage": REBUILD + push((1, 0, (2,), (1,), False, None)) + b"R",
        "unhashable key": b"}](K\1eK\1s",
        "copyreg": b"ccopyreg\n_reconstructor\n",
        "NumPy": b"cnumpy.core.multiarray\n_reconstruct\n",
        "another torch function": b"ctorch\nload\n",
        "a type we lack": tensor(kind="ComplexFloatStorage"),
        "negative shape": tensor(shape=(-2, 3)),
        "strides of other length": tensor(strides=(1,)),
        "shape of text": tensor(shape="23"),
        "shape of truth": tensor(shape=(True, 3)),
        "shape beyond all bounds": tensor(shape=(0, 1 << 70)),
        "too many dimensions": tensor(shape=(1,) * 65, strides=(1,) * 65),
        "negative offset": tensor(offset=-1),
        "negative length": tensor(numel=-6),
        "key is a number": tensor(key=0),
        "negated": tensor(rest=push({"neg": True})),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_pickle_of_something_else_is_refused(ops, tmp_path):
    file, name = tmp_path / "x.pth", "a._extra_state"
    save(file, flat(**{name: ops[1]}))
    refused(file, "data.pkl is no plain dict of tensors")
    save(file, flat(a=tensor()))
    assert pth.scan_file(file)["a"].read().tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"", "data.pkl is no plain dict"),
        (b"\x80\2}", "data.pkl is no plain dict"),
        (b"\x80\2.", "data.pkl is no plain dict"),
        (pickle.dumps([1]), "should hold a dict of tensors, not list"),
        (b"\x80\2" + tensor() + b".", "should hold a dict of tensors"),
        (pickle.dumps({3: None}), "names should be text, but one is int"),
        (pickle.dumps({"step": 3}), "'step' is no tensor"),
        (flat(a=tensor(key="1")), "a needs record data/1: it is missing"),
        (flat(a=tensor(numel=7)), "a needs 28 bytes in record data/0, which has 24"),
        (flat(a=tensor(offset=1)), "a ends at byte 28 of a storage of 24"),
        (flat(a=tensor(shape=(3, 3))), "a ends at byte 36 of a storage of 24"),
        (flat(a=tensor(numel=5)), "a ends at byte 24 of a storage of 20"),
        (flat(a=tensor(strides=(1, 2))), "a (2, 3) has strides (1, 2): save it with .contiguous"),
        (flat(a=tensor(strides=(0, 0))), "has strides (0, 0)"),
    ],
)
def test_a_dict_of_other_things_is_refused(pickled, message, tmp_path):
    save(tmp_path / "x.pth", pickled)
    refused(tmp_path / "x.pth", message)


def test_a_wrong_kind_of_file_is_refused(tmp_path):
    file = tmp_path / "x.pth"
    for content, message in [
        (b"", "the file is empty"),
        (b"not a zip file at all", "not a zip file"),
        (b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "before 1.6"),
        (b"PK\3\4", "truncated or damaged"),
    ]:
        file.write_bytes(content)
        refused(file, message)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/readme", b"")
    refused(file, "should have one record NAME/data.pkl, but has 0")
    save(file, flat())
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("b/data.pkl", flat())
    refused(file, "but has 2")


def test_records_that_cannot_be_mapped_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "x.pth"
    save(file, flat(a=tensor()), compression=zipfile.ZIP_DEFLATED)
    refused(file, "archive/data.pkl is compressed")
    save(file, flat(a=tensor(key="1")))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/data/1", bytes(99), zipfile.ZIP_DEFLATED)
    refused(file, "archive/data/1 is compressed")
    save(file, flat(a=tensor()), byteorder=b"big")
    refused(file, "byte order")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", flat(a=tensor()))
        archive.writestr("data/0", bytes(24))
    refused(file, "it is missing")
    save(file, flat(a=tensor()))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/data.pkl", flat(b=tensor()))
    refused(file, "record archive/data.pkl is there twice")
    save(file, flat(a=tensor()))
    monkeypatch.setattr(pth, "_MAX_PICKLE", 99)
    refused(file, "data.pkl takes", "> 99 bytes")


def test_every_truncation_is_noticed(tmp_path, rng):
    file = tmp_path / "consolidated.00.pth"
    named = {"a": rng.standard_normal((3, 5)), "b": rng.standard_normal(7)}
    write(file, named)
    whole, starts = file.read_bytes(), [entry.offset for entry in pth.scan_file(file).values()]
    for size in range(0, len(whole), 7):
        file.write_bytes(whole[:size])
        refused(file)
    for cut in (0, 40, 200, *starts):
        file.write_bytes(whole[:cut] + whole[cut + 8 :])
        refused(file)


def test_damage_is_noticed(tmp_path):
    file = tmp_path / "x.pth"
    write(file, {"a": np.arange(5.0)}, "x")
    whole = file.read_bytes()
    where = whole.index(b"storage")
    file.write_bytes(whole[:where] + b"S" + whole[where + 1 :])
    refused(file, "data.pkl is damaged: its CRC-32")
    file.write_bytes(whole.replace(b"x/data/0", b"x/data/1", 1))
    refused(file, "x/data/0 is not at byte")
    # The directory's size of the last record, and the storage that the pickle wants from it.
    save(file, flat(a=tensor(numel=600, shape=(600,), strides=(1,))))
    content = file.read_bytes()
    where = content.rindex(b"PK\1\2") + 20
    file.write_bytes(content[:where] + (2400).to_bytes(4, "little") * 2 + content[where + 8 :])
    refused(file, "archive/data/0 ends at byte", "the file is truncated")


@pytest.mark.parametrize("name", ["consolidated.01", "consolidated.1", "consolidated", "renamed"])
def test_swapped_shards_are_noticed(name, tmp_path):
    file = tmp_path / f"{name}.pth"
    for archive in ("consolidated.01", "archive", "consolidated.x", "consolidated.10"):
        save(file, flat(a=tensor()), folder=archive)
        if "1" in name and "10" in archive:
            refused(file, f"saved as {archive}.pth", "swapped or renamed")
        else:
            assert list(pth.scan_file(file)) == ["a"]
