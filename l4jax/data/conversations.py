"""Records to tokens for training: encoders, one for each purpose; `tokenizing.tokenize` runs them.

    encode = Conversations(tokenizer.load(folder))
    encode({"messages": [{"role": "user", "content": "Hi"}, …]})

`records` says which forms records may have, `illustrations` how they name images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import l4jax.data.images as pictures
from l4jax.data import illustrations, records
from l4jax.data import tokenizer as tokenizers
from l4jax.data.chat import Message, Rendered, ToolFormat, render
from l4jax.data.images import Settings
from l4jax.data.records import Completion, Conversation, Messages, Preference, normalise
from l4jax.data.tokenizer import Tokenizer

Learn = Literal["assistant", "last", "all"]
Edited = Literal["leave", "replace", "add"]
"""See `Preferences`."""


# --- Encoders ------------------------------------------------------------------------------------
Segments = list[Rendered]


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """A tokenizer with settings; goes to other processes as the tokenizer's files.

    Attributes:
        tokenizer: supplies the ids.
        images: how images become tiles; None for a model that reads text only.
        folder: what paths of images are relative to.
    """

    tokenizer: Tokenizer
    images: Settings | None = dataclasses.field(default=None, kw_only=True)
    folder: str = dataclasses.field(default="", kw_only=True)

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer."""
        return self.tokenizer.vocab_size

    def settings(self) -> dict[str, Any]:
        """All that decides what comes out, for `meta.json`."""
        rest = self._rest()
        if self.images is None:
            del rest["images"], rest["folder"]
        else:
            rest["images"] = dataclasses.asdict(self.images)
        return {"encoder": type(self).__name__, **rest}

    def _rest(self) -> dict[str, Any]:
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if f.name != "tokenizer"}

    def __reduce__(self) -> Any:
        return _revived, (type(self), _files(self.tokenizer), self._rest())

    def _measured(self, value: Mapping[str, Any]) -> Mapping[str, Any]:
        """The record with its images measured.

        Raises:
            ValueError: it has images, which the model does not read, or one cannot be read.
        """
        if self.images is not None:
            return illustrations.measured(value, self.images, self.folder)
        if illustrations.named(value):
            raise ValueError("the record has images, and the model reads text only")
        return value


@dataclasses.dataclass(frozen=True)
class _Turns(_Encoder):
    """What encoders of messages share.

    Attributes:
        tool_format: how tool calls are written.
    """

    tool_format: ToolFormat = dataclasses.field(default="json", kw_only=True)

    def _render(self, messages: Sequence[Message]) -> Rendered:
        return render(messages, self.tokenizer, tool_format=self.tool_format, images=self.images)

    def _unlearned(self, rendered: Rendered, given: Sequence[Message]) -> Rendered:
        """The same tokens, of which those of the turns given are not to be predicted."""
        # Turns are encoded one by one, so the tokens of the first turns are the first tokens.
        size = len(self._render(given).tokens)
        return rendered._replace(loss_mask=[False] * size + rendered.loss_mask[size:])

    def _texts(self, rendered: Rendered) -> list[bool]:
        """Which tokens are no image's."""
        if self.images is None or not rendered.images:
            return [True] * len(rendered.tokens)
        of_images = set(pictures.layout((2, 2), self.tokenizer, self.images.tokens_per_tile))
        return [token not in of_images for token in rendered.tokens]


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
        if illustrations.named(value):
            return [self._illustrated(value)]
        if not records.string(text, self.key).strip():
            return []
        ids = self.tokenizer.encode(text, bos=self.bos)
        ids += [_end(self.tokenizer)] if self.eos else []
        return [Rendered(ids, [True] * len(ids))]

    def _illustrated(self, value: Mapping[str, Any]) -> Rendered:
        """A document with images where `<image>` stands; nobody learns their tokens."""
        if self.images is None:
            raise ValueError("the record has images, and the model reads text only")
        listed = illustrations.beside(value, self.images, self.folder)
        first: Any = self.tokenizer.bos_id
        tokens = [first] if self.bos else []
        mask = [True] * len(tokens)
        for part in illustrations.text(records.string(value[self.key], self.key), listed):
            if isinstance(part, str):
                ids = self.tokenizer.encode(part)
            else:
                ids = pictures.layout(part.grid, self.tokenizer, self.images.tokens_per_tile)
            tokens += ids
            mask += [isinstance(part, str)] * len(ids)
        if self.eos:
            tokens, mask = [*tokens, _end(self.tokenizer)], [*mask, True]
        return Rendered(tokens, mask, tuple(listed))


