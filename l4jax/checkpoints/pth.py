"""PyTorch's zip format, as Meta publishes `consolidated.NN.pth`: located and laid out, never run.

`torch.save` writes a zip archive of uncompressed records: `NAME/data.pkl`, a pickle that describes
the tensors, and `NAME/data/KEY`, the bytes of each storage (https://docs.pytorch.org/docs/stable/
notes/serialization.html, "Serialized file format for torch.save"; zip itself: PKWARE's APPNOTE.TXT,
whose section numbers stand below). A pickle is a program that may call whatever can be imported, so
this module lets it call nothing but the few stand-ins here, and needs no torch.
"""

from __future__ import annotations

import io
import math
import pathlib
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from l4jax.checkpoints.safetensors import Entry

# Types go by their storage's class, those from after storages lost their type by their own name
# (`torch.storage._new_dtypes`).
_TYPES = (
    "DoubleStorage=float64 FloatStorage=float32 HalfStorage=float16 BFloat16Storage=bfloat16 "
    "LongStorage=int64 IntStorage=int32 ShortStorage=int16 CharStorage=int8 ByteStorage=uint8 "
    "BoolStorage=bool float8_e4m3fn=float8_e4m3fn float8_e5m2=float8_e5m2 uint16=uint16 "
    "uint32=uint32 uint64=uint64"
)
_DTYPES = {
    f"torch.{name}": np.dtype(getattr(ml_dtypes, dtype, dtype))
    for name, dtype in re.findall(r"(\w+)=(\w+)", _TYPES)
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_UNTYPED = "torch.storage.UntypedStorage"
_DTYPES[_UNTYPED] = np.dtype(np.uint8)
# What torch.save emits with protocols 2 to 5. Not INST and OBJ, other ways to call; not EXT*, which
# can bypass `find_class`; no sets.
_OPCODES = re.compile(
    "PROTO|FRAME|STOP|MARK|NONE|NEW(TRUE|FALSE|OBJ)|BININT[12]?|LONG1|BINFLOAT|(LONG_)?BIN(PUT|GET)"
    "|(SHORT_)?BIN(UNICODE|BYTES)|EMPTY_(TUPLE|LIST|DICT)|TUPLE[123]?|APPENDS?|SETITEMS?|MEMOIZE"
    "|(STACK_)?GLOBAL|REDUCE|BUILD|BINPERSID"
)
_MAX_PICKLE, _MAX_NDIM = 64 << 20, 64


def scan_file(file: pathlib.Path) -> dict[str, Entry]:
    """Every tensor of a .pth/.pt file by name, located not read.

    Values named `..._extra_state`, which some layers add beside their weights, are left out.

    Raises:
        ValueError: the file is damaged, could run code, or holds what is no contiguous tensor.
    """
    return {name: entry for name, (entry, _) in _scan(file).items()}


def stored_crcs(file: pathlib.Path) -> dict[str, int]:
    """The CRC-32 that the archive records of tensors' bytes, where it says something of one.

    None for part of a storage. Zero is what torch records under `set_crc32_options(False)`.
    """
    return {name: crc for name, (_, crc) in _scan(file).items() if crc is not None}


class Spec(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


class Plan(NamedTuple):
    """Where everything of a file to be written lies, known before any tensor is.

    `framing` takes the CRC-32 of every tensor's bytes and gives all other bytes of the file, as
    pairs of offset and bytes: a record's header holds its CRC, so these come last.
    """

    size: int
    offsets: dict[str, int]
    framing: Callable[[Mapping[str, int]], list[tuple[int, bytes]]]


def plan(specs: Sequence[Spec], *, archive: str) -> Plan:
    """Lays out a file that `torch.load` reads, mapped too, as a plain dict of tensors.

    Tensors start at multiples of 64 bytes, as torch's do. Equal specs give an equal file.

    Args:
        specs: the tensors, in the file's order.
        archive: the archive's folder; torch takes the file's name without `.pth`.

    Raises:
        ValueError: a name is there twice, torch lacks a dtype, or `archive` is no folder's name.
    """
    if not re.fullmatch(r"[^/\\\0]+", archive):
        raise ValueError(f"archive {archive!r} should be a name without slashes, as a file's stem")
    # No `.format_version`: by that torch would derive offsets from a layout that is only its own.
    contents = {"data.pkl": _pickled(specs), "byteorder": b"little", "version": b"3\n"}
    sizes = {name: len(content) for name, content in contents.items()}
    for key, spec in enumerate(specs):
        sizes[f"data/{key}"] = math.prod(spec.shape) * spec.dtype.itemsize
    records: list[_Record] = []
    end = 0
    for name, size in sizes.items():
        records.append(_Record(f"{archive}/{name}".encode(), size, end))
        end = records[-1].start + size

    def framing(crcs: Mapping[str, int]) -> list[tuple[int, bytes]]:
        known = [*map(zlib.crc32, contents.values()), *(crcs[spec.name] for spec in specs)]
        bodies = [*contents.values(), *[b""] * len(specs)]
        rows = zip(records, known, bodies, strict=True)
        parts = [(record.at, record.header(crc) + body) for record, crc, body in rows]
        return [*parts, (end, _directory(records, known, end))]

    starts = (record.start for record in records[len(contents) :])
    offsets = {spec.name: start for spec, start in zip(specs, starts, strict=True)}
    return Plan(end + len(_directory(records, [0] * len(records), end)), offsets, framing)


class _Tensor(NamedTuple):
    """A tensor as pickled: bytes of its storage and where it starts among them."""

    key: str
    storage: int
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


class _StandIn(NamedTuple):
    """What a pickle may call. BUILD can change nothing of a tuple, unlike a function or a class."""

    run: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)


class _Inert(dict):
    """For OrderedDict and BytesIO. `__setstate__` keeps BUILD from setting any attributes."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


def _rebuild(*args: Any) -> _Tensor:
    """`torch._utils._rebuild_tensor_v2` and, with a dtype after the hooks, `_v3`."""
    storage, offset, shape, strides, _, _, *last = args
    kind, key, numel = storage
    newer = last.pop(0) if last and type(last[0]) is str else kind
    shape, strides = tuple(shape), tuple(strides)
    sound = [*map(type, storage)] == [str, str, int] and len(shape) == len(strides) <= _MAX_NDIM
    numbers = numel, offset, *shape, *strides
    if not sound or any(last) or any(type(n) is not int or n >> 63 for n in numbers):
        raise pickle.UnpicklingError("a tensor's storage, shape, strides or flags are odd")
    dtype, nbytes = _DTYPES[newer], numel * _DTYPES[kind].itemsize
    return _Tensor(key, nbytes, offset * dtype.itemsize, shape, strides, dtype)


# Bytes are calls in protocol 2. Types are strings: a NumPy dtype could be altered for everyone.
_STAND_INS: dict[str, Any] = {name: name for name in _DTYPES} | {
    "collections.OrderedDict": _Inert,
    "_io.BytesIO": _Inert,
    "_codecs.encode": _StandIn(lambda text, encoding: None),
    "__builtin__.bytes": _StandIn(lambda: None),
    "torch._utils._rebuild_tensor_v2": _StandIn(_rebuild),
    "torch._utils._rebuild_tensor_v3": _StandIn(_rebuild),
    "torch._utils._rebuild_parameter": _StandIn(lambda tensor, requires_grad, hooks: tensor),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _STAND_INS:
            raise pickle.UnpicklingError(f"{module}.{name} is refused: loading it could run code")
        return _STAND_INS[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Any:
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("a persistent id is not a storage's")
        return pid[1], pid[2], pid[4]


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major, in elements; those of empty tensors as torch has them."""
    return tuple(math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))


