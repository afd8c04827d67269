"""Tokenizer: round trips, special names, streaming, files good and bad."""

import base64
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from l4jax.data import tokenizer as tk

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog didn't mind. It's 2024, isn't it?",
    "def attend(q, k, v):\n    scores = q @ k.T\n    return softmax(scores) @ v\n",
    "Les élèves naïfs mangent des crêpes à Noël. Größe, Straße, façade.",
    "机器学习是人工智能的一个分支。今日は良い天気ですね。",
    "Привет, мир! Как дела? مرحبا بالعالم शुभ प्रभात 🎉🎉 👍🏽",
    "A tokenizer cuts text into pieces, and the pieces into the parts that the model knows.",
] * 3

ODD = [
    "",
    " ",
    "e\u0301 a\u0308\u0323 \u0301X",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇹🇷",
    "line\r\nline\r\n\r\n\tTab\t\ttab\x00\x7f\x0b\u2028",
    "İstanbul ıIiİ ǅ ſt DIDN'T it'ſ",
    "x" + " " * 3000 + "y",
    "\ufeffzero\u200bwidth\u00a0space\u3000",
    "1234567 ¹²³ ١٢٣ Ⅷ½ a1b22",
    "https://a.b/c?d=e#f //\n/* no */ ===>>>",
    "\U0010ffff\ue000",
    "<|eot|> <|begin_of_text|><|header_start|>system<|header_end|>",
]


# Where the test run checks types, it refuses a wrong literal before the function can.
NOT_ONE_OF = (ValueError, TypeError)


@pytest.fixture(scope="module")
def tok() -> tk.Tokenizer:
    """A small Llama 4 tokenizer."""
    return tk.train(TEXTS, vocab_size=420)


@pytest.fixture(scope="module")
def rank_lines() -> list[bytes]:
    """The lines of a rank file of Llama 3's size: all bytes, all pairs, and some triples."""
    sizes = (itertools.product(range(256), repeat=n) for n in (1, 2, 3))
    pieces = itertools.islice(itertools.chain(*sizes), 128_000)
    return [base64.b64encode(bytes(p)) + b" %d" % rank for rank, p in enumerate(pieces)]


# --- train ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama3", "llama4"])
def test_train_reaches_the_size_asked_for(family: tk.Family) -> None:
    tok = tk.train(TEXTS, vocab_size=400, family=family)
    assert tok.vocab_size == 400
    assert tok.family == family
    assert sorted(tok.special.values()) == list(range(400 - len(tok.special), 400))
    assert len(tok.stop_ids) == 3
    assert tok.pad_id == next(i for name, i in tok.special.items() if "right_pad" in name)


def test_train_names_the_llama4_chat_tokens(tok: tk.Tokenizer) -> None:
    names = "begin_of_text end_of_text header_start header_end eom eot python_start python_end"
    assert list(tok.special) == [f"<|{n}|>" for n in [*names.split(), "finetune_right_pad"]]
    assert tok.bos_id == tok.special["<|begin_of_text|>"]
    assert tok.stop_ids == tuple(tok.special[f"<|{n}|>"] for n in ("end_of_text", "eom", "eot"))


def test_train_on_little_text_stays_below_the_size() -> None:
    tok = tk.train(["ab ab"], vocab_size=5000)
    assert 265 < tok.vocab_size < 280


def test_train_does_not_depend_on_order(tmp_path: Path) -> None:
    saved = []
    for seed in range(3):
        texts = random.Random(seed).sample(TEXTS, len(TEXTS))
        tk.train(iter(texts), vocab_size=420).save(tmp_path / str(seed))
        saved.append((tmp_path / str(seed) / "tokenizer.json").read_bytes())
    assert saved[0] == saved[1] == saved[2]


def test_train_makes_text_shorter(tok: tk.Tokenizer) -> None:
    assert len(tok.encode(TEXTS[0])) < 0.7 * len(TEXTS[0])


def test_train_rejects_bad_arguments() -> None:
    with pytest.raises(ValueError, match="vocab_size 264 is too small.*265"):
        tk.train(TEXTS, vocab_size=264)
    with pytest.raises(NOT_ONE_OF, match="'gpt'"):
        tk.train(TEXTS, vocab_size=400, family="gpt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one string"):
        tk.train("text", vocab_size=400)


