"""Records of many forms to tokens: documents, conversations, preferences.

A record is told by its names:

    text                                           a document
    messages                                       a conversation (OpenAI)
    conversations, of from and value               a conversation (ShareGPT)
    instruction, output, maybe input and system    a conversation (Alpaca)
    prompt, completion                             a conversation, or text that goes on
    chosen, rejected, maybe prompt and edited      a preference

where prompt (in preferences also called conversations), completion, chosen, rejected and edited are
texts or lists of messages. What reads records for training is an encoder, here one for each
purpose; `tokenizing.tokenize` runs it.

    encode = Conversations(tokenizer.load(folder))
    encode({"messages": [{"role": "user", "content": "Hi"}, …]})
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from l4jax.data import tokenizer as tokenizers
from l4jax.data.chat import Message, Rendered, ToolFormat, render
from l4jax.data.tokenizer import Tokenizer

Learn = Literal["assistant", "last", "all"]
Messages = tuple[Message, ...]

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "ipython": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""What writers call the roles."""
_FORMS = (
    "text; messages; conversations; instruction and output; prompt and completion; "
    "chosen and rejected"
)


class Document(NamedTuple):
    """Text without turns."""

    text: str


class Completion(NamedTuple):
    """Text, and how it goes on."""

    prompt: str
    completion: str


class Conversation(NamedTuple):
    """Turns, of which the first `given` are never to be learned."""

    messages: Messages
    given: int = 0


class Preference(NamedTuple):
    """Answers to the same prompt, best first: an edited one if there is one, chosen, rejected.

    All are texts, or all are turns.
    """

    prompt: str | Messages
    answers: tuple[str | Messages, ...]


