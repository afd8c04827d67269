"""Tokens of Meta's `llama-models` package and ours, on its own tokenizer files."""

import importlib
import random
import sys
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from l4jax.data import tokenizer as tk
from l4jax.data.chat import ToolFormat, render

regex = pytest.importorskip("regex", reason="needs llama-models: pip install l4jax[parity]")
transformers = pytest.importorskip("transformers", reason="pip install l4jax[parity]")
pytest.importorskip("llama_models", reason="needs llama-models: pip install l4jax[parity]")

datatypes = importlib.import_module("llama_models.datatypes")
chat3 = importlib.import_module("llama_models.llama3.chat_format")
meta3 = importlib.import_module("llama_models.llama3.tokenizer")
meta4 = importlib.import_module("llama_models.llama4.tokenizer")
TikTokenConverter = importlib.import_module("transformers.convert_slow_tokenizer").TikTokenConverter

pytestmark = pytest.mark.parity

# The chat format imports image transforms, which text needs not: torchvision may be absent.
with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, "torchvision", mock.MagicMock())
    patch.setitem(sys.modules, "torchvision.transforms", mock.MagicMock())
    chat4 = importlib.import_module("llama_models.llama4.chat_format")

META: dict[tk.Family, ModuleType] = {"llama3": meta3, "llama4": meta4}
FORMATS: dict[tk.Family, ModuleType] = {"llama3": chat3, "llama4": chat4}
PATTERNS: dict[tk.Family, str] = {
    "llama3": meta3.Tokenizer.pat_str,
    "llama4": meta4.Tokenizer.O200K_PATTERN,
}

# What one generated text is put together from. Marks before capitals, the long s and title-case
# letters are where the two splitting rules for words could come apart.
ATOMS = [
    *"aZqéßſİıǅʰªаЯא你の각ก 0189٣²Ⅷ½_-'’\"`.,;:!?/\\|<>()[]{}@#$%^&*+=~",
    *("\u0301", "\u0323", "\u200d", "\u200b", "\ufeff", "\u00ad", "\x00", "\x1c", "\x7f", "\x85"),
    *(" ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\n\n\n", " \n", "\n ", "\u00a0", "\u3000"),
    *("'s", "'S", "'ſ", "'re", "'VE", "'ll", "'Ll", "'d", "'M", "'t", "don't", "I'M", "’s"),
    *(
        "the",
        "The",
        "THE",
        "theThe",
        "HTTPServer",
        "camelCase",
        "naïve",
        "ÉCOLE",
        "Straße",
        "ǅungla",
    ),
    *("Привет", "МОСКВА", "مرحبا", "नमस्ते", "你好世界", "こんにちは", "한국어", "ไทย", "İstanbul"),
    *("😀", "👩‍👩‍👧", "👍🏽", "🇹🇷", "🏳️‍🌈", "\U0010ffff", "\ue000"),
    *("12", "123", "1234", "3.14", "1,000,000", "0x7f", "a1b2", "2024-01-31"),
    *(
        "def f(x):\n    return x\n",
        "//\n",
        "/*\n*/",
        "=>",
        "!=\r\n",
        "</a>\n/",
        "https://a.b/c?d=1",
    ),
    *("<|eot|>", "<|eot_id|>", "<|begin_of_text|>", "<|header_start|>", "<|image|>", "<|"),
]


def texts(count: int, *, seed: int, atoms: int = 30) -> list[str]:
    """`count` texts of up to `atoms` random parts."""
    rng = random.Random(seed)
    return ["".join(rng.choices(ATOMS, k=rng.randint(0, atoms))) for _ in range(count)]


def model_file(family: tk.Family) -> Path:
    """The tokenizer.model inside the installed package."""
    return Path(str(resources.files(f"llama_models.{family}"))) / "tokenizer.model"


@pytest.fixture(scope="module", params=["llama3", "llama4"])
def family(request: pytest.FixtureRequest) -> tk.Family:
    """Each family in turn."""
    return request.param


@pytest.fixture(scope="module")
def meta(family: tk.Family) -> Any:
    """Meta's tokenizer."""
    return META[family].Tokenizer(model_file(family))


@pytest.fixture(scope="module")
def ours(family: tk.Family) -> tk.Tokenizer:
    """Our tokenizer from the same file."""
    return tk.load(model_file(family))


# --- Tokenizer -----------------------------------------------------------------------------------
def test_special_tokens(family: tk.Family, meta: Any, ours: tk.Tokenizer) -> None:
    """Every special name has Meta's id, and so have the ids with a role."""
    assert ours.family == family
    assert ours.special == meta.special_tokens
    assert ours.vocab_size == meta.n_words
    assert (ours.bos_id, ours.pad_id) == (meta.bos_id, meta.pad_id)
    assert list(ours.stop_ids) == meta.stop_tokens


