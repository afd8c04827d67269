"""Checkpoints at gs:// and s3:// addresses, by way of a folder on this machine.

The path layer is Orbax's own (etils' epath, over fsspec). Files come one by one, so that what is
interrupted goes on where it was; what says that a checkpoint is there goes last.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

SCHEMES = {"gs://": "gcsfs", "s3://": "s3fs"}
"""What an address begins with, and the package that it needs."""
MARKERS = ("l4jax.json", "config.json", "params.json")
"""Files by which a format is recognized."""
_STEP = 64 << 20

Begin = Callable[[int, int], Callable[[int], None]]


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address of a cloud store.

    Raises:
        ValueError: it is an address of another kind.
    """
    text = os.fspath(path)
    # pathlib makes one slash of two.
    if "://" in text and not text.startswith(tuple(SCHEMES)):
        raise ValueError(f"{text}: only {' and '.join(SCHEMES)} addresses and local paths are read")
    return text.startswith(tuple(SCHEMES))


def staging(address: str, folder: str | os.PathLike[str] | None, *options: object) -> pathlib.Path:
    """Where a checkpoint lies on this machine meanwhile: the same place for each equal try."""
    root = pathlib.Path(folder or pathlib.Path(tempfile.gettempdir()) / "l4jax-staging")
    name = address.rstrip("/").rpartition("/")[2]
    return root / hashlib.sha256(repr((address, *options)).encode()).hexdigest()[:12] / name


def download(address: str, local: pathlib.Path, begin: Begin | None = None) -> None:
    """Copies a checkpoint here; files that are here already are left alone.

    Raises:
        FileNotFoundError: nothing is there.
        ImportError: the package for such addresses is not installed.
        OSError: the disk has no room for it.
    """
    remote = _open(address)
    if not remote.is_dir():
        raise FileNotFoundError(f"{address}: nothing is there")
    files = {str(file.relative_to(remote)): _size(file) for file in _walk(remote)}
    there = {name: size for name, size in files.items() if _same(local / name, size)}
    local.mkdir(parents=True, exist_ok=True)
    missing = sum(files.values()) - sum(there.values())
    free = shutil.disk_usage(local).free
    if missing > free:
        raise OSError(f"{local}: {missing:,} bytes are needed for {address}, {free:,} are free")
    advance = begin(sum(files.values()), sum(there.values())) if begin else lambda size: None
    for name in sorted(files.keys() - there.keys()):
        target = local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        _copy(remote / name, partial, advance)
        os.replace(partial, target)


def check_free(address: str) -> None:
    """Raises FileExistsError if a whole checkpoint is at an address already."""
    remote = _open(address)
    found = next((name for name in MARKERS if (remote / name).exists()), None)
    if found is not None:
        raise FileExistsError(f"{address}: already has a checkpoint: {found} is there")


def upload(local: pathlib.Path, address: str, begin: Begin | None = None) -> None:
    """Copies a checkpoint there, what marks it as whole last.

    Raises:
        ImportError: the package for such addresses is not installed.
    """
    remote = _open(address)
    files = {str(f.relative_to(local)): f.stat().st_size for f in local.rglob("*") if f.is_file()}
    advance = begin(sum(files.values()), 0) if begin else lambda size: None
    for name in sorted(files, key=lambda name: (name in MARKERS, name)):
        _copy(local / name, remote / name, advance)


def _open(address: str) -> Any:
    """The address as a path.

    Raises:
        ImportError: naming the package that is missing.
    """
    from etils import epath

    package = next(name for scheme, name in SCHEMES.items() if address.startswith(scheme))
    try:
        path = epath.Path(address)
        path.exists()
    except ImportError as error:
        raise ImportError(
            f"{address}: reading and writing there needs the package {package}: "
            f"pip install {package}"
        ) from error
    return path


def _walk(folder: Any) -> Iterator[Any]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def _size(file: Any) -> int:
    """Bytes of a file here or there."""
    return int(file.stat().st_size if isinstance(file, pathlib.Path) else file.stat().length)


def _same(file: Any, size: int) -> bool:
    return bool(file.exists()) and _size(file) == size


def _copy(source: Any, target: Any, advance: Callable[[int], None]) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        while data := reader.read(_STEP):
            writer.write(data)
            advance(len(data))
