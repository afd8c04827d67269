"""Records of every format, whole and in order, and what is wrong with those that are not."""

import builtins
import gzip
import json
import os

import numpy as np
import pytest

from l4jax.data import sources
from l4jax.data.sources import Report, Source

ROWS = [{"text": "naïve 你好 🎉", "n": 1}, {"text": "", "n": None}, {"text": "c\nd", "n": -3}]


def lines(rows=ROWS, end="\n"):
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def read(path, on_error="raise", **options):
    """All records, and the report."""
    report = Report()
    return list(Source(path, **options).records(report, on_error=on_error)), report


def values(path, **options):
    return [record.value for record in read(path, **options)[0]]


# --- Formats -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "content",
    [
        lines(),
        lines(end="\r\n"),
        b"\xef\xbb\xbf" + lines(),
        b"\n \n" + lines(end="\n\n"),
        lines()[:-1],
    ],
    ids=["plain", "CRLF", "BOM", "blank lines", "no last line end"],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "x.jsonl.gz", "x.json", "x.json.gz"])
def test_json_lines(content, name, tmp_path):
    file = tmp_path / name
    file.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    records, report = read(file)
    assert [record.value for record in records] == ROWS
    assert report.read == 3
    first = 3 if content.startswith(b"\n") else 1
    assert records[0].where == f"{file}:{first}"


