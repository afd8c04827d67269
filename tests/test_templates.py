"""Chat templates: the same text and tokens as `chat.render`, in Jinja and in transformers."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from l4jax.data import tokenizer as tk
from l4jax.data.chat import render
from l4jax.data.templates import chat_template

sandbox = pytest.importorskip("jinja2.sandbox", reason="pip install l4jax[parity]")
exceptions = pytest.importorskip("jinja2.exceptions")

Message = dict[str, Any]
Template = Callable[..., str]

WORDS = [
    "Hello",
    "world",
    "naïve",
    "你好",
    "🎉",
    "12345",
    "def f(x):",
    "don't",
    "Zürich",
    "e\u0301",
]
# No text here begins with a line break, so that none shares a token with the header before it.
TEXTS = [
    "",
    " ",
    "  padded \n",
    "a\n\nb ",
    "{{ bos }} {% if %}",
    '"quoted" \\ <b>&amp;</b>',
    "\x00",
]
CALLS: list[Message] = [
    {"name": "get_weather", "arguments": {"city": "Zürich", "days": 3, "metric": True}},
    {"name": "list_files", "arguments": {}},
    {"name": "plot", "arguments": {"x": [1, 2.5, -3], "title": "日本 <&'\"", "grid": None}},
    {"name": "brave_search", "arguments": {"query": "news 🎉 today"}},
    {"name": "wolfram_alpha", "arguments": {"query": "2^64"}},
    {"name": "code_interpreter", "arguments": {"code": "import os\nprint(os.getcwd())\n"}},
]
USER: Message = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module", params=["llama3", "llama4"])
def family(request: pytest.FixtureRequest) -> tk.Family:
    """Each family in turn."""
    return request.param


@pytest.fixture(scope="module")
def tok(family: tk.Family) -> tk.Tokenizer:
    """A small tokenizer."""
    return tk.train([*WORDS, *TEXTS, json.dumps(CALLS)] * 3, vocab_size=400, family=family)


def compiled(family: tk.Family, *, blocks: bool = True) -> Template:
    """The template as transformers sets Jinja up, or with the tags' own white space control."""

    def raise_exception(message: str) -> None:
        raise exceptions.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii)

    env = sandbox.ImmutableSandboxedEnvironment(trim_blocks=blocks, lstrip_blocks=blocks)
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    return env.from_string(chat_template(family)).render


@pytest.fixture(scope="module")
def template(family: tk.Family) -> Template:
    """The family's template."""
    return compiled(family)


def content(rng: random.Random) -> str | list[dict[str, str]]:
    """A text, or text parts that tokens do not span."""
    pick = rng.choice([rng.choice(TEXTS), " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))])
    if rng.random() < 0.7:
        return pick
    parts = [pick.strip(), *(" " + rng.choice(WORDS) for _ in range(2))]
    return [{"type": "text", "text": text} for text in parts]


def conversation(seed: int, *, tools: bool = True) -> list[Message]:
    """A random conversation of up to four rounds, with tools here and there."""
    rng = random.Random(seed)
    messages: list[Message] = [{"role": "system", "content": content(rng)}] if seed % 2 else []
    for _ in range(rng.randint(0, 4)):
        messages.append({"role": "user", "content": content(rng)})
        answer: Message = {"role": "assistant", "content": content(rng)}
        answer["stop_reason"] = rng.choice([None, "end_of_turn", "end_of_message", "out_of_tokens"])
        if tools and rng.random() < 0.5:
            # Text right before a call, or two calls in a row, may share a token where they meet.
            call = rng.choice(CALLS)
            nested = {"id": "0", "type": "function", "function": call}
            answer |= {
                "content": rng.choice(["", None]),
                "tool_calls": [rng.choice([call, nested])],
            }
            role = rng.choice(["tool", "ipython"])
            messages += [answer, {"role": role, "content": content(rng)}]
        else:
            messages.append(answer)
    return messages


# --- The same as chat.render ---------------------------------------------------------------------
def test_token_for_token(tok: tk.Tokenizer, template: Template) -> None:
    for seed in range(50):
        for prompt in (False, True):
            messages = conversation(seed)
            text = template(messages=messages, add_generation_prompt=prompt)
            expected = render(messages, tok, add_generation_prompt=prompt).tokens
            assert tok.encode(text, allow_special=True) == expected, messages
            assert expected.count(tok.bos_id) == 1


@pytest.mark.parametrize("first", ["\n", "\n\nb", " \n ", "\r\n", "<|eot|>", "<|eot_id|>"])
def test_other_content_is_the_same_text(tok: tk.Tokenizer, template: Template, first: str) -> None:
    """Where tokens can span parts or be forged, the text is still the same."""
    messages = [
        USER | {"content": first},
        {"role": "assistant", "content": [{"type": "text", "text": t} for t in (first, "a", "b")]},
        {"role": "assistant", "content": first + "x", "tool_calls": CALLS},
        {"role": "tool", "content": first},
    ]
    assert template(messages=messages) == tok.decode(render(messages, tok).tokens)


def test_code_is_tagged_in_llama3_only(family: tk.Family, template: Template) -> None:
    message = {"role": "assistant", "content": "x", "tool_calls": [CALLS[-1], CALLS[1]]}
    text = template(messages=[message])
    assert ("<|python_tag|>ximport os" in text) == (family == "llama3")


def test_without_messages(template: Template) -> None:
    assert template(messages=[]) == "<|begin_of_text|>"


def test_white_space_control_does_not_matter(family: tk.Family, template: Template) -> None:
    for seed in range(20):
        messages = conversation(seed)
        assert compiled(family, blocks=False)(messages=messages) == template(messages=messages)


# --- Images --------------------------------------------------------------------------------------
def test_images(family: tk.Family, template: Template) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}, {"type": "image"}]
    messages = [{"role": "user", "content": parts}]
    if family == "llama4":
        text = template(messages=messages)
        assert text.endswith("user<|header_end|>\n\n<|image|>What is this?<|image|><|eot|>")
    else:
        with pytest.raises(exceptions.TemplateError, match="message 0: .*reads text only"):
            template(messages=messages)