def _unpickle(file: pathlib.Path, data: bytes) -> Any:
    try:
        for opcode, argument, position in pickletools.genops(data):
            if not _OPCODES.fullmatch(opcode.name):
                what = f"{opcode.name} {argument or ''}".rstrip()
                raise pickle.UnpicklingError(
                    f"{what} is refused: torch.save writes none, and it could run code"
                )
            # The memo is an array: an index beyond what the pickle can need would fill the memory.
            if "PUT" in opcode.name and int(argument or 0) > int(position or 0):
                raise pickle.UnpicklingError(f"memo index {argument} at byte {position}")
        return _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{file}: data.pkl is no plain dict of tensors: {error!r:.300}") from None


def _tensors(file: pathlib.Path, root: Any) -> dict[str, _Tensor]:
    """The tensors by name, from inside the only value if that is a dict called like a model."""
    if isinstance(root, dict) and len(root) == 1:
        inner = root.get("model", root.get("state_dict"))
        root = inner if isinstance(inner, dict) else root
    if not isinstance(root, dict):
        raise ValueError(f"{file}: should hold a dict of tensors, not {type(root).__name__}")
    kept = {k: v for k, v in root.items() if not (type(k) is str and k.endswith("_extra_state"))}
    for name, value in kept.items():
        if type(name) is not str:
            raise ValueError(f"{file}: names should be text, but one is {type(name).__name__}")
        if not isinstance(value, _Tensor):
            raise ValueError(f"{file}: the value of {name!r} is no tensor")
    return kept