# --- encode and decode ---------------------------------------------------------------------------
@pytest.mark.parametrize("text", [*ODD, *TEXTS[:6]])
@pytest.mark.parametrize("allow_special", [False, True])
def test_round_trip(tok: tk.Tokenizer, text: str, allow_special: bool) -> None:
    ids = tok.encode(text, allow_special=allow_special)
    assert tok.decode(ids) == text
    assert all(0 <= i < tok.vocab_size for i in ids)


def test_round_trip_over_random_characters(tok: tk.Tokenizer) -> None:
    rng = random.Random(0)
    points = [p for p in range(0x30000) if not 0xD800 <= p < 0xE000]
    for _ in range(50):
        text = "".join(map(chr, rng.choices(points, k=60)))
        assert tok.decode(tok.encode(text)) == text


def test_special_names_stay_text_unless_allowed(tok: tk.Tokenizer) -> None:
    text = "stop<|eot|> now<|eot"
    assert not set(tok.encode(text)) & set(tok.special.values())
    ids = tok.encode(text, allow_special=True)
    assert ids == [*tok.encode("stop"), tok.special["<|eot|>"], *tok.encode(" now<|eot")]


def test_the_longest_special_name_wins(tok: tk.Tokenizer) -> None:
    special = {"<a>": 1, "<a><b>": 2}
    both = tk.Tokenizer(tok.encode, pieces=tok._pieces, special=special, files={})
    assert both.encode("<a><b><a>", allow_special=True) == [2, 1]


def test_bos(tok: tk.Tokenizer) -> None:
    assert tok.encode("hi", bos=True) == [tok.bos_id, *tok.encode("hi")]
    assert tok.encode("", bos=True) == [tok.bos_id]
    assert tok.encode("") == []


def test_lone_surrogates_become_replacement_characters(tok: tk.Tokenizer) -> None:
    assert tok.decode(tok.encode("a\ud83db")) == "a\ufffdb"
    assert tok.decode(tok.encode("\ud83d\ude00")) == "😀"


def test_decode_can_skip_special(tok: tk.Tokenizer) -> None:
    ids = [*tok.encode("a", bos=True), tok.special["<|eot|>"]]
    assert tok.decode(ids) == "<|begin_of_text|>a<|eot|>"
    assert tok.decode(ids, skip_special=True) == "a"


def test_decode_replaces_broken_utf8(tok: tk.Tokenizer) -> None:
    first, *_ = tok.encode("\U0010ffff")
    assert tok.decode([first]) == "\ufffd"


@pytest.mark.parametrize("bad", [-1, 420, 10**9])
def test_decode_rejects_ids_outside_the_vocabulary(tok: tk.Tokenizer, bad: int) -> None:
    with pytest.raises(ValueError, match=rf"{bad} is outside the vocabulary of 420"):
        tok.decode([0, bad])
    with pytest.raises(ValueError, match=rf"{bad} is outside"):
        tok.stream().push(bad)


def test_decode_takes_arrays(tok: tk.Tokenizer) -> None:
    ids = np.array(tok.encode("array"), np.int32)
    assert tok.decode(ids) == "array"
    assert "".join(map(tok.stream().push, ids)) == "array"


def test_decode_rejects_floats(tok: tk.Tokenizer) -> None:
    with pytest.raises(TypeError):
        tok.decode([1.0])  # type: ignore[list-item]


# --- long texts ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("a" * 25_000, [25_000]),
        ("a" * 25_001, [25_000, 1]),
        ("a" * 60_000, [25_000, 25_000, 10_000]),
        ("a" * 10 + " " * 25_001 + "b" * 5, [25_010, 6]),
        ("ab " * 20_000, [60_000]),
        ("ab " * 133_334, [400_000, 2]),
        # The count starts again where a part of 400,000 begins.
        ("ab " * 130_000 + "c" * 30_000, [400_000, 20_000]),
        ("", []),
    ],
)
def test_long_texts_are_cut_at_metas_limits(text: str, lengths: list[int]) -> None:
    parts = list(tk._chunks(text))
    assert [len(part) for part in parts] == lengths
    assert "".join(parts) == text


