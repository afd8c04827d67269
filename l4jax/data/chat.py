r"""Conversations as token ids, the way Llama 3 and Llama 4 saw them in training.

A message is a dictionary in the OpenAI style: "role", "content" (a string, or a list of parts that
are text or images) and, for the assistant, "tool_calls" and "stop_reason". Each becomes a turn

    <|header_start|> role <|header_end|> \n\n  content  <|eot|>

(Llama 3: start_header_id, end_header_id, eot_id) after one begin_of_text. Content is encoded as it
stands, unstripped, and special names inside it stay text; an image becomes the tokens of
`images.layout` where it stands. The tokens follow the chat formats of Meta's `llama-models`
package; where `<|eom|>` ends a turn differs between the families, see `_ends_message`.

    rendered = render([{"role": "user", "content": "Hi"}], tok, add_generation_prompt=True)
    parts = [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is it?"}]
    rendered = render([{"role": "user", "content": parts}], tok, images=images.Settings())
"""

import json
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import l4jax.data.images as pictures
from l4jax.data.tokenizer import Family, Tokenizer

Message = Mapping[str, Any]
ToolFormat = Literal["json", "function_tag", "python_list"]

# What a role is called in its header; tool results come from "ipython", whatever the tool.
_HEADERS = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "ipython",
    "ipython": "ipython",
}
_STOP_REASONS = ("end_of_turn", "end_of_message", "out_of_tokens")
_SEARCHES = ("brave_search", "wolfram_alpha", "photogen")


class Rendered(NamedTuple):
    """A conversation as tokens.

    Attributes:
        tokens: Token ids, begin_of_text first.
        loss_mask: One flag per token, True on what the assistant must produce: its content, its
            tool calls and the eot or eom that closes them, but never a header or an image.
        images: The images in the order of their tokens, as `images.Tiled`, but those that are given
            as `images.Picture` as they are.
    """

    tokens: list[int]
    loss_mask: list[bool]
    images: tuple[Any, ...] = ()


class _Marks(NamedTuple):
    """The special tokens that structure a chat, by name."""

    header_start: str
    header_end: str
    eom: str
    eot: str


_MARKS: dict[Family, _Marks] = {
    "llama3": _Marks("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
    "llama4": _Marks("<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>"),
}


class _Call(NamedTuple):
    """One tool call of the assistant."""

    name: str
    arguments: dict[str, Any]


class _Image(NamedTuple):
    """An image in a message: what it is read from, and where it stands."""

    source: Any
    where: str


class _Turn(NamedTuple):
    """A message as it was read."""

    role: str
    reason: str | None
    contents: list[str | _Image]
    calls: list[_Call]


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = False,
    style: Family | None = None,
    tool_format: ToolFormat = "json",
    images: pictures.Settings | None = None,
) -> Rendered:
    """Tokens of a conversation, with the mask of those to learn.

    Args:
        messages: The turns, oldest first. A message has a "role" (system, user, assistant, tool or
            ipython) and "content"; an assistant message may have "tool_calls" ({"name",
            "arguments"}, also nested under "function", arguments as a dictionary or its JSON) and
            a "stop_reason" (end_of_turn, end_of_message or out_of_tokens). Parts of a content are
            {"type": "text", "text": ...}, {"type": "image", "image": ...} with anything that
            `images.read` takes, and {"type": "image_url", "image_url": {"url": ...}} with a data:
            URL or a path: a server must not pass on paths, which name its own files.
        tokenizer: Supplies the ids, and the family unless `style` does.
        add_generation_prompt: Whether to end with the header of the assistant's next turn.
        style: The family whose format to use; the tokenizer's own by default.
        tool_format: How tool calls are written: "json" objects, "function_tag" elements, or a
            "python_list" of calls.
        images: How images become tiles; None for a model that reads text only.

    Raises:
        ValueError: If a message is malformed (the text names its index), an image cannot be read or
            no `images` are given for it, the style is unknown or absent, or the tokenizer lacks a
            special token of the style.
    """
    style = tokenizer.family if style is None else style
    if style not in _MARKS:
        known = " or ".join(_MARKS)
        raise ValueError(f"chat style {style!r} is unknown; pass style= as {known}")
    if tool_format not in get_args(ToolFormat):
        known = ", ".join(get_args(ToolFormat))
        raise ValueError(f"unknown tool_format {tool_format!r}; use one of {known}")
    turns = [_turn(x, index, text_only=images is None) for index, x in enumerate(messages)]
    settings = images or pictures.Settings()
    tiled = _tiled(turns, settings)
    layouts = [pictures.layout(x.grid, tokenizer, settings.tokens_per_tile) for x in tiled]
    writer = _Writer(tokenizer, style, layouts)
    writer.mark("<|begin_of_text|>")
    for index, turn in enumerate(turns):
        _write_turn(writer, turn, index=index, tool_format=tool_format)
    if add_generation_prompt:
        writer.header("assistant")
    return Rendered(writer.tokens, writer.loss_mask, tiled)