def normalise(value: Mapping[str, Any]) -> Document | Completion | Conversation | Preference:
    """What a record is, whatever its form.

    Names without a value count as absent: tables have them in every row.

    Raises:
        ValueError: the record has none of the known forms, or is malformed.
    """
    names = {name for name, item in value.items() if item is not None}
    if {"chosen", "rejected"} <= names:
        return _preference(value)
    if "messages" in names:
        return Conversation(_messages(value["messages"], "messages"))
    if "conversations" in names:
        turns = _messages(value["conversations"], "conversations")
        return Conversation((*_system(value), *turns))
    if {"instruction", "output"} <= names:
        return _alpaca(value)
    if {"prompt", "completion"} <= names:
        prompt, completion = value["prompt"], value["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return Completion(prompt, completion)
        given = _turns(prompt, "prompt", "user")
        return Conversation(given + _turns(completion, "completion", "assistant"), len(given))
    if "text" in names:
        return Document(_string(value["text"], "text"))
    seen = ", ".join(sorted(names)) or "none"
    raise ValueError(f"a record with the names {seen}; known are {_FORMS}")


# --- Encoders ------------------------------------------------------------------------------------
Segments = list[Rendered]


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """A tokenizer with settings; goes to other processes as the tokenizer's files."""

    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer."""
        return self.tokenizer.vocab_size

    def settings(self) -> dict[str, Any]:
        """All that decides what comes out, for `meta.json`."""
        fields = dataclasses.fields(self)
        rest = {f.name: getattr(self, f.name) for f in fields if f.name != "tokenizer"}
        return {"encoder": type(self).__name__, **rest}

    def __reduce__(self) -> Any:
        rest = {n: v for n, v in self.settings().items() if n != "encoder"}
        return _revived, (type(self), _files(self.tokenizer), rest)


@dataclasses.dataclass(frozen=True)
class Documents(_Encoder):
    """Encodes documents: begin_of_text, the text, end_of_text. Every token counts.

    Attributes:
        tokenizer: supplies the ids.
        bos: whether to begin with begin_of_text.
        eos: whether to end with end_of_text.
        key: name of the text in a record.

    Raises:
        ValueError: the tokenizer has no such token.
    """

    bos: bool = True
    eos: bool = True
    key: str = "text"

    def __post_init__(self) -> None:
        if self.bos and self.tokenizer.bos_id is None:
            raise ValueError("this tokenizer has no <|begin_of_text|> token; use bos=False")
        if self.eos:
            _end(self.tokenizer)

    def __call__(self, value: Mapping[str, Any]) -> Segments:
        """The document's tokens, nothing if it has no text.

        Raises:
            ValueError: the record is of another kind.
        """
        text = value.get(self.key)
        if text is None:
            raise ValueError(f"a record with the names {', '.join(value)}; wanted is {self.key}")
        if not _string(text, self.key).strip():
            return []
        ids = self.tokenizer.encode(text, bos=self.bos)
        ids += [_end(self.tokenizer)] if self.eos else []
        return [Rendered(ids, [True] * len(ids))]


@dataclasses.dataclass(frozen=True)
class Conversations(_Encoder):
    """Encodes conversations by `chat.render`.

    Attributes:
        tokenizer: supplies the ids and the family's chat format.
        learn: what is to be predicted: what the "assistant" says in all its turns, in its "last"
            one, or "all" tokens of all turns.
        tool_format: how tool calls are written.
        template: False takes prompt and completion as they are, without turns, for base models:
            begin_of_text, prompt, completion, end_of_text. The last two are to be predicted.
    """

    learn: Learn = "assistant"
    tool_format: ToolFormat = "json"
    template: bool = True

    def __post_init__(self) -> None:
        if self.learn not in ("assistant", "last", "all"):
            raise ValueError(f"unknown learn {self.learn!r}; use assistant, last or all")
        if not self.template:
            _end(self.tokenizer)

    def __call__(self, value: Mapping[str, Any]) -> Segments:
        """The conversation's tokens.

        Raises:
            ValueError: the record is of another kind, malformed, or nobody learns from it.
        """
        found = normalise(value)
        if not self.template:
            if not isinstance(found, Completion):
                raise ValueError(f"{_kind(found)}; without a template prompt and completion texts")
            return [_continued(self.tokenizer, *found, everything=self.learn == "all")]
        if isinstance(found, Completion):
            found = _as_turns(found)
        if not isinstance(found, Conversation):
            raise ValueError(f"{_kind(found)}; wanted is a conversation")
        roles = [message.get("role") for message in found.messages]
        if "assistant" not in roles[found.given :]:
            raise ValueError("a conversation without an assistant's turn; nothing is to be learned")
        rendered = render(found.messages, self.tokenizer, tool_format=self.tool_format)
        if self.learn == "all":
            return [Rendered(rendered.tokens, [True] * len(rendered.tokens))]
        given = found.given
        if self.learn == "last":
            given = len(roles) - 1 - roles[::-1].index("assistant")
        return [_unlearned(rendered, found.messages[:given], self.tokenizer, self.tool_format)]


@dataclasses.dataclass(frozen=True)
class Preferences(_Encoder):
    """Encodes preferences: a segment for each answer, best first, the prompt in front of each.

    What the assistant says in the answers is to be predicted, not what it says in the prompt.

    Attributes:
        tokenizer: supplies the ids and the family's chat format.
        edited: whether an edited answer comes first, where there is one, and makes three segments.
        formatting: whether tokens that end a turn are to be predicted. Llama 3's DPO leaves them
            out: both answers have them, and what is pushed up and down at once makes a model repeat
            itself or stop early (Dubey et al. 2024, §4.1.4).
        tool_format: how tool calls are written.
        template: False takes texts as they are, without turns: see `Conversations`.
    """

    edited: bool = False
    formatting: bool = True
    tool_format: ToolFormat = "json"
    template: bool = True

    def __post_init__(self) -> None:
        if not self.template:
            _end(self.tokenizer)

    def __call__(self, value: Mapping[str, Any]) -> Segments:
        """The answers' tokens.

        Raises:
            ValueError: the record is of another kind, malformed, or its answers are the same.
        """
        found = normalise(value)
        if not isinstance(found, Preference):
            raise ValueError(f"{_kind(found)}; wanted are chosen and rejected answers")
        answers = found.answers if self.edited else found.answers[-2:]
        if any(answer in answers[:n] for n, answer in enumerate(answers)):
            raise ValueError("two of the answers are the same; neither is better")
        rendered = [self._answer(found.prompt, answer) for answer in answers]
        return rendered if self.formatting else [self._content(x) for x in rendered]

    def _content(self, rendered: Rendered) -> Rendered:
        """The same tokens, of which special ones are not to be predicted."""
        marks = frozenset(self.tokenizer.special.values())
        pairs = zip(rendered.tokens, rendered.loss_mask, strict=True)
        return Rendered(rendered.tokens, [learned and id not in marks for id, learned in pairs])

    def _answer(self, prompt: str | Messages, answer: str | Messages) -> Rendered:
        if not self.template:
            if not (isinstance(prompt, str) and isinstance(answer, str)):
                raise ValueError("a preference of messages; without a template texts are wanted")
            return _continued(self.tokenizer, prompt, answer)
        before = _turns(prompt, "prompt", "user")
        turns = _turns(answer, "answer", "assistant")
        if not any(message.get("role") == "assistant" for message in turns):
            raise ValueError("an answer without an assistant's turn")
        rendered = render(before + turns, self.tokenizer, tool_format=self.tool_format)
        return _unlearned(rendered, before, self.tokenizer, self.tool_format)


def fingerprint(tokenizer: Tokenizer) -> str:
    """Of a tokenizer's files: equal ones encode alike."""
    digest = hashlib.sha256()
    for name, content in sorted(_files(tokenizer).items()):
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def _revived(kind: type, files: dict[str, bytes], settings: dict[str, Any]) -> _Encoder:
    """An encoder in another process."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (pathlib.Path(folder) / name).write_bytes(content)
        return kind(tokenizers.load(folder), **settings)


def _files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """What `Tokenizer.save` writes, by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return {file.name: file.read_bytes() for file in pathlib.Path(folder).iterdir()}


def _end(tokenizer: Tokenizer) -> int:
    """Id of end_of_text."""
    if "<|end_of_text|>" not in tokenizer.special:
        raise ValueError("this tokenizer has no <|end_of_text|> token; use eos=False or a template")
    return tokenizer.special["<|end_of_text|>"]


def _continued(
    tokenizer: Tokenizer, prompt: str, completion: str, *, everything: bool = False
) -> Rendered:
    """A text and how it goes on, encoded apart, so that the tokens to learn are those of use."""
    before = tokenizer.encode(prompt, bos=tokenizer.bos_id is not None)
    after = [*tokenizer.encode(completion), _end(tokenizer)]
    return Rendered(before + after, [everything] * len(before) + [True] * len(after))


def _unlearned(
    rendered: Rendered, given: Sequence[Message], tokenizer: Tokenizer, tool_format: ToolFormat
) -> Rendered:
    """The same tokens, of which those of the turns given are not to be predicted."""
    # Turns are encoded one by one, so the tokens of the first turns are the first tokens.
    size = len(render(given, tokenizer, tool_format=tool_format).tokens)
    return Rendered(rendered.tokens, [False] * size + rendered.loss_mask[size:])


# --- Reading records -----------------------------------------------------------------------------
def _messages(given: Any, name: str) -> Messages:
    """Messages in the style of OpenAI, from those of OpenAI or ShareGPT; one may stand alone."""
    given = [given] if isinstance(given, Mapping) else given
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(f"{name} is {_short(given)}; expected a list of messages")
    return tuple(_message(message, f"{name}[{n}]") for n, message in enumerate(given))


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is {_short(message)}; expected role and content")
    named = {name: item for name, item in message.items() if item is not None}
    if "role" not in named and "from" not in named:
        seen = ", ".join(sorted(named)) or "no names"
        raise ValueError(f"{where} has {seen}; expected role and content, or from and value")
    theirs = named.get("role", named.get("from"))
    role = _ROLES.get(theirs) if isinstance(theirs, str) else None
    if role is None:
        raise ValueError(f"{where} is of {theirs!r}; known are {', '.join(_ROLES)}")
    content = named.get("content", named.get("value"))
    if theirs == "function_call":
        return {"role": role, "content": "", "tool_calls": _called(content, where)}
    rest = {name: named[name] for name in ("tool_calls", "stop_reason") if named.get(name)}
    return {"role": role, "content": content, **rest}


def _called(content: Any, where: str) -> list[Any]:
    """ShareGPT's calls of tools: one or several, as JSON."""
    try:
        calls = json.loads(content)
    except (TypeError, ValueError):
        raise ValueError(f"{where} calls {_short(content)}, which is no JSON") from None
    return calls if isinstance(calls, list) else [calls]


def _turns(given: Any, name: str, role: str) -> Messages:
    """Messages, or a text as one message."""
    return ({"role": role, "content": given},) if isinstance(given, str) else _messages(given, name)


def _system(value: Mapping[str, Any]) -> Messages:
    text = value.get("system")
    return ({"role": "system", "content": _string(text, "system")},) if text else ()


def _alpaca(value: Mapping[str, Any]) -> Conversation:
    """The input, if any, follows the instruction after a blank line."""
    parts = [_string(value["instruction"], "instruction"), value.get("input") or ""]
    question = "\n\n".join(_string(part, "input") for part in parts if part)
    answer = _string(value["output"], "output")
    asked: Messages = (*_system(value), {"role": "user", "content": question})
    return Conversation((*asked, {"role": "assistant", "content": answer}))


def _as_turns(pair: Completion) -> Conversation:
    asked, answer = {"role": "user", "content": pair.prompt}, pair.completion
    return Conversation((asked, {"role": "assistant", "content": answer}), 1)


def _preference(value: Mapping[str, Any]) -> Preference:
    """Answers after a prompt of their own, or after what whole conversations have in common."""
    names = [name for name in ("edited", "chosen", "rejected") if value.get(name) is not None]
    given = [value[name] for name in names]
    prompt = next((value[n] for n in ("prompt", "conversations") if value.get(n) is not None), None)
    if all(isinstance(item, str) for item in [prompt, *given]):
        return Preference(str(prompt), tuple(given))
    if prompt is None and any(isinstance(item, str) for item in given):
        raise ValueError("chosen and rejected are texts without a prompt; add prompt")
    answers = [_turns(item, name, "assistant") for item, name in zip(given, names, strict=True)]
    before = () if prompt is None else _turns(prompt, "prompt", "user")
    if before and all(_begins(answer, before) for answer in answers):
        answers = [answer[len(before) :] for answer in answers]
    if not before:
        shared = 0
        shortest = min(map(len, answers)) - 1
        while shared < shortest and all(a[shared] == answers[0][shared] for a in answers):
            shared += 1
        before = answers[0][:shared]
        answers = [answer[shared:] for answer in answers]
    return Preference(before, tuple(answers))


def _begins(turns: Messages, before: Messages) -> bool:
    """Whether a conversation has its prompt in it."""
    return len(turns) > len(before) and turns[: len(before)] == before


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_short(value)}; expected a text")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(found: Any) -> str:
    return f"the record is a {type(found).__name__.lower()}"