@dataclasses.dataclass(frozen=True)
class Conversations(_Turns):
    """Encodes conversations by `chat.render`.

    Attributes:
        tokenizer: supplies the ids and the family's chat format.
        learn: what is to be predicted: what the "assistant" says in all its turns, in its "last"
            one, or "all" tokens of all turns.
        template: False takes prompt and completion as they are, without turns, for base models:
            begin_of_text, prompt, completion, end_of_text. The last two are to be predicted.
    """

    learn: Learn = "assistant"
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
        found = normalise(self._measured(value))
        if not self.template:
            if not isinstance(found, Completion):
                raise ValueError(
                    f"{records.kind(found)}; without a template prompt and completion texts"
                )
            return [_continued(self.tokenizer, *found, everything=self.learn == "all")]
        if isinstance(found, Completion):
            found = records.as_turns(found)
        if not isinstance(found, Conversation):
            raise ValueError(f"{records.kind(found)}; wanted is a conversation")
        roles = [message.get("role") for message in found.messages]
        if "assistant" not in roles[found.given :]:
            raise ValueError("a conversation without an assistant's turn; nothing is to be learned")
        rendered = self._render(found.messages)
        if self.learn == "all":
            return [rendered._replace(loss_mask=self._texts(rendered))]
        given = found.given
        if self.learn == "last":
            given = len(roles) - 1 - roles[::-1].index("assistant")
        return [self._unlearned(rendered, found.messages[:given])]


@dataclasses.dataclass(frozen=True)
class Preferences(_Turns):
    """Encodes preferences: a segment for each answer, best first, the prompt in front of each.

    What the assistant says in the answers is to be predicted, not what it says in the prompt.

    Attributes:
        tokenizer: supplies the ids and the family's chat format.
        edited: what becomes of an edited answer, where there is one: it is left out ("leave"),
            takes the place of the chosen one ("replace"), or comes before it and makes three
            segments ("add").
        formatting: whether tokens that end a turn are to be predicted. Llama 3's DPO leaves them
            out: both answers have them, and what is pushed up and down at once makes a model repeat
            itself or stop early (Dubey et al. 2024, §4.1.4).
        template: False takes texts as they are, without turns: see `Conversations`.
    """

    edited: Edited = "leave"
    formatting: bool = True
    template: bool = True

    def __post_init__(self) -> None:
        if not self.template:
            _end(self.tokenizer)

    def __call__(self, value: Mapping[str, Any]) -> Segments:
        """The answers' tokens.

        Raises:
            ValueError: the record is of another kind, malformed, or its answers are the same.
        """
        found = normalise(self._measured(value))
        if not isinstance(found, Preference):
            raise ValueError(f"{records.kind(found)}; wanted are chosen and rejected answers")
        answers = found.answers
        if self.edited != "add":
            chosen = answers[0 if self.edited == "replace" else -2]
            answers = (chosen, answers[-1])
        if any(answer in answers[:n] for n, answer in enumerate(answers)):
            raise ValueError("two of the answers are the same; neither is better")
        rendered = [self._answer(found.prompt, answer) for answer in answers]
        return rendered if self.formatting else [self._content(x) for x in rendered]

    def _content(self, rendered: Rendered) -> Rendered:
        """The same tokens, of which special ones are not to be predicted."""
        marks = frozenset(self.tokenizer.special.values())
        pairs = zip(rendered.tokens, rendered.loss_mask, strict=True)
        return rendered._replace(loss_mask=[learned and id not in marks for id, learned in pairs])

    def _answer(self, prompt: str | Messages, answer: str | Messages) -> Rendered:
        if not self.template:
            if not (isinstance(prompt, str) and isinstance(answer, str)):
                raise ValueError("a preference of messages; without a template texts are wanted")
            return _continued(self.tokenizer, prompt, answer)
        before = records.turns(prompt, "prompt", "user")
        turns = records.turns(answer, "answer", "assistant")
        if not any(message.get("role") == "assistant" for message in turns):
            raise ValueError("an answer without an assistant's turn")
        return self._unlearned(self._render(before + turns), before)


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