def _scan(file: pathlib.Path) -> dict[str, tuple[Entry, int | None]]:
    """Every tensor's place, and its CRC-32 if the archive has it."""
    with open(file, "rb") as stream:
        records = _records(file, stream)
        if "byteorder" in records and _read(file, stream, records["byteorder"]) != b"little":
            raise ValueError(f"{file}: byte order is not b'little', and only that can be mapped")
        tensors = _tensors(file, _unpickle(file, _read(file, stream, records["data.pkl"])))
        found = {}
        for name, tensor in tensors.items():
            info = records.get(f"data/{tensor.key}")
            if info is None:
                raise ValueError(f"{file}: {name} needs record data/{tensor.key}: it is missing")
            nbytes = _checked(f"{file}: {name}", tensor, info.file_size)
            offset = _locate(file, stream, info) + tensor.first
            told = nbytes == info.file_size and (info.CRC or not nbytes)
            entry = Entry(file, tensor.shape, tensor.dtype, offset)
            found[name] = entry, info.CRC if told else None
        return found


def _checked(what: str, tensor: _Tensor, size: int) -> int:
    """Bytes of a tensor, which must lie in its storage, and that in its record of `size` bytes."""
    key, storage, first, shape, strides, dtype = tensor
    if size < storage:
        raise ValueError(f"{what} needs {storage} bytes in record data/{key}, which has {size}")
    # The stride of a dimension of one is never used, so that torch leaves any number there.
    rows = zip(shape, strides, _strides(shape), strict=True)
    if 0 not in shape and any(n > 1 and found != right for n, found, right in rows):
        raise ValueError(f"{what} {shape} has strides {strides}: save it with .contiguous()")
    end = first + math.prod(shape) * dtype.itemsize
    if end > storage:
        raise ValueError(f"{what} ends at byte {end} of a storage of {storage}")
    return end - first


def _records(file: pathlib.Path, stream: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """The records, from the central directory (4.3.12), by name without the archive's folder."""
    magic = stream.read(4)
    if magic[:1] == b"\x80":
        raise ValueError(f"{file}: torch's format before 1.6: save it again with a newer torch")
    if magic != b"PK\3\4":
        raise ValueError(f"{file}: {'not a zip file' if magic else 'the file is empty'}")
    try:
        with zipfile.ZipFile(stream) as archive:
            infos = archive.infolist()
    except Exception as error:  # zipfile passes on what struct, codecs and others raise
        raise ValueError(f"{file}: truncated or damaged: {error}") from None
    named = {info.filename: info for info in infos}
    if len(named) < len(infos):
        twice = next(info.filename for info in infos if named[info.filename] is not info)
        raise ValueError(f"{file}: record {twice} is there twice")
    folders = [name[:-9] for name in named if re.fullmatch("[^/]+/data[.]pkl", name)]
    if len(folders) != 1:
        raise ValueError(f"{file}: should have one record NAME/data.pkl, but has {len(folders)}")
    # Meta's shards differ in nothing but bytes: swapped files would give a model of noise.
    pattern = re.compile("consolidated[.]0*([0-9]+)")
    inside, outside = pattern.fullmatch(folders[0]), pattern.fullmatch(file.stem)
    if inside and outside and inside[1] != outside[1]:
        raise ValueError(f"{file}: saved as {folders[0]}.pth, so shards were swapped or renamed")
    inner = len(folders[0]) + 1
    return {n[inner:]: info for n, info in named.items() if n.startswith(f"{folders[0]}/")}


def _locate(file: pathlib.Path, stream: BinaryIO, info: zipfile.ZipInfo) -> int:
    """First byte of a record's content, which only its local header tells (4.3.7)."""
    what = f"{file}: record {info.filename}"
    if info.compress_type or info.compress_size != info.file_size or info.flag_bits & 1:
        raise ValueError(f"{what} is compressed or encrypted, but torch.save stores plain bytes")
    stream.seek(max(info.header_offset, 0))
    magic, lengths = stream.read(26)[:4], struct.unpack("<2H", stream.read(4).rjust(4, b"\0"))
    name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    there = magic == b"PK\3\4" and stream.read(lengths[0]) == name
    if info.header_offset < 0 or not there:
        raise ValueError(f"{what} is not at byte {info.header_offset}: the file is damaged")
    start = info.header_offset + 30 + sum(lengths)
    if start + info.file_size > file.stat().st_size:
        raise ValueError(f"{what} ends at byte {start + info.file_size}: the file is truncated")
    return start


def _read(file: pathlib.Path, stream: BinaryIO, info: zipfile.ZipInfo) -> bytes:
    """A small record, checked unless torch was told to compute no CRC, and stored zero."""
    if info.file_size > _MAX_PICKLE:
        raise ValueError(f"{file}: {info.filename} takes {info.file_size} > {_MAX_PICKLE} bytes")
    stream.seek(_locate(file, stream, info))
    content = stream.read(info.file_size)
    if info.CRC not in (0, zlib.crc32(content)):
        raise ValueError(f"{file}: {info.filename} is damaged: its CRC-32 is not {info.CRC:#010x}")
    return content


def _pickled(specs: Sequence[Spec]) -> bytes:
    """The dict of tensors as torch pickles it, but without a memo."""
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is there twice")
    items = []
    for key, (name, shape, dtype) in enumerate(specs):
        if dtype not in _NAMES:
            raise ValueError(f"{name} has unknown dtype {dtype}; known: {[*map(str, _NAMES)]}")
        kind, numel, function, last = _NAMES[dtype], math.prod(shape), "_rebuild_tensor_v2", b""
        if not kind.endswith("Storage"):
            function, last = "_rebuild_tensor_v3", _global(kind)
            kind, numel = _UNTYPED, numel * dtype.itemsize
        pid = _value(("storage", _global(kind), str(key), "cpu", numel)) + b"Q"
        hooks = _global("collections.OrderedDict") + b")R"
        arguments = _value((pid, 0, shape, _strides(shape), b"\x89", hooks, last))
        items += [_value(name), _global(f"torch._utils.{function}"), arguments, b"R"]
    return b"".join((b"\x80\2}(", *items, b"u."))


def _global(name: str) -> bytes:
    return "c{}\n{}\n".format(*name.rsplit(".", 1)).encode()


def _value(value: str | int | tuple | bytes) -> bytes:
    """Opcodes (pickletools) that push a value; bytes are opcodes already."""
    if isinstance(value, str):
        return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_value, value)) + b"t"
    if isinstance(value, int):
        code, size = (b"J", 4) if value < 1 << 31 else (b"\x8a\x08", 8)
        return code + value.to_bytes(size, "little")
    return value


