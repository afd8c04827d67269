"""Records become stores: the same for any number of workers, whole or not at all, made once."""

import io
import json
import os

import pytest
from rich.console import Console

from l4jax.data import tokenizer as tk
from l4jax.data import tokenizing
from l4jax.data.conversations import Conversations, Documents, Preferences, fingerprint
from l4jax.data.sources import Source
from l4jax.data.store import Store
from l4jax.data.tokenizing import encoded, tokenize

TEXTS = [f"naïve 你好 {'word ' * (i % 37)}🎉\r\n" for i in range(203)]


@pytest.fixture(scope="module")
def bpe():
    return tk.train(TEXTS[:40], vocab_size=300)


def source(folder, rows):
    file = folder / "x.jsonl"
    file.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    return Source(file)


def documents(folder):
    return source(folder, [{"text": text} for text in TEXTS])


def turns(*texts):
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_examples_are_those_of_the_encoder(bpe, tmp_path):
    store = tokenize(documents(tmp_path), Documents(bpe), tmp_path / "out")
    assert len(store) == len(TEXTS)
    for number, text in enumerate(TEXTS):
        (segment,) = Documents(bpe)({"text": text})
        assert store[number].tokens.tolist() == segment.tokens
    assert not store.has_mask
    assert store.meta["tokenizer"] == fingerprint(bpe)
    assert store.meta["encoder"] == {
        "encoder": "Documents",
        "bos": True,
        "eos": True,
        "key": "text",
    }
    store.require(vocab_size=bpe.vocab_size, tokenizer=fingerprint(bpe))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["read"], report["kept"]) == (203, 203)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "x.jsonl"]


def test_workers_change_no_byte(bpe, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "_CHUNK", 7)
    rows = [turns(f"hi {i}", "yo" * (i % 19)) for i in range(90)]
    rows[40] = {"messages": "broken"}
    found = []
    for workers in (0, 2):
        store = tokenize(
            source(tmp_path, rows),
            Conversations(bpe),
            tmp_path / str(workers),
            workers=workers,
            max_length=35,
            on_error="skip",
        )
        found.append(files(store.folder))
        os.utime(tmp_path / "x.jsonl", ns=(1, 1))
    for made in found:
        # The name of the file says when it was made.
        made["meta.json"] = {**json.loads(made["meta.json"]), "source": None}
    assert found[0] == found[1]
    report = json.loads(found[0]["report.json"])
    assert report["refused"] == 1
    assert report["too_long"] > 5
    assert report["kept"] + report["too_long"] == 89


def test_a_store_that_is_there_is_used_unless_something_changed(bpe, tmp_path):
    def make(encode=None, **options):
        store = tokenize(documents_, encode or Documents(bpe), tmp_path / "out", **options)
        return store, (tmp_path / "out" / "tokens.bin").stat().st_ino

    documents_ = documents(tmp_path)
    _, first = make()
    assert make()[1] == first
    assert make(workers=3, console=Console(file=io.StringIO()))[1] == first
    last = first
    for change in (
        {"encode": Documents(bpe, eos=False)},
        {"max_length": 50},
        {"max_length": 50, "too_long": "split"},
        {"encode": Documents(tk.train(TEXTS[:3], vocab_size=290))},
    ):
        assert make(**change)[1] != last
        last = make(**change)[1]
    documents_ = source(tmp_path, [{"text": "other"}])
    store, inode = make()
    assert (len(store), inode != last) == (1, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "x.jsonl"]


def test_a_damaged_store_is_made_anew(bpe, tmp_path):
    tokenize(documents(tmp_path), Documents(bpe), tmp_path / "out")
    good = files(tmp_path / "out")
    (tmp_path / "out" / "tokens.bin").write_bytes(b"cut")
    tokenize(Source(tmp_path / "x.jsonl"), Documents(bpe), tmp_path / "out")
    assert files(tmp_path / "out") == good


def test_a_failure_leaves_the_old_store_and_nothing_else(bpe, tmp_path):
    tokenize(documents(tmp_path), Documents(bpe), tmp_path / "out")
    before = files(tmp_path / "out")
    broken = source(tmp_path, [{"text": "a"}, {"txt": "b"}])
    with pytest.raises(
        ValueError, match=r"x\.jsonl:2: a record with the names txt; wanted is text"
    ):
        tokenize(broken, Documents(bpe), tmp_path / "out")
    assert files(tmp_path / "out") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "x.jsonl"]


def test_an_equal_store_of_another_process_is_not_disturbed(bpe, tmp_path, monkeypatch):
    """Of two that make the same one, the first to finish wins."""
    plain = tokenizing._put

    def late(partial, folder, about):
        plain_folder = tmp_path / "other"
        monkeypatch.setattr(tokenizing, "_put", plain)
        tokenize(Source(tmp_path / "x.jsonl"), Documents(bpe), plain_folder)
        os.replace(plain_folder, folder)
        plain(partial, folder, about)

    monkeypatch.setattr(tokenizing, "_put", late)
    store = tokenize(documents(tmp_path), Documents(bpe), tmp_path / "out")
    assert len(store) == len(TEXTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "x.jsonl"]


