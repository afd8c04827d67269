"""Checkpoints at addresses, against a real S3 server of this process, on the loopback address."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import build


@pytest.fixture(scope="module")
def store(s3):
    """A file system on an S3 server, with a bucket."""
    s3.mkdir("bucket")
    return s3


@pytest.fixture(scope="module")
def scout(tmp_path_factory):
    from l4jax import checkpoints, presets

    directory = tmp_path_factory.mktemp("local") / "hf"
    model = build(presets.get("tiny-llama4-scout").make())
    checkpoints.save(model, directory, to="hf", max_shard_bytes=400_000)
    return directory


def tensors(directory):
    from l4jax.checkpoints import safetensors

    return {name: e.read().tobytes() for name, e in safetensors.scan(directory).items()}


# aiobotocore leaves its sessions to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("to", ["orbax", "meta", "hf"])
def test_a_checkpoint_goes_to_an_address_and_comes_back(to, store, scout, tmp_path):
    from l4jax import checkpoints

    address, staging = f"s3://bucket/{to}", tmp_path / "staging"
    moved = []

    def begin(total, done):
        moved.append([total - done, 0])

        def advance(size):
            moved[-1][1] += size

        return advance

    report = checkpoints.convert(
        scout, address, to=to, options=checkpoints.Options(staging=staging), begin=begin
    )
    assert report["destination"] == address
    assert [part for part in moved if part[0] != part[1]] == []
    assert store.exists(f"bucket/{to}/checksums.json")
    checkpoints.convert(
        address, tmp_path / "back", to="hf", options=checkpoints.Options(staging=staging)
    )
    assert tensors(tmp_path / "back") == tensors(scout)
    assert [path for path in staging.rglob("*") if path.is_file()] == []
    with pytest.raises(FileExistsError, match=f"{address}: already has a checkpoint"):
        checkpoints.convert(scout, address, to=to, options=checkpoints.Options(staging=staging))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_download_goes_on_where_it_was(store, scout, tmp_path):
    from l4jax.checkpoints import remote

    store.put(str(scout), "bucket/half", recursive=True)
    remote.download("s3://bucket/half", tmp_path / "x")
    kept = sorted((tmp_path / "x").glob("*.safetensors"))
    before = [file.stat().st_mtime_ns for file in kept[1:]]
    kept[0].write_bytes(b"cut off")
    remote.download("s3://bucket/half", tmp_path / "x")
    assert tensors(tmp_path / "x") == tensors(scout)
    assert [file.stat().st_mtime_ns for file in kept[1:]] == before
    with pytest.raises(FileNotFoundError, match="s3://bucket/nowhere: nothing is there"):
        remote.download("s3://bucket/nowhere", tmp_path / "y")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_marks_a_checkpoint_as_whole_goes_last(store, scout, tmp_path, monkeypatch):
    from l4jax.checkpoints import remote

    sent = []
    plain = remote._copy

    def copy(source, target, advance):
        sent.append(source.name)
        plain(source, target, advance)

    monkeypatch.setattr(remote, "_copy", copy)
    remote.upload(scout, "s3://bucket/order")
    assert sent[-1] == "config.json"
    assert sorted(sent) == sorted(file.name for file in scout.iterdir())


def test_other_addresses_are_refused(scout, tmp_path):
    from l4jax import checkpoints

    with pytest.raises(ValueError, match="only gs:// and s3:// addresses"):
        checkpoints.convert(scout, "http://somewhere/x", to="orbax")


def test_a_missing_package_is_named(scout, tmp_path):
    code = f"""
import sys
sys.modules["gcsfs"] = sys.modules["tensorflow"] = None
from l4jax import cli
sys.exit(cli.main(["convert", {str(scout)!r}, "gs://bucket/x", "--to", "orbax", "--json"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "gs://bucket/x" in done.stderr.splitlines()[-1]
    assert "pip install gcsfs" in done.stderr.splitlines()[-1]