def _tiled(
    turns: Sequence[_Turn], settings: pictures.Settings
) -> tuple[pictures.Tiled | pictures.Picture, ...]:
    """The images of all turns; they are worked on together, unless they are to be cut later."""
    found = [part for turn in turns for part in turn.contents if isinstance(part, _Image)]
    cut = [part for part in found if not isinstance(part.source, pictures.Picture)]
    names = [f"{part.where} ({pictures.title(part.source)})" for part in cut]
    tiled = iter(pictures.process([part.source for part in cut], settings, names=names))
    return tuple(
        part.source if isinstance(part.source, pictures.Picture) else next(tiled) for part in found
    )


class _Writer:
    """Collects tokens and their mask; every piece of text is encoded on its own, as Meta does."""

    def __init__(self, tokenizer: Tokenizer, style: Family, layouts: list[list[int]]) -> None:
        self.style = style
        self.marks = _MARKS[style]
        self.tokens: list[int] = []
        self.loss_mask: list[bool] = []
        self._tokenizer = tokenizer
        self._layouts = iter(layouts)

    def mark(self, name: str, *, learn: bool = False) -> None:
        """Appends one special token."""
        if name not in self._tokenizer.special:
            raise ValueError(
                f"the tokenizer has no {name}, which the {self.style} chat style needs; "
                f"its own family is {self._tokenizer.family}"
            )
        self.tokens.append(self._tokenizer.special[name])
        self.loss_mask.append(learn)

    def text(self, text: str, *, learn: bool = False) -> None:
        """Appends plain text."""
        ids = self._tokenizer.encode(text)
        self.tokens += ids
        self.loss_mask += [learn] * len(ids)

    def image(self) -> None:
        """Appends the tokens of the next image, which nobody is to learn."""
        ids = next(self._layouts)
        self.tokens += ids
        self.loss_mask += [False] * len(ids)

    def header(self, role: str) -> None:
        """Appends the header that opens a turn."""
        self.mark(self.marks.header_start)
        self.text(_HEADERS[role])
        self.mark(self.marks.header_end)
        self.text("\n\n")


def _write_turn(writer: _Writer, turn: _Turn, *, index: int, tool_format: ToolFormat) -> None:
    """Appends one turn."""
    calls, learn = turn.calls, turn.role == "assistant"
    writer.header(turn.role)
    if writer.style == "llama3" and calls and calls[0].name == "code_interpreter":
        writer.mark("<|python_tag|>", learn=learn)
    for content in (*turn.contents, *_call_texts(calls, index, tool_format)):
        if isinstance(content, str):
            writer.text(content, learn=learn)
        else:
            writer.image()
    eom = _ends_message(writer.style, turn.role, turn.reason, calls)
    # A turn that ran out of tokens is closed for whoever reads on, but its author did not close it.
    closed = turn.reason != "out_of_tokens"
    writer.mark(writer.marks.eom if eom else writer.marks.eot, learn=learn and closed)