def test_a_json_list(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf " + json.dumps(ROWS, indent=1).encode())
    records, _ = read(tmp_path / "x.json")
    assert [record.value for record in records] == ROWS
    assert records[2].where == f"{tmp_path / 'x.json'}#2"


def test_text_files_are_documents(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n")
    (tmp_path / "b" / "empty.txt").write_bytes(b"")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("drei 🎉".encode()))
    records, report = read(tmp_path)
    assert [record.value["text"] for record in records] == ["one\n\ntwo\n", "", "drei 🎉"]
    assert records[1].where == str(tmp_path / "b" / "empty.txt")
    assert report.read == 3


def test_any_file_can_be_a_document(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.jsonl").write_bytes(lines())
    (tmp_path / ".hidden").write_text("no")
    assert values(tmp_path, format="text") == [{"text": "x = 1\n"}, {"text": lines().decode()}]


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install l4jax[data]")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{"role": "user", "content": f"é{i}"}], "n": i} for i in range(3001)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=700)
    records, _ = read(tmp_path / "x.parquet")
    assert [record.value for record in records] == rows
    assert records[3000].where == f"{tmp_path / 'x.parquet'}#3000"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_datasets_saved(tmp_path, monkeypatch):
    """Its own files in several shards, nested and missing values, a dictionary of splits."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install l4jax[test]")
    datasets.disable_progress_bars()
    turns = [{"role": "user", "content": "你好", "name": None}]
    rows = [{"messages": turns * (i % 4), "score": i / 2, "tag": None} for i in range(23)]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "one", num_shards=3)
    records, _ = read(tmp_path / "one")
    assert [record.value for record in records] == data.to_list()
    assert records[-1].where.endswith("one/data-00002-of-00003.arrow#6")
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"holds several datasets; choose one of train, test"):
        Source(tmp_path / "two")
    assert len(values(tmp_path / "two" / "test")) == 23


def test_array_record(tmp_path):
    module = pytest.importorskip(
        "array_record.python.array_record_module",
        reason="needs array_record: pip install l4jax[data]",
    )
    file = tmp_path / "x.array_record"
    writer = module.ArrayRecordWriter(str(file), "group_size:7")
    for i in range(2500):
        writer.write(json.dumps({"n": i}).encode())
    writer.write(b"\x00\xff")
    writer.close()
    records, report = read(file, on_error="skip")
    assert [record.value for record in records] == [{"n": i} for i in range(2500)]
    assert (report.read, report.refused) == (2501, 1)
    assert report.reasons[0].startswith(f"{file}#2500: no JSON")


# --- Finding files -------------------------------------------------------------------------------
def test_folders_patterns_and_lists(tmp_path):
    for name in ("b/2.jsonl", "a/1.jsonl", "a/_SUCCESS", "a/.x.jsonl", "README.md", "a/c/3.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"name": name}) + "\n")

    def names(path):
        return [value["name"] for value in values(path)]

    every = ["a/1.jsonl", "a/c/3.jsonl", "b/2.jsonl"]
    assert names(tmp_path) == every
    assert sorted(names(f"{tmp_path}/**/*.jsonl")) == every
    assert names(f"{tmp_path}/?/*.jsonl") == ["a/1.jsonl", "b/2.jsonl"]
    assert names([tmp_path / "b", f"{tmp_path}/a/1.jsonl"]) == ["b/2.jsonl", "a/1.jsonl"]
    assert Source(tmp_path).bytes == sum(len(name) + 13 for name in every)
    (tmp_path / "[1]").mkdir()
    (tmp_path / "b" / "2.jsonl").rename(tmp_path / "[1]" / "2.jsonl")
    assert names(tmp_path / "[1]") == ["b/2.jsonl"]
    assert repr(Source(tmp_path / "a")) == f"Source('{tmp_path}/a/1.jsonl' and 1 more)"


def test_what_is_not_there_or_not_clear_is_said(tmp_path):
    (tmp_path / "x.dat").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file or folder"):
        Source(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="no file fits this pattern"):
        Source(f"{tmp_path}/*.jsonl")
    with pytest.raises(FileNotFoundError, match=r"found x\.dat; wanted names that end in \.jsonl"):
        Source(tmp_path)
    with pytest.raises(ValueError, match=r"x\.dat: its name does not tell its format"):
        Source(tmp_path / "x.dat")
    with pytest.raises(ValueError, match="no path is given"):
        Source([])
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"several formats \(jsonl, text\); pass a pattern"):
        Source(tmp_path)
    with pytest.raises(ValueError, match="only gs:// and s3:// addresses"):
        Source("https://somewhere/x.jsonl")


def test_a_fingerprint_changes_with_the_files(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(lines())
    before = Source(file).fingerprint()
    assert Source(file).fingerprint() == before
    assert Source(file, format="text").fingerprint() != before
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert Source(file).fingerprint() != before


# --- Malformed records ---------------------------------------------------------------------------
BROKEN = b'{"text": "a"}\n{"text": \n[1, 2]\n"\xff"\n\nnull\n{"text": "b"}\n'


def test_malformed_lines_are_counted_and_told(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(BROKEN)
    records, report = read(file, on_error="skip")
    assert [record.value["text"] for record in records] == ["a", "b"]
    assert records[1].where == f"{file}:7"
    assert (report.read, report.refused) == (6, 4)
    starts = [reason.partition("x.jsonl:")[2][:12] for reason in report.reasons]
    assert starts == ["2: no JSON: ", "3: expected ", "4: no JSON: ", "6: expected "]
    assert "not '[1, 2]'" in report.reasons[1]


def test_a_malformed_line_ends_everything_unless_told_otherwise(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(BROKEN)
    with pytest.raises(ValueError, match=rf"^{file}:2: no JSON: Expecting value"):
        read(file)


def test_reasons_are_kept_up_to_a_point(tmp_path):
    (tmp_path / "x.jsonl").write_text("no\n" * 500)
    _, report = read(tmp_path / "x.jsonl", on_error="skip")
    assert report.refused == 500
    assert len(report.reasons) == sources._REASONS


def test_damaged_files_are_named(tmp_path):
    """They are errors whatever is said of malformed records: nobody knows what they held."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines() * 1000)[:-20])
    (tmp_path / "b.jsonl.gz").write_bytes(lines())
    garbled = bytearray(gzip.compress(lines() * 1000))
    garbled[20:30] = b"\xff" * 10
    (tmp_path / "e.jsonl.gz").write_bytes(garbled)
    (tmp_path / "c.json").write_bytes(b"[{]")
    for name, message in (
        ("a.jsonl.gz", "is damaged or no gzip file"),
        ("b.jsonl.gz", "is damaged or no gzip file"),
        ("e.jsonl.gz", "is damaged or no gzip file"),
        ("c.json", "is no JSON"),
    ):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            read(tmp_path / name, on_error="skip")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    _, report = read(tmp_path / "d.txt", on_error="skip")
    assert "d.txt: no UTF-8" in report.reasons[0]


def test_damaged_tables_are_named(tmp_path):
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install l4jax[data]")
    for name, message in (("x.parquet", "no Parquet file"), ("x.arrow", "no Arrow stream")):
        (tmp_path / name).write_bytes(np.arange(100).tobytes())
        with pytest.raises(ValueError, match=f"{name}: is damaged or {message}"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "package"),
    [("x.parquet", "pyarrow"), ("x.arrow", "pyarrow"), ("x.array_record", "array_record")],
)
def test_a_missing_package_is_named(name, package, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(b"")
    plain = builtins.__import__

    def absent(module, *rest):
        if module.partition(".")[0] == package:
            raise ImportError(module)
        return plain(module, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=rf"{name}: reading it needs {package}: pip install l4"):
        read(tmp_path / name)


def test_a_summary_says_what_was_left_out():
    report = Report(read=12345, kept=12000, refused=5, too_long=340)
    assert report.summary() == "12,000 of 12,345 records kept, 5 refused, 340 too long"


# --- Addresses -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def bucket(s3):
    """A file system on an S3 server, with a bucket."""
    s3.mkdir("texts")
    return s3


# aiobotocore leaves its sessions to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_records_come_from_addresses(bucket, tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install l4jax[data]")
    parquet = pytest.importorskip("pyarrow.parquet")
    module = pytest.importorskip("array_record.python.array_record_module")
    (tmp_path / "1.jsonl.gz").write_bytes(gzip.compress(lines()))
    (tmp_path / "2.jsonl").write_bytes(lines())
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "3.parquet")
    writer = module.ArrayRecordWriter(str(tmp_path / "4.array_record"), "group_size:1")
    writer.write(b'{"n": 4}')
    writer.close()
    bucket.put(str(tmp_path) + "/", "texts/all", recursive=True)
    assert values("s3://texts/all/*.jsonl*") == ROWS * 2
    assert values("s3://texts/all/3.parquet") == ROWS
    assert values("s3://texts/all/4.array_record") == [{"n": 4}]
    found, _ = read("s3://texts/all", on_error="skip", format="text")
    assert found[1] == ({"text": lines().decode()}, "s3://texts/all/2.jsonl")
    source = Source("s3://texts/all/2.jsonl")
    assert source.bytes == len(lines())
    assert source.fingerprint() == Source("s3://texts/all/2.jsonl").fingerprint()
    with pytest.raises(FileNotFoundError, match="s3://texts/none: no such file or folder"):
        Source("s3://texts/none")
