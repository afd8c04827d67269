"""Rank files as Hugging Face tokenizers: the same ids, from random vocabularies to Meta's own."""

import base64
import json
import random
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from l4jax.data import tokenizer as tk
from l4jax.data.tokenizer_json import from_rank_file, merges

FAMILIES: tuple[tk.Family, ...] = ("llama3", "llama4")
BYTES = [bytes([byte]) for byte in range(256)]
ATOMS = [
    *("the", "The", "THE", "HTTPServer", "don't", "I'M", "it'ſ", "naïve", "ÉCOLE", "Straße", "ǅ"),
    *("Привет", "مرحبا", "नमस्ते", "你好世界", "机器学习", "こんにちは", "한국어", "ไทย", "İstanbul"),
    *("e\u0301", "a\u0308\u0323", "\u0301X", "\u200d", "\ufeff", "\u00ad", "\x00", "\x7f", "\x85"),
    *("😀", "👩‍👩‍👧", "👍🏽", "🇹🇷", "🏳️‍🌈", "\U0010ffff", "\ue000", "½", "²", "٣", "Ⅷ"),
    *("1", "12", "123", "1234567", "3.14", "0x7f", "a1b22", "2024-01-31", "1,000,000"),
    *(
        " ",
        "  ",
        " " * 7,
        " " * 90,
        "\t",
        "\t\t",
        "\n",
        "\r\n",
        "\n\n\n",
        " \n",
        "\u00a0",
        "\u3000",
    ),
    *(
        "def f(x):\n    return x\n",
        "//\n",
        "/* */",
        "=>",
        "!=\r\n",
        "</a>\n/",
        "https://a.b/c?d=1#e",
    ),
    *"aZqß'\"`.,;:!?/\\|<>()[]{}@#$%^&*+=~-_",
]