def test_encode(meta: Any, ours: tk.Tokenizer) -> None:
    """Texts of many scripts become the same ids, special names parsed or not, and come back."""
    for text in texts(1000, seed=1):
        ids = ours.encode(text)
        assert ids == meta.encode(text, bos=False, eos=False), repr(text)
        assert ours.decode(ids) == meta.decode(ids) == text
        parsed = meta.encode(text, bos=True, eos=False, allowed_special="all")
        assert ours.encode(text, bos=True, allow_special=True) == parsed, repr(text)


def test_encode_random_characters(meta: Any, ours: tk.Tokenizer) -> None:
    """The same for characters of every block, lone surrogates included."""
    rng = random.Random(2)
    for _ in range(300):
        top = rng.choice([0x80, 0x800, 0x3000, 0x10000, 0x110000])
        text = "".join(chr(rng.randrange(top)) for _ in range(60))
        assert ours.encode(text) == meta.encode(text, bos=False, eos=False), repr(text)


def test_decode_random_ids(meta: Any, ours: tk.Tokenizer) -> None:
    """Any ids, also those that are not UTF-8 together, become the same text."""
    rng = random.Random(3)
    for _ in range(300):
        ids = rng.choices(range(ours.vocab_size), k=20)
        text = meta.decode(ids)
        assert ours.decode(ids) == text
        out = ours.stream()
        assert "".join([*map(out.push, ids), out.flush()]) == text


@pytest.mark.parametrize(
    "text",
    [
        "a" * 60_001,
        " " * 25_001 + "x",
        "é " * 12_000 + "b" * 25_001 + "\n" * 50_001,
        "word " * 79_999 + "<|eot|><|eot_id|>" * 3 + "tail",
        "\x1c" * 25_003,
    ],
    ids=["letters", "spaces", "mixed", "400000", "separators"],
)
def test_encode_long_texts(text: str, meta: Any, ours: tk.Tokenizer) -> None:
    """Long texts are cut at the same places, even in the middle of a special name."""
    assert ours.encode(text) == meta.encode(text, bos=False, eos=False)
    parsed = meta.encode(text, bos=False, eos=False, allowed_special="all")
    assert ours.encode(text, allow_special=True) == parsed


@pytest.mark.parametrize("family", ["llama3", "llama4"])
def test_split_pattern(family: tk.Family) -> None:
    """Our pattern cuts text as Meta's does, in `regex` and in the engine of `tokenizers`."""
    pattern = regex.compile(PATTERNS[family])
    mine = regex.compile(tk.SPLIT_PATTERNS[family])
    engine = pre_tokenizers.Split(tokenizers.Regex(tk.SPLIT_PATTERNS[family]), "isolated")
    for text in texts(5000, seed=4, atoms=12):
        expected = pattern.findall(text)
        assert "".join(expected) == text
        assert mine.findall(text) == expected, repr(text)
        assert [piece for piece, _ in engine.pre_tokenize_str(text)] == expected, repr(text)


def test_hugging_face_file(family: tk.Family, ours: tk.Tokenizer, tmp_path: Path) -> None:
    """A tokenizer.json converted from Meta's file gives the same ids as that file."""
    converted = TikTokenConverter(
        vocab_file=str(model_file(family)),
        pattern=PATTERNS[family],
        extra_special_tokens=list(ours.special),
    ).converted()
    converted.save(str(tmp_path / "tokenizer.json"))
    theirs = tk.load(tmp_path)
    assert theirs.special == ours.special
    assert (theirs.family, theirs.vocab_size) == (ours.family, ours.vocab_size)
    assert (theirs.bos_id, theirs.pad_id) == (ours.bos_id, ours.pad_id)
    assert theirs.stop_ids == ours.stop_ids
    for text in [*texts(1000, seed=5), "a" * 26_000, "\ud800"]:
        ids = ours.encode(text)
        assert theirs.encode(text) == ids, repr(text)
        assert theirs.decode(ids) == ours.decode(ids)
        parsed = ours.encode(text, allow_special=True)
        assert theirs.encode(text, allow_special=True) == parsed, repr(text)


