"""Images that records of training data name, read and measured when the records are tokenized.

A message has images among the parts of its content, as `chat.render` takes them. Where a part says
only that an image stands there, as `<image>` in a text does, it is the next one of the record's
`images` (or `image`); where none stands anywhere, they come first in the prompt.

    {"messages": [{"role": "user", "content": [
        {"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is it?"}]}, …]}
    {"messages": [{"role": "user", "content": "<image> What is it?"}, …], "images": ["cat.jpg"]}
    {"prompt": "What is it?", "completion": "A cat.", "images": ["cat.jpg"]}

An image is a path, a data: URL, or, in tables, the bytes of a file, alone or as `datasets` keeps
them: {"bytes": …, "path": …}.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import l4jax.data.images as pictures
from l4jax.data.images import Picture, Settings

_PLACE = re.compile(r"<image>|<\|image\|>")
_PROMPTS = ("messages", "conversations", "prompt")
_ANSWERS = ("completion", "edited", "chosen", "rejected")


def named(value: Mapping[str, Any]) -> list[Any]:
    """The images that a record lists beside its texts."""
    given: Any = next((value[x] for x in ("images", "image") if value.get(x) is not None), [])
    given = [given] if _single(given) or not isinstance(given, Sequence) else given
    return [image for image in given if image is not None and image != ""]


def measured(value: Mapping[str, Any], settings: Settings, folder: str = "") -> dict[str, Any]:
    """The record with all images as `Picture`s, where they stand in its messages.

    Args:
        value: the record.
        settings: how images become tiles.
        folder: what paths are relative to.

    Raises:
        ValueError: an image cannot be read, or the record lists more or fewer than stand in it.
    """
    listed = beside(value, settings, folder)
    found = {name: item for name, item in value.items() if name not in ("images", "image")}
    prompts = [name for name in _PROMPTS if found.get(name) is not None]
    answers = [name for name in _ANSWERS if found.get(name) is not None]
    if listed and not any(_shows(found[name]) for name in (*prompts, *answers)):
        if not prompts:
            raise ValueError("a record with images beside its texts needs messages or a prompt")
        found[prompts[0]] = _in_front(found[prompts[0]], listed)
        listed = []
    waiting = list(listed)
    for name in prompts:
        found[name] = _Filler(waiting, bool(listed), settings, folder, name).turns(found[name])
    most = len(listed) - len(waiting)
    for name in answers:  # of which each is another end of the same conversation
        rest = list(waiting)
        found[name] = _Filler(rest, bool(listed), settings, folder, name).turns(found[name])
        most = max(most, len(listed) - len(rest))
    if most < len(listed):
        raise ValueError(f"the record lists {len(listed)} images, but {most} stand in its messages")
    return found


def text(value: str, listed: Sequence[Picture]) -> list[str | Picture]:
    """The pieces of a text, with images where they stand in it, or else in front.

    Raises:
        ValueError: more or fewer stand in it.
    """
    return pictures.parts(_PLACE.sub(pictures.PLACEHOLDER, value), listed)


def beside(value: Mapping[str, Any], settings: Settings, folder: str = "") -> list[Picture]:
    """The images that a record lists beside its texts, measured; see `measured`."""
    return [_picture(x, settings, folder, f"image {n}") for n, x in enumerate(named(value))]


# --- Where images stand --------------------------------------------------------------------------
def _parts(turns: Any) -> Iterator[Any]:
    """The parts of what messages say; a text alone is what one message says."""
    if isinstance(turns, str):
        yield turns
    for message in [turns] if isinstance(turns, Mapping) else turns if _is_list(turns) else ():
        if isinstance(message, Mapping):
            content = message.get("content", message.get("value"))
            yield from content if _is_list(content) else [content]


def _shows(turns: Any) -> bool:
    """Whether images stand in messages."""
    return any(_is_image(part) or _PLACE.search(_said(part) or "") for part in _parts(turns))


def _in_front(turns: Any, listed: list[Picture]) -> Any:
    """Messages with images at the beginning of what the user says first."""
    parts = [{"type": "image", "image": picture} for picture in listed]
    if isinstance(turns, str):
        return [{"role": "user", "content": [*parts, {"type": "text", "text": turns}]}]
    turns = [turns] if isinstance(turns, Mapping) else list(turns)
    for number, message in enumerate(turns):
        if isinstance(message, Mapping) and message.get("role", message.get("from")) in (
            "user",
            "human",
        ):
            name = "content" if "content" in message else "value"
            content = message.get(name)
            texts: Any = content if _is_list(content) else [{"type": "text", "text": content}]
            turns[number] = {**message, name: [*parts, *texts]}
            return turns
    raise ValueError("a record with images needs a message of the user to put them in")


@dataclasses.dataclass
class _Filler:
    """Puts pictures into messages; those that are not named come from `waiting`, in order.

    listed: whether the record lists images; without, `<image>` in a text is just that.
    """

    waiting: list[Picture]
    listed: bool
    settings: Settings
    folder: str
    where: str

    def turns(self, given: Any) -> Any:
        """Messages, or a text, which becomes one if images stand in it."""
        if isinstance(given, str):
            changed = self.content(given)
            role = "user" if self.where in _PROMPTS else "assistant"
            return given if changed == given else [{"role": role, "content": changed}]
        if isinstance(given, Mapping):
            return self.message(given)
        return [self.message(x) for x in given] if _is_list(given) else given

    def message(self, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        changed = {x: self.content(given[x]) for x in ("content", "value") if x in given}
        return {**given, **changed}

    def content(self, given: Any) -> Any:
        if _is_list(given):
            return [made for part in given for made in self.part(part)]
        if not (isinstance(given, str) and self.listed and _PLACE.search(given)):
            return given
        return self.cut(given)

    def cut(self, given: str) -> list[dict[str, Any]]:
        first, *pieces = _PLACE.split(given)
        made: list[dict[str, Any]] = [{"type": "text", "text": first}]
        for piece in pieces:
            made += [{"type": "image", "image": self.next()}, {"type": "text", "text": piece}]
        return [part for part in made if part.get("text") != ""]

    def part(self, given: Any) -> list[Any]:
        if not _is_image(given):
            text = _said(given)
            return self.cut(text) if self.listed and text and _PLACE.search(text) else [given]
        source = _source(given)
        if source is None:
            return [{"type": "image", "image": self.next()}]
        picture = _picture(source, self.settings, self.folder, self.where)
        return [{"type": "image", "image": picture}]

    def next(self) -> Picture:
        if not self.waiting:
            raise ValueError(f"more images stand in {self.where} than the record lists")
        return self.waiting.pop(0)


def _is_list(given: Any) -> bool:
    return isinstance(given, list | tuple)


def _said(part: Any) -> str | None:
    """The text of a part, or a text itself."""
    text = part.get("text") if isinstance(part, Mapping) else part
    return text if isinstance(text, str) else None


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url")


def _source(part: Mapping[str, Any]) -> Any:
    """What an image is read from, None if the part does not say."""
    source = part.get(part["type"])
    if part["type"] == "image_url" and isinstance(source, Mapping) and "url" in source:
        source = source["url"]
    return source


# --- Reading -------------------------------------------------------------------------------------
def _single(given: Any) -> bool:
    return isinstance(given, str | bytes | bytearray | Mapping | Picture)


def _picture(source: Any, settings: Settings, folder: str, where: str) -> Picture:
    """An image, measured; paths are relative to the folder."""
    if isinstance(source, Picture):
        return source
    if isinstance(source, Mapping):  # as `datasets` keeps it
        source = source.get("bytes") if source.get("bytes") is not None else source.get("path")
    if isinstance(source, str | os.PathLike) and not str(source).startswith("data:"):
        if "://" in str(source):
            pictures.read(source, name=where)  # says that nothing is downloaded
        path = pathlib.Path(folder) / source
        if not path.is_file():
            raise ValueError(f"{where} ({path}): no such file")
        image = pictures.read(path, name=f"{where} ({path})")
        content = path.read_bytes()
    else:
        image = pictures.read(source, name=f"{where} ({pictures.title(source)})")
        content = _content(source)
    fit = pictures.fit(image.height, image.width, settings)
    return Picture(content, fit.grid)


def _content(source: Any) -> bytes:
    """What an image that was read is as a file, without loss."""
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str):
        return base64.b64decode(source.partition(",")[2])
    kept = io.BytesIO()
    pictures.read(source).save(kept, "PNG")
    return kept.getvalue()