def _ends_message(style: Family, role: str, reason: str | None, calls: list[_Call]) -> bool:
    """Whether a turn ends with eom (more follows before the user's turn) rather than eot.

    In both families when the assistant stopped for that reason. Llama 4 also ends so every turn
    that calls tools and every tool result.
    """
    if role == "assistant":
        return reason == "end_of_message" or (style == "llama4" and bool(calls))
    return style == "llama4" and _HEADERS[role] == "ipython"


# --- Reading messages ----------------------------------------------------------------------------
def read(file: str | os.PathLike[str]) -> list[Message]:
    """The conversation in a JSON file: a list of messages, or an object that has it as "messages".

    Messages are as `render` takes them, which checks them. Paths of images are relative to the
    file's folder, and come back as paths from here.

    Args:
        file: "-" reads standard input, where paths are relative to the current folder.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, holds no messages or something beside them, or the assistant
            has the last word, so that nothing is to be answered.
    """
    name = "standard input" if file == "-" else os.fspath(file)
    try:
        content = sys.stdin.buffer.read() if file == "-" else pathlib.Path(file).read_bytes()
    except OSError as error:
        raise type(error)(f"{name}: {error.strerror or error}") from None
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON ({error})") from None
    if isinstance(found, dict) and "messages" in found:
        others = ", ".join(key for key in found if key != "messages")
        if others:
            raise ValueError(f"{name} says {others} beside its messages, which is not read")
        found = found["messages"]
    if not isinstance(found, list) or not found:
        raise ValueError(f'{name} holds no messages; use [...] or {{"messages": [...]}}')
    if isinstance(found[-1], dict) and found[-1].get("role") == "assistant":
        raise ValueError(f"{name}: the last message is the assistant's; end with one to answer")
    for number, message in enumerate(found):
        if not isinstance(message, dict):
            raise ValueError(f'{name}: message {number} is {message!r}; use {{"role": ...}}')
    folder = pathlib.Path() if file == "-" else pathlib.Path(file).parent
    return [_located(message, folder) for message in found]


def _located(message: Message, folder: pathlib.Path) -> Message:
    """A message with its images' paths taken from a folder; what is malformed is as it was."""
    if not isinstance(message.get("content"), list):
        return message
    return {**message, "content": [_located_part(part, folder) for part in message["content"]]}


def _located_part(part: Any, folder: pathlib.Path) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    source = _source(part, kind) if kind in ("image", "image_url") else None
    if not isinstance(source, str) or _URL.match(source):
        return part
    return {"type": "image", "image": str(folder / source)}