def test_long_runs_encode_part_by_part(tok: tk.Tokenizer) -> None:
    text = "a" * 26_000
    assert tok.encode(text) == tok.encode("a" * 25_000) + tok.encode("a" * 1_000)


# --- stream --------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ODD)
def test_stream_joins_to_the_decoded_text(tok: tk.Tokenizer, text: str) -> None:
    out = tok.stream()
    pieces = [out.push(i) for i in tok.encode(text)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + out.flush() == text


def test_stream_waits_for_whole_characters(tok: tk.Tokenizer) -> None:
    ids = tok.encode("\U0010ffff")
    assert len(ids) == 4
    out = tok.stream()
    assert [out.push(i) for i in ids] == ["", "", "", "\U0010ffff"]


def test_stream_shows_broken_bytes_and_starts_afresh(tok: tk.Tokenizer) -> None:
    first, *_ = tok.encode("\U0010ffff")
    out = tok.stream(skip_special=True)
    assert out.push(first) == ""
    assert out.push(tok.special["<|eot|>"]) == ""
    assert out.flush() == "\ufffd"
    assert out.flush() == ""
    assert out.push(tok.encode("a")[0]) == "a"
    assert out.push(first) == ""
    assert out.push(tok.encode("b")[0]) == "\ufffdb"


# --- save and load -------------------------------------------------------------------------------
def test_save_and_load(tok: tk.Tokenizer, tmp_path: Path) -> None:
    tok.save(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(p.name for p in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["bos_token"] == "<|begin_of_text|>"
    assert config["eos_token"] == "<|eot|>"
    assert config["pad_token"] == "<|finetune_right_pad|>"
    for path in (folder, str(folder), folder / "tokenizer.json"):
        again = tk.load(path)
        assert (again.vocab_size, again.special) == (tok.vocab_size, tok.special)
        assert (again.stop_ids, again.pad_id) == (tok.stop_ids, tok.pad_id)
        for text in ODD:
            assert again.encode(text) == tok.encode(text)


def test_save_keeps_what_came_with_the_file(tok: tk.Tokenizer, tmp_path: Path) -> None:
    tok.save(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"model_max_length": 7}')
    tk.load(tmp_path / "a").save(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_save_leaves_the_old_file_when_it_fails(
    tok: tk.Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tk.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tok.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_text() == "old"


def test_load_rejects_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path is empty"):
        tk.load("")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json and tokenizer\.model"):
        tk.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tk.load(tmp_path / "nowhere")


# --- tokenizer.json ------------------------------------------------------------------------------
def _spec(tok: tk.Tokenizer) -> dict:
    return json.loads(tok._files["tokenizer.json"])


def _load_spec(spec: object, folder: Path) -> tk.Tokenizer:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(spec))
    return tk.load(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n"model": {},\n}', r"tokenizer\.json, line 3: not JSON"),
        (b"[]", "no 'model' object"),
        (b'{"model": {"type": "BPE"}}', r"tokenizer\.json is not a valid"),
        (b"\xff{}", "not UTF-8 at byte 0"),
        (b"", "line 1: not JSON"),
    ],
)
def test_load_rejects_malformed_json(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tk.load(tmp_path)


def test_load_rejects_vocabularies_that_are_not_byte_level(
    tok: tk.Tokenizer, tmp_path: Path
) -> None:
    spec = _spec(tok)
    spec["model"]["vocab"]["▁the"] = 411
    with pytest.raises(ValueError, match="'▁the' .id 411. is not spelled in byte symbols"):
        _load_spec(spec, tmp_path)


def test_load_rejects_a_vocabulary_without_some_byte(tok: tk.Tokenizer, tmp_path: Path) -> None:
    spec = _spec(tok)
    del spec["model"]["vocab"]["ÿ"]
    with pytest.raises(ValueError, match="no token for byte 0xff"):
        _load_spec(spec, tmp_path)


def test_load_treats_every_added_token_as_special(tok: tk.Tokenizer, tmp_path: Path) -> None:
    # `tokenizers` itself would turn such a name in a user's text into its id.
    spec = _spec(tok)
    for token in spec["added_tokens"]:
        token["special"] = False
    again = _load_spec(spec, tmp_path)
    assert again.encode("<|eot|>") == tok.encode("<|eot|>")
    assert again.special == tok.special


def test_load_without_special_tokens(tok: tk.Tokenizer, tmp_path: Path) -> None:
    plain = _load_spec(_spec(tok) | {"added_tokens": [], "post_processor": None}, tmp_path)
    assert (plain.family, plain.bos_id, plain.pad_id, plain.stop_ids) == (None, None, 0, ())
    assert plain.encode("a<|eot|>", allow_special=True) == tok.encode("a<|eot|>")
    with pytest.raises(ValueError, match="no <|begin_of_text|>"):
        plain.encode("a", bos=True)


def test_load_tolerates_other_names(tok: tk.Tokenizer, tmp_path: Path) -> None:
    spec = _spec(tok)
    spec["added_tokens"][-1]["content"] = "<|finetune_right_pad_id|>"
    assert _load_spec(spec, tmp_path).pad_id == tok.pad_id


def test_load_maps_llama3_names_by_id(tok: tk.Tokenizer, tmp_path: Path) -> None:
    # As in the first Llama 3: eom and the pad token have reserved names there.
    spec = _spec(tok)
    first = spec["added_tokens"][0]["id"]
    known = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id"}
    names = [known.get(i, f"reserved_special_token_{i}") for i in range(256)]
    token = spec["added_tokens"][0]
    spec["added_tokens"] = [
        token | {"content": f"<|{name}|>", "id": first + i} for i, name in enumerate(names)
    ]
    llama3 = _load_spec(spec, tmp_path)
    assert llama3.family == "llama3"
    assert llama3.stop_ids == (first + 1, first + 8, first + 9)
    assert llama3.pad_id == first + 4
    assert llama3.special["<|python_tag|>"] == first + 10
    assert llama3.decode([first + 8]) == "<|reserved_special_token_8|>"


# --- Meta rank files -----------------------------------------------------------------------------
def test_rank_file(rank_lines: list[bytes], tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"\n".join(rank_lines) + b"\n\n")
    tok = tk.load(tmp_path)
    assert (tok.family, tok.vocab_size) == ("llama3", 128_256)
    assert (tok.bos_id, tok.pad_id, tok.stop_ids) == (128_000, 128_004, (128_001, 128_008, 128_009))
    assert tok.special["<|reserved_special_token_245|>"] == 128_255
    for text in ODD:
        assert tok.decode(tok.encode(text)) == text
    assert tok.encode("<|eot_id|>", allow_special=True) == [128_009]
    assert 128_009 not in tok.encode("<|eot_id|>")
    tok.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.model").read_bytes() == file.read_bytes()


def test_rank_file_is_not_saved_beside_a_json_that_would_hide_it(
    rank_lines: list[bytes], tok: tk.Tokenizer, tmp_path: Path
) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"\n".join(rank_lines))
    tok.save(tmp_path / "json")
    with pytest.raises(ValueError, match=r"already has a tokenizer\.json"):
        tk.load(file).save(tmp_path / "json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({2: b"!!!! 2"}, r"tokenizer\.model, line 3: expected base64"),
        ({2: b"YQ== two"}, "line 3: expected base64"),
        ({2: b"YQ=="}, "line 3: expected base64"),
        ({2: b"\x0a\x07\xff 2 3"}, "line 4: expected base64"),
        ({300: b"//// 2"}, "line 301: rank 2 was given before"),
        ({300: b"YQ== 300"}, "line 301: token b'a' was given before"),
        ({299: b"//////// 900"}, "rank 299 is missing"),
        ({0: b"AAAA 0"}, "no token for byte 0x00"),
        ({}, r"has 300 ranks.*128000 .llama3. or 200000 .llama4."),
    ],
)
def test_rank_file_rejects(
    change: dict[int, bytes], message: str, rank_lines: list[bytes], tmp_path: Path
) -> None:
    lines = dict(enumerate(rank_lines[:300])) | change
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"\n".join(lines.values()))
    with pytest.raises(ValueError, match=message):
        tk.load(file)