_FULL = 0xFFFFFFFF  # in a field of 32 bits: the number is in the zip64 extra field (4.5.3)


def _zip64(*values: int) -> bytes:
    large = [value for value in values if value >= _FULL]
    return struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""


class _Record(NamedTuple):
    """A record to write: its path, its size and where its header starts."""

    path: bytes
    size: int
    at: int

    @property
    def start(self) -> int:
        """Where its content does, after a header with at least an empty padding field."""
        least = self.at + 30 + len(self.path) + len(_zip64(self.size, self.size)) + 4
        return least + -least % 64

    def header(self, crc: int, *, central: bool = False) -> bytes:
        """Local header (4.3.7), padded by a field with torch's id for that, or central (4.3.12)."""
        size, extra, last = min(self.size, _FULL), _zip64(self.size, self.size), b""
        if central:
            extra = _zip64(self.size, self.size, self.at)
            last = struct.pack("<10xI", min(self.at, _FULL))
        else:
            padding = self.start - self.at - 30 - len(self.path) - len(extra) - 4
            extra += struct.pack(f"<2sH{padding}x", b"FB", padding)
        # Zip 4.5, UTF-8 names, stored, and the first day that a zip can name: no file has another.
        fixed = (45, 0x800, 0, 0, 0x21, crc, size, size, len(self.path), len(extra))
        magic = b"PK\1\2\x2d\0" if central else b"PK\3\4"
        return magic + struct.pack("<5H3I2H", *fixed) + last + self.path + extra


def _directory(records: Sequence[_Record], crcs: Sequence[int], start: int) -> bytes:
    """The file's tail. The zip64 end record (4.3.14) is always there, as in torch's files."""
    rows = zip(records, crcs, strict=True)
    entries = b"".join(record.header(crc, central=True) for record, crc in rows)
    size, count = len(entries), len(records)
    end = struct.pack("<4sQ2H8x4Q", b"PK\6\6", 44, 45, 45, count, count, size, start)
    end += struct.pack("<4s4xQI", b"PK\6\7", start + size, 1)
    few = min(count, 0xFFFF)
    end += struct.pack("<4s4x2H2I2x", b"PK\5\6", few, few, size, min(start, _FULL))
    return entries + end