# --- Records that do not become examples ---------------------------------------------------------
def test_nothing_is_lost_without_a_word(bpe, tmp_path):
    rows = [{"text": "good"}, "{no\n", {"text": " \n"}, {"body": 1}, {"text": "x " * 99}]
    store = tokenize(
        source(tmp_path, rows), Documents(bpe), tmp_path / "out", max_length=20, on_error="skip"
    )
    report = json.loads((store.folder / "report.json").read_text())
    assert len(store) == 1
    reasons = report.pop("reasons")
    assert report == {"read": 5, "kept": 1, "refused": 2, "empty": 1, "too_long": 1, "split": 0}
    starts = [reason.partition("x.jsonl:")[2] for reason in reasons]
    assert starts[0].startswith("2: no JSON")
    assert starts[1] == "3: no text"
    assert starts[2] == "4: a record with the names body; wanted is text"
    assert starts[3].endswith("tokens, more than 20")


def test_long_documents_can_be_split(bpe, tmp_path):
    store = tokenize(
        documents(tmp_path), Documents(bpe), tmp_path / "out", max_length=17, too_long="split"
    )
    joined = [token for number in range(len(store)) for token in store[number].tokens.tolist()]
    whole = [Documents(bpe)({"text": text})[0].tokens for text in TEXTS]
    assert joined == sum(whole, [])
    assert store.lengths.max() == 17
    report = json.loads((store.folder / "report.json").read_text())
    assert report["kept"] == 203
    assert report["split"] == sum(len(tokens) > 17 for tokens in whole) > 0


@pytest.mark.parametrize("too_long", ["raise", "split"])
def test_a_conversation_that_is_too_long_is_named(too_long, bpe, tmp_path):
    rows = [turns("a", "b"), turns("a", "b" * 99)]
    wanted = "leave it out" if too_long == "split" else "allow more"
    with pytest.raises(ValueError, match=rf"x\.jsonl:2: \d+ tokens, more than 30.*{wanted}"):
        tokenize(
            source(tmp_path, rows),
            Conversations(bpe),
            tmp_path / "out",
            max_length=30,
            too_long=too_long,
        )


def test_the_length_of_a_preference_is_that_of_both_answers(bpe, tmp_path):
    rows = [{"prompt": "a", "chosen": "b" * n, "rejected": "c"} for n in (2, 40)]
    store = tokenize(source(tmp_path, rows), Preferences(bpe), tmp_path / "out", max_length=53)
    assert (len(store), store.most_segments) == (1, 2)
    assert store.lengths[0] == sum(len(s.tokens) for s in Preferences(bpe)(rows[0]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there are no records"),
        (["no\n"], r"0 of 1 records kept, 1 refused \(.*x\.jsonl:1: no JSON"),
        ([{"text": ""}], "1 empty"),
    ],
)
def test_a_store_without_examples_is_an_error(rows, message, bpe, tmp_path):
    with pytest.raises(ValueError, match=f"gives no example: .*{message}"):
        tokenize(source(tmp_path, rows), Documents(bpe), tmp_path / "out", on_error="skip")
    assert not (tmp_path / "out").exists()


def test_what_is_no_store_is_not_overwritten(bpe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("dear")
    with pytest.raises(ValueError, match="out: is there and no tokenized data"):
        tokenize(documents(tmp_path), Documents(bpe), tmp_path / "out")
    with pytest.raises(ValueError, match=r"x\.jsonl: is there and no tokenized data"):
        tokenize(documents(tmp_path), Documents(bpe), tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="max_length 0 must be at least 1"):
        tokenize(documents(tmp_path), Documents(bpe), tmp_path / "new", max_length=0)


def test_progress_is_shown(bpe, tmp_path):
    out = io.StringIO()
    tokenize(documents(tmp_path), Documents(bpe), tmp_path / "out", console=Console(file=out))
    tokens = Store(tmp_path / "out").meta["tokens"]
    assert f"Tokenizing out: 203 records {tokens:,} tokens" in out.getvalue()


def test_records_in_memory_become_a_store_in_memory(bpe, tmp_path):
    rows = [turns("a", "b"), turns("c", "d" * 9)]
    store = encoded(rows, Conversations(bpe))
    kept = tokenize(source(tmp_path, rows), Conversations(bpe), tmp_path / "out")
    assert len(store) == len(kept) == 2
    for number in range(2):
        assert store[number].tokens.tolist() == kept[number].tokens.tolist()
        assert store[number].loss_mask.tolist() == kept[number].loss_mask.tolist()
    assert not encoded([{"text": "a"}, {"text": ""}], Documents(bpe)).has_mask
