"""Records of many forms as one of four kinds.

A record is told by its names:

    text                                           a document
    messages                                       a conversation (OpenAI)
    conversations, of from and value               a conversation (ShareGPT)
    instruction, output, maybe input and system    a conversation (Alpaca)
    prompt, completion                             a conversation, or text that goes on
    chosen, rejected, maybe prompt and edited      a preference

where prompt (in preferences also called conversations), completion, chosen, rejected and edited are
texts or lists of messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from l4jax.data.chat import Message

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
        said = _messages(value["conversations"], "conversations")
        return Conversation((*_system(value), *said))
    if {"instruction", "output"} <= names:
        return _alpaca(value)
    if {"prompt", "completion"} <= names:
        prompt, completion = value["prompt"], value["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return Completion(prompt, completion)
        given = turns(prompt, "prompt", "user")
        return Conversation(given + turns(completion, "completion", "assistant"), len(given))
    if "text" in names:
        return Document(string(value["text"], "text"))
    seen = ", ".join(sorted(names)) or "none"
    raise ValueError(f"a record with the names {seen}; known are {_FORMS}")


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


def turns(given: Any, name: str, role: str) -> Messages:
    """Messages, or a text as one message."""
    return ({"role": role, "content": given},) if isinstance(given, str) else _messages(given, name)


def _system(value: Mapping[str, Any]) -> Messages:
    text = value.get("system")
    return ({"role": "system", "content": string(text, "system")},) if text else ()


def _alpaca(value: Mapping[str, Any]) -> Conversation:
    """The input, if any, follows the instruction after a blank line."""
    parts = [string(value["instruction"], "instruction"), value.get("input") or ""]
    question = "\n\n".join(string(part, "input") for part in parts if part)
    answer = string(value["output"], "output")
    asked: Messages = (*_system(value), {"role": "user", "content": question})
    return Conversation((*asked, {"role": "assistant", "content": answer}))


def as_turns(pair: Completion) -> Conversation:
    """A text and how it goes on as a question and its answer."""
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
    answers = [turns(item, name, "assistant") for item, name in zip(given, names, strict=True)]
    before = () if prompt is None else turns(prompt, "prompt", "user")
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


def string(value: Any, name: str) -> str:
    """The value; a ValueError if it is no text."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_short(value)}; expected a text")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def kind(found: Any) -> str:
    """What a record is, in words."""
    return f"the record is a {type(found).__name__.lower()}"