_URL = re.compile(r"data:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def _source(part: Mapping[str, Any], kind: str) -> Any:
    """What the image of a part is read from."""
    source = part.get(kind)
    return source.get("url") if kind == "image_url" and isinstance(source, Mapping) else source


def _turn(message: Any, index: int, *, text_only: bool) -> _Turn:
    role, reason = _role(message, index), _stop_reason(message, index)
    calls = _tool_calls(message, role, index)
    contents = _contents(message, index, optional=bool(calls))
    image = next((part for part in contents if isinstance(part, _Image)), None)
    if image is not None and text_only:
        raise ValueError(
            f"{image.where} is an image; images need the vision model, this is text only"
        )
    return _Turn(role, reason, contents, calls)


def _role(message: Any, index: int) -> str:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {index} is {message!r}; expected a dictionary with a role")
    role = message.get("role")
    if not isinstance(role, str) or role not in _HEADERS:
        raise ValueError(f"message {index} has role {role!r}; use one of {', '.join(_HEADERS)}")
    return role


def _stop_reason(message: Message, index: int) -> str | None:
    reason = message.get("stop_reason")
    if reason is not None and reason not in _STOP_REASONS:
        known = ", ".join(_STOP_REASONS)
        raise ValueError(f"message {index} has stop_reason {reason!r}; use one of {known}, or none")
    return reason


def _contents(message: Message, index: int, *, optional: bool) -> list[str | _Image]:
    """The parts of a message; a missing content is no part where it is `optional`."""
    content = message.get("content")
    if content is None:
        if optional:
            return []
        raise ValueError(f"message {index} ({message['role']}) has no content; an empty one is ''")
    if isinstance(content, str):
        return [content]
    if not isinstance(content, (list, tuple)):
        raise ValueError(
            f"message {index} has content {content!r}; use a string or a list of parts"
        )
    return [_part(part, f"message {index}, part {n}") for n, part in enumerate(content)]


def _part(part: Any, where: str) -> str | _Image:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("image", "image_url"):
        return _Image(_source(part, kind), where)
    text = part.get("text") if kind == "text" else None
    if not isinstance(text, str):
        raise ValueError(
            f'{where} is {part!r}; expected {{"type": "text", "text": "..."}}, or an image'
        )
    return text


def _tool_calls(message: Message, role: str, index: int) -> list[_Call]:
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ValueError(f"message {index} has tool_calls {calls!r}; expected a list")
    if calls and role != "assistant":
        raise ValueError(f"message {index} ({role}) has tool_calls; only the assistant makes them")
    return [_call(call, f"message {index}, tool call {n}") for n, call in enumerate(calls)]


def _call(call: Any, where: str) -> _Call:
    """A call given flat or nested under "function", its arguments as a dictionary or as JSON."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise ValueError(f"{where} is {call!r}; expected a dictionary with name and arguments")
    given = inner.get("arguments")
    arguments = given
    if isinstance(given, str):
        try:
            arguments = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: arguments {given!r} are not JSON ({error})") from None
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}: arguments are {given!r}; expected a dictionary or its JSON")
    return _Call(inner["name"], dict(arguments))


# --- Writing tool calls --------------------------------------------------------------------------
def _call_texts(calls: list[_Call], index: int, tool_format: ToolFormat) -> list[str]:
    """What the assistant writes to make `calls`, in parts to encode one by one.

    Llama 3.1's built-in tools have a form of their own, whatever the format. Other calls in a row
    share one list in the "python_list" format, as the models are told to answer.
    """
    texts: list[str] = []
    listed: list[str] = []
    for n, call in enumerate(calls):
        builtin = _builtin(call, f"message {index}, tool call {n}")
        if tool_format == "python_list" and builtin is None:
            listed.append(_python_call(call))
            continue
        if listed:
            texts.append(f"[{', '.join(listed)}]")
            listed = []
        texts.append(_marked_up(call, tool_format) if builtin is None else builtin)
    return [*texts, f"[{', '.join(listed)}]"] if listed else texts


def _builtin(call: _Call, where: str) -> str | None:
    """Text of a call to a built-in tool: a search expression or bare code; None for other tools."""
    if call.name != "code_interpreter" and call.name not in _SEARCHES:
        return None
    key = "code" if call.name == "code_interpreter" else "query"
    value = call.arguments.get(key)
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: built-in tool {call.name} needs a text argument {key!r}, "
            f"but got {call.arguments!r}"
        )
    return value if key == "code" else f'{call.name}.call(query="{value}")'


def _marked_up(call: _Call, tool_format: ToolFormat) -> str:
    if tool_format == "function_tag":
        return f"<function={call.name}>{json.dumps(call.arguments)}</function>"
    return json.dumps({"type": "function", "name": call.name, "parameters": call.arguments})


def _python_call(call: _Call) -> str:
    arguments = ", ".join(f"{name}={_python(value)}" for name, value in call.arguments.items())
    return f"{call.name}({arguments})"


def _python(value: Any) -> str:
    """`value` as a Python literal, strings in double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # a JSON string is a Python string too
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_python, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_python(k)}: {_python(v)}" for k, v in value.items()) + "}"
    return str(value)