# --- What is refused -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "bot", "content": "a"}, "message 1: role 'bot' is not one of system, user"),
        ({"content": "a"}, "message 1: role '' is not one of"),
        ({"role": "user"}, "content must be a string or a list"),
        ({"role": "user", "content": None}, "content must be a string or a list"),
        ({"role": "user", "content": 3}, "content must be a string or a list"),
        ({"role": "user", "content": {"text": "a"}}, "content must be a string or a list"),
        ({"role": "user", "content": ["a"]}, "message 1: a part of the content is neither text"),
        ({"role": "user", "content": [{"type": "text"}]}, "part of the content is neither"),
        ({"role": "user", "content": [{"type": "audio"}]}, "part of the content is neither"),
        ({"role": "user", "content": "a", "tool_calls": [CALLS[0]]}, "only the assistant makes"),
        ({"role": "assistant", "content": "a", "stop_reason": "done"}, "'done' is unknown"),
        ({"role": "assistant", "tool_calls": ["f"]}, "a tool call needs a name"),
        ({"role": "assistant", "tool_calls": [{"name": "f"}]}, "arguments as a dictionary"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]},
            "arguments as a dictionary",
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "photogen", "arguments": {}}]},
            "photogen needs a text argument 'query'",
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "code_interpreter", "arguments": {}}]},
            "needs a text argument 'code'",
        ),
    ],
)
def test_malformed_messages(message: Message, problem: str, template: Template) -> None:
    with pytest.raises(exceptions.TemplateError, match=problem):
        template(messages=[USER, message])


def test_tool_definitions_are_refused(template: Template) -> None:
    with pytest.raises(exceptions.TemplateError, match="describe the tools in the system message"):
        template(messages=[USER], tools=[{"name": "f"}])
    assert template(messages=[USER], tools=[]) == template(messages=[USER], tools=None)


# --- transformers --------------------------------------------------------------------------------
@pytest.mark.parity
def test_transformers(tok: tk.Tokenizer, family: tk.Family, tmp_path: Path) -> None:
    """A tokenizer saved with the template makes the same tokens of the same messages."""
    transformers = pytest.importorskip("transformers", reason="pip install l4jax[parity]")
    tok.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(chat_template(family), encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for seed in range(50):
        for prompt in (False, True):
            messages = conversation(seed, tools=seed % 3 == 0) or [USER]
            got = theirs.apply_chat_template(messages, add_generation_prompt=prompt)
            expected = render(messages, tok, add_generation_prompt=prompt).tokens
            assert got["input_ids"] == expected, messages
    with pytest.raises(exceptions.TemplateError, match="no tool definitions"):
        theirs.apply_chat_template([USER], tools=[{"type": "function", "function": {"name": "f"}}])