@pytest.mark.parametrize("family", ["llama3", "llama4"])
def test_transformers_loads_what_train_saves(family: tk.Family, tmp_path: Path) -> None:
    """AutoTokenizer reads a saved tokenizer and agrees on ids, text and roles."""
    ours = tk.train(texts(300, seed=6), vocab_size=1000, family=family)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.vocab_size == 1000
    assert (theirs.bos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.pad_id)
    assert theirs.eos_token_id == ours.stop_ids[-1]
    for text in texts(200, seed=7):
        assert theirs(text)["input_ids"] == ours.encode(text, bos=True, allow_special=True)
        assert theirs.decode(ours.encode(text)) == text


# --- Chat ----------------------------------------------------------------------------------------
CALLS: list[dict[str, Any]] = [
    {"name": "get_weather", "arguments": {"city": "Zürich", "days": 3, "metric": True}},
    {"name": "list_files", "arguments": {}},
    {"name": "plot", "arguments": {"x": [1, 2.5, -3], "title": "日本 <|eot|>", "grid": None}},
    {"name": "brave_search", "arguments": {"query": "news 🎉 today"}},
    {"name": "wolfram_alpha", "arguments": {"query": "2^64"}},
    {"name": "photogen", "arguments": {"query": "a cat"}},
    {"name": "code_interpreter", "arguments": {"code": "import os\nprint(os.getcwd())\n"}},
]
CONTENTS = [
    "",
    " ",
    "\n\n",
    "  padded \n",
    "Hello!",
    "a<|eot|>b<|header_start|>",
    "<|python_tag|>x",
]


def content(rng: random.Random) -> str | list[dict[str, str]]:
    """A text or a list of text parts."""
    pick = rng.choice([*CONTENTS, *texts(6, seed=rng.randrange(10**6))])
    if rng.random() < 0.7:
        return pick
    return [{"type": "text", "text": text} for text in (pick, *rng.choices(CONTENTS, k=2))]


def conversation(seed: int, *, most_calls: int) -> list[dict[str, Any]]:
    """A random conversation of up to four rounds, with tools here and there."""
    rng = random.Random(seed)
    messages: list[dict[str, Any]] = []
    if seed % 2:
        messages.append({"role": "system", "content": content(rng)})
    for _ in range(rng.randint(0, 4)):
        messages.append({"role": "user", "content": content(rng)})
        reason = rng.choice([None, "end_of_turn", "end_of_message", "out_of_tokens"])
        answer: dict[str, Any] = {
            "role": "assistant",
            "content": content(rng),
            "stop_reason": reason,
        }
        if rng.random() < 0.5:
            answer["tool_calls"] = rng.sample(CALLS, rng.randint(1, most_calls))
            messages += [answer, {"role": "tool", "content": content(rng)}]
        else:
            messages.append(answer)
    return messages


def as_meta(message: dict[str, Any]) -> datatypes.RawMessage:
    """The same message as an object of Meta's package."""
    calls = [
        {"call_id": "0", "tool_name": call["name"], "arguments": call["arguments"]}
        for call in message.get("tool_calls", [])
    ]
    return datatypes.RawMessage(**message | {"tool_calls": calls})


@pytest.mark.parametrize("tool_format", ["json", "function_tag", "python_list"])
def test_dialog(tool_format: ToolFormat, family: tk.Family, meta: Any, ours: tk.Tokenizer) -> None:
    """100 conversations per family and tool format have Meta's tokens."""
    formatter = FORMATS[family].ChatFormat(meta)
    # Of several calls Meta writes several lists in the "python_list" format, we write one.
    most = 1 if tool_format == "python_list" else 3
    for seed in range(100):
        messages = conversation(seed, most_calls=most)
        dialog = [as_meta(message) for message in messages]
        kind = datatypes.ToolPromptFormat(tool_format)
        expected = formatter.encode_dialog_prompt(dialog, kind).tokens
        got = render(messages, ours, add_generation_prompt=True, tool_format=tool_format)
        assert got.tokens == expected, messages
        assert len(got.loss_mask) == len(got.tokens)


def test_mask_matches_message_bounds(family: tk.Family, meta: Any, ours: tk.Tokenizer) -> None:
    """The mask is what Meta's formatter puts after the header of each assistant message."""
    formatter = FORMATS[family].ChatFormat(meta)
    kind = datatypes.ToolPromptFormat.json
    for seed in range(50):
        messages = conversation(seed, most_calls=3)
        mask = [False]
        for message in messages:
            size = len(formatter.encode_message(as_meta(message), kind)[0])
            header = len(formatter._encode_header(message["role"]))
            learn = message["role"] == "assistant"
            mask += [False] * header + [learn] * (size - header)
            if message.get("stop_reason") == "out_of_tokens":
                mask[-1] = False
        assert render(messages, ours).loss_mask == mask