def texts(count: int, *, seed: int) -> list[str]:
    """`count` texts of up to 25 random parts, and some of random characters."""
    rng = random.Random(seed)
    mixed = ["".join(rng.choices(ATOMS, k=rng.randint(0, 25))) for _ in range(count * 4 // 5)]
    points = [p for p in range(0x30000) if not 0xD800 <= p < 0xE000]
    return mixed + ["".join(map(chr, rng.choices(points, k=20))) for _ in range(count // 5)]


def rank_file(pieces: list[bytes], folder: Path) -> Path:
    """A rank file of `pieces`."""
    lines = [base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces)]
    file = folder / "tokenizer.model"
    file.write_bytes(b"".join(lines))
    return file


def export(file: Path, folder: Path, **options: Any) -> Path:
    """`folder` with what a rank file becomes."""
    folder.mkdir(exist_ok=True)
    for name, content in from_rank_file(file, **options).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tk.Family:
    """Each family in turn."""
    return request.param


@pytest.fixture
def small(family: tk.Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A rank file of 600 tokens learned from text, taken for one of the family's size."""
    learned = tk.train(texts(200, seed=1), vocab_size=700, family=family)
    pieces = list(learned._pieces[:600])
    monkeypatch.setitem(tk._RANKS, family, len(pieces))
    return rank_file(pieces, tmp_path)


# --- Merges --------------------------------------------------------------------------------------
def test_merges_stand_in_the_order_of_what_they_make() -> None:
    pieces = [*BYTES, b"bc", b"ab", b"abc", b"xyz", b"abcabc"]
    assert list(merges(pieces)) == [
        (b"b", b"c"),
        (b"a", b"b"),
        (b"a", b"bc"),
        (b"ab", b"c"),
        (b"abc", b"abc"),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_any_vocabulary_gives_the_same_ids(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens in any order, cut in several ways, reached by merges or not, with ties in plenty."""
    rng = random.Random(seed)
    letters = ["ab", "abc", "aé ", "a\u0301b"][seed % 4]
    words = {"".join(rng.choices(letters, k=rng.randint(2, 7))).encode() for _ in range(60)}
    pieces = [*BYTES, *rng.sample(sorted(words), len(words))]
    rng.shuffle(pieces)
    monkeypatch.setitem(tk._RANKS, "llama4", len(pieces))
    file = rank_file(pieces, tmp_path)
    meta, ours = tk.load(file), tk.load(export(file, tmp_path / "hf"))
    for _ in range(200):
        text = "".join(rng.choices(letters, k=rng.randint(0, 40)))
        assert ours.encode(text) == meta.encode(text), text


# --- Files ---------------------------------------------------------------------------------------
def test_small_rank_file(small: Path, family: tk.Family, tmp_path: Path) -> None:
    meta, ours = tk.load(small), tk.load(export(small, tmp_path / "hf"))
    assert ours.family == family
    assert ours.special == meta.special
    assert (ours.vocab_size, ours.bos_id, ours.pad_id) == (meta.vocab_size, 600, meta.pad_id)
    assert ours.stop_ids == meta.stop_ids
    for text in texts(1000, seed=2):
        ids = meta.encode(text)
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == text


def test_files_name_the_roles(small: Path, family: tk.Family) -> None:
    files = {name: json.loads(content) for name, content in from_rank_file(small).items()}
    assert list(files) == ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    eot, pad = {
        "llama3": ("<|eot_id|>", "<|finetune_right_pad_id|>"),
        "llama4": ("<|eot|>", "<|finetune_right_pad|>"),
    }[family]
    roles = {"bos_token": "<|begin_of_text|>", "eos_token": eot, "pad_token": pad}
    assert files["special_tokens_map.json"] == roles
    assert roles.items() <= files["tokenizer_config.json"].items()
    assert "model_max_length" not in files["tokenizer_config.json"]
    added = files["tokenizer.json"]["added_tokens"]
    assert [token["content"] for token in added] == tk.SPECIAL_NAMES[family]
    assert [token["id"] for token in added] == list(range(600, 600 + len(added)))
    assert all(token["special"] and not token["normalized"] for token in added)


def test_bad_rank_files_are_named(small: Path, tmp_path: Path) -> None:
    small.write_bytes(small.read_bytes() + b"YWJjZGVmZ2g= 600\n")
    with pytest.raises(ValueError, match=r"tokenizer\.model has 601 ranks"):
        from_rank_file(small)
    small.write_bytes(b"oh")
    with pytest.raises(ValueError, match="line 1: expected base64"):
        from_rank_file(small)
    with pytest.raises(FileNotFoundError):
        from_rank_file(tmp_path / "nowhere")


@pytest.mark.parity
def test_transformers_loads_it(small: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install l4jax[parity]")
    meta = tk.load(small)
    theirs = transformers.AutoTokenizer.from_pretrained(export(small, tmp_path, max_length=4321))
    assert len(theirs) == meta.vocab_size
    assert theirs.model_max_length == 4321
    assert (theirs.bos_token_id, theirs.pad_token_id) == (meta.bos_id, meta.pad_id)
    assert theirs.eos_token_id == meta.stop_ids[-1]
    for text in texts(300, seed=3):
        assert theirs(text)["input_ids"] == [meta.bos_id, *meta.encode(text)]
        assert theirs.decode(meta.encode(text)) == text
    pair = [meta.bos_id, *meta.encode("one"), meta.bos_id, *meta.encode("two")]
    assert theirs("one", "two")["input_ids"] == pair


# --- Meta's own files ----------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parity
def test_metas_rank_files(family: tk.Family, tmp_path: Path) -> None:
    """The files shipped with Meta's package: every id equal, in `tokenizers` and transformers."""
    pytest.importorskip("llama_models", reason="needs llama-models: pip install l4jax[parity]")
    transformers = pytest.importorskip("transformers", reason="pip install l4jax[parity]")
    converter = pytest.importorskip("transformers.convert_slow_tokenizer").TikTokenConverter

    file = Path(str(resources.files(f"llama_models.{family}"))) / "tokenizer.model"
    folder = export(file, tmp_path)
    meta, ours = tk.load(file), tk.load(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    first, count = {"llama3": (128_000, 256), "llama4": (200_000, 2048)}[family]
    assert ours.special == meta.special
    assert sorted(ours.special.values()) == list(range(first, first + count))
    assert len(theirs) == ours.vocab_size == first + count
    assert {name: theirs.convert_tokens_to_ids(name) for name in meta.special} == meta.special
    for text in texts(1500, seed=4):
        ids = meta.encode(text)
        assert ours.encode(text) == ids, repr(text)
        assert theirs(text)["input_ids"] == [meta.bos_id, *ids], repr(text)
        assert theirs.decode(ids) == text
    spec = json.loads((folder / "tokenizer.json").read_text())
    _, expected = converter(vocab_file=str(file)).extract_vocab_merges_from_model(str(file))
    assert [tuple(pair) for pair in spec["model"]["merges"]] == expected
