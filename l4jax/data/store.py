"""Tokenized data on disk: written once, then read at any place.

A store is a folder. Everything downstream (shuffling, mixing, packing, sharding, resuming) works on
places in it, so none of that needs the texts again.

    tokens.bin      int32, all examples one after another
    loss_mask.bin   bool, as many; absent where every token counts
    offsets.npy     int64: where each segment begins, and the end
    examples.npy    int64: the first segment of each example, and the end; absent where each has one
    images.bin      files of images, one after another; absent where there are none, as the next
    images.npz      int64: where each begins, and the end; the grid of its tiles; the first of each
                    example, and the end; which of an example's images stands at each of its
                    places, and the first place of each example, and the end
    meta.json       what it was made from, with which tokenizer and settings, and what came of it
    report.json     how many records were read, kept and left out, and why

An example is one segment (a document, a conversation) or several that stay together: the chosen and
the rejected answer of a preference, best first. `tokenizing.tokenize` makes stores.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from l4jax.data.images import Picture

FORMAT = 1
"""Of the folder; another one is made anew."""


class Example(NamedTuple):
    """One or more segments that stay together.

    Attributes:
        tokens: Int32[t], of all segments one after another.
        loss_mask: Bool[t], True on tokens to be predicted; None where all are.
        offsets: Int64[s + 1], where each segment begins in `tokens`, and the end.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray | None
    offsets: np.ndarray


class Store:
    """A folder made by `tokenizing.tokenize`, opened without reading its tokens.

    Attributes:
        folder: where it is.
        meta: content of its meta.json.
        lengths: Int64[n], tokens of each example.
        segments: Int64[n], segments of each example.
        tiles: Int64[n], tiles of each example's images, each image counted once.
        most_segments: the most that an example has.
        has_mask: whether it says which tokens are to be predicted.

    Raises:
        FileNotFoundError: no store is there.
        ValueError: it is damaged, or of another format.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = pathlib.Path(folder)
        self.meta = _meta(self.folder)
        self._offsets = np.load(self.folder / "offsets.npy", mmap_mode="r").view(np.ndarray)
        self._examples = None
        if (self.folder / "examples.npy").exists():
            self._examples = np.load(self.folder / "examples.npy", mmap_mode="r").view(np.ndarray)
        self._tokens = _mapped(self.folder / "tokens.bin", np.int32, int(self._offsets[-1]))
        self.has_mask = (self.folder / "loss_mask.bin").exists()
        self._mask = None
        if self.has_mask:
            self._mask = _mapped(self.folder / "loss_mask.bin", np.bool_, len(self._tokens))
        ends = self._offsets if self._examples is None else self._offsets[self._examples]
        self.lengths = np.diff(ends)
        self.segments = (
            np.ones_like(self.lengths) if self._examples is None else np.diff(self._examples)
        )
        self.most_segments = int(self.segments.max())
        self.tiles = np.zeros_like(self.lengths)
        self._images: dict[str, np.ndarray] | None = None
        if (self.folder / "images.npz").exists():
            with np.load(self.folder / "images.npz") as found:
                self._images = dict(found)
            size = int(self._images["offsets"][-1])
            self._content = _mapped(self.folder / "images.bin", np.uint8, size)
            tiles = self._images["grids"].prod(axis=1)
            self._counts = tiles + (tiles > 1)
            before = np.concatenate([[0], np.cumsum(self._counts)])
            self.tiles = np.diff(before[self._images["examples"]])

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return f"Store({str(self.folder)!r})"

    def __reduce__(self) -> Any:
        return Store, (self.folder,)

    def __getitem__(self, number: int) -> Example:
        """An example.

        Raises:
            IndexError: the store has no such example.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"{self!r} has no example {number}; it has {len(self)}")
        size = int(self.lengths[number])
        return Example(
            self.tokens(number, 0, size),
            self.loss_mask(number, 0, size),
            np.concatenate([[0], self.ends(number)]),
        )

    def tokens(self, number: int, start: int, stop: int) -> np.ndarray:
        """Tokens of an example from `start` to `stop`, Int32[stop - start]."""
        first = self._first(number)
        return self._tokens[first + start : first + stop]

    def loss_mask(self, number: int, start: int, stop: int) -> np.ndarray | None:
        """Which tokens from `start` to `stop` are to be predicted; None where all are."""
        first = self._first(number)
        return None if self._mask is None else self._mask[first + start : first + stop]

    def ends(self, number: int) -> np.ndarray:
        """Where each segment of an example ends, counted from the example's start, Int64[s]."""
        if self._examples is None:
            return self.lengths[number : number + 1]
        first, last = (int(n) for n in self._examples[number : number + 2])
        return self._offsets[first + 1 : last + 1] - self._offsets[first]

    def pictures(self, number: int) -> list[Picture]:
        """The images of an example, each once, in the order in which its tokens first ask."""
        if self._images is None:
            return []
        offsets, grids = self._images["offsets"], self._images["grids"]
        first, last = self._images["examples"][number : number + 2]
        return [
            Picture(self._content[offsets[n] : offsets[n + 1]].tobytes(), tuple(grids[n].tolist()))
            for n in range(first, last)
        ]

    def asked(self, number: int) -> np.ndarray:
        """Which of the example's tiles its tokens ask for, in order, Int64[n]; one maybe often."""
        if self._images is None:
            return np.zeros(0, np.int64)
        first, last = self._images["examples"][number : number + 2]
        counts, order = self._counts[first:last], np.arange(last - first)
        if "order" in self._images:  # earlier stores have an image as often as it stands somewhere
            first, last = self._images["places"][number : number + 2]
            order = self._images["order"][first:last]
        return _asked(counts, order)

    def require(self, *, vocab_size: int | None = None, tokenizer: str | None = None) -> None:
        """Checks that a model can read this store.

        Args:
            vocab_size: of the model.
            tokenizer: fingerprint of the model's tokenizer, see `conversations.fingerprint`.

        Raises:
            ValueError: a token is outside the vocabulary, or another tokenizer made the store.
        """
        largest = self.meta["largest_token"]
        if vocab_size is not None and largest >= vocab_size:
            raise ValueError(
                f"{self!r} has token {largest}, but the model's vocabulary ends at "
                f"{vocab_size - 1}; tokenize with the model's tokenizer"
            )
        if tokenizer is not None and tokenizer != self.meta["tokenizer"]:
            raise ValueError(
                f"{self!r} was made with tokenizer {self.meta['tokenizer']}, not {tokenizer}; "
                "tokenize again with this one"
            )

    def _first(self, number: int) -> int:
        """The example's first token in the file."""
        return int(self._offsets[number if self._examples is None else self._examples[number]])


class MemoryStore:
    """A store of lists, for tests and small data.

    Args:
        examples: token ids of each, or several lists of them where an example has segments.
        loss_masks: of the same form; None where every token counts.
        pictures: the images of each, in the order of its tokens; None where there are none.

    Raises:
        ValueError: a mask does not fit its example.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        loss_masks: Sequence[Any] | None = None,
        pictures: Sequence[Sequence[Picture]] | None = None,
    ) -> None:
        nested = [_is_nested(example) for example in examples]
        self._examples = [_joined(x) if n else x for x, n in zip(examples, nested, strict=True)]
        self._ends = [
            np.cumsum([len(part) for part in x] if n else [len(x)])
            for x, n in zip(examples, nested, strict=True)
        ]
        self.lengths = np.array([len(example) for example in self._examples], np.int64)
        self.segments = np.array([len(ends) for ends in self._ends], np.int64)
        self.most_segments = int(self.segments.max(initial=0))
        found = [()] * len(self) if pictures is None else pictures
        parts = [distinct(pictures) for pictures in found]
        self._pictures, self._order = [x for x, _ in parts], [x for _, x in parts]
        tiles = [sum(picture.tiles for picture in found) for found in self._pictures]
        self.tiles = np.array(tiles, np.int64)
        self.has_mask = loss_masks is not None
        self._masks = None
        if loss_masks is not None:
            self._masks = [
                np.asarray(_joined(x) if n else x, np.bool_)
                for x, n in zip(loss_masks, nested, strict=True)
            ]
            for number, mask in enumerate(self._masks):
                if len(mask) != self.lengths[number]:
                    raise ValueError(
                        f"example {number} has {self.lengths[number]} tokens, but a loss mask of "
                        f"{len(mask)}"
                    )

    def __len__(self) -> int:
        return len(self._examples)

    def __repr__(self) -> str:
        return f"MemoryStore of {len(self)}"

    def __getitem__(self, number: int) -> Example:
        """An example."""
        size = len(self._examples[number])
        return Example(
            self.tokens(number, 0, size),
            self.loss_mask(number, 0, size),
            np.concatenate([[0], self._ends[number]]),
        )

    @property
    def meta(self) -> dict[str, Any]:
        """As a `Store` has it, of this content."""
        digest = hashlib.sha256()
        for example in self._examples:
            digest.update(np.asarray(example, np.int64).tobytes())
        digest.update(np.concatenate([np.zeros(0, np.int64), *self._ends]).tobytes())
        for mask in self._masks or ():
            digest.update(mask.tobytes())
        for picture in itertools.chain(*self._pictures):
            digest.update(picture.content)
        for pictures, order in zip(self._pictures, self._order, strict=True):
            if len(pictures) < len(order):
                digest.update(order.tobytes())
        return {"content": digest.hexdigest()[:32]}

    def tokens(self, number: int, start: int, stop: int) -> np.ndarray:
        """See `Store.tokens`."""
        return np.asarray(self._examples[number][start:stop], np.int32)

    def loss_mask(self, number: int, start: int, stop: int) -> np.ndarray | None:
        """See `Store.loss_mask`."""
        return None if self._masks is None else self._masks[number][start:stop]

    def ends(self, number: int) -> np.ndarray:
        """See `Store.ends`."""
        return self._ends[number]

    def pictures(self, number: int) -> list[Picture]:
        """See `Store.pictures`."""
        return list(self._pictures[number])

    def asked(self, number: int) -> np.ndarray:
        """See `Store.asked`."""
        counts = np.array([picture.tiles for picture in self._pictures[number]], np.int64)
        return _asked(counts, self._order[number])


class Subset:
    """Some examples of a store, as a store.

    Args:
        store: any of this module.
        numbers: of the examples, in the order they are to have.

    Raises:
        ValueError: there is none, or the store has no such example.
    """

    def __init__(self, store: Any, numbers: Sequence[int] | np.ndarray) -> None:
        self._store, self._numbers = store, np.asarray(numbers, np.int64)
        if not len(self._numbers):
            raise ValueError(f"a subset of {store!r} without any example")
        least, most = int(self._numbers.min()), int(self._numbers.max())
        if least < 0 or most >= len(store):
            wrong = least if least < 0 else most
            raise ValueError(f"{store!r} has no example {wrong}; it has {len(store)}")
        self.lengths = store.lengths[self._numbers]
        self.segments = store.segments[self._numbers]
        self.tiles = store.tiles[self._numbers]
        self.most_segments = int(self.segments.max())
        self.has_mask = store.has_mask

    def __len__(self) -> int:
        return len(self._numbers)

    def __repr__(self) -> str:
        return f"{len(self)} of {self._store!r}"

    def __getitem__(self, number: int) -> Example:
        """An example."""
        return self._store[int(self._numbers[number])]

    @property
    def meta(self) -> dict[str, Any]:
        """As a `Store` has it."""
        parts = self._store.meta["content"].encode() + self._numbers.tobytes()
        return {"content": hashlib.sha256(parts).hexdigest()[:32]}

    def tokens(self, number: int, start: int, stop: int) -> np.ndarray:
        """See `Store.tokens`."""
        return self._store.tokens(int(self._numbers[number]), start, stop)

    def loss_mask(self, number: int, start: int, stop: int) -> np.ndarray | None:
        """See `Store.loss_mask`."""
        return self._store.loss_mask(int(self._numbers[number]), start, stop)

    def ends(self, number: int) -> np.ndarray:
        """See `Store.ends`."""
        return self._store.ends(int(self._numbers[number]))

    def pictures(self, number: int) -> list[Picture]:
        """See `Store.pictures`."""
        return self._store.pictures(int(self._numbers[number]))

    def asked(self, number: int) -> np.ndarray:
        """See `Store.asked`."""
        asked: np.ndarray = self._store.asked(int(self._numbers[number]))
        return asked


def distinct(pictures: Sequence[Picture]) -> tuple[list[Picture], np.ndarray]:
    """Each picture once, and which of them stands at each place, Int64[n]."""
    numbers: dict[Picture, int] = {}
    order = [numbers.setdefault(picture, len(numbers)) for picture in pictures]
    return list(numbers), np.array(order, np.int64)


def _asked(counts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The tiles of images in this order, each of which has as many as `counts` says."""
    first = np.cumsum(counts) - counts
    tiles = [first[n] + np.arange(counts[n]) for n in order.tolist()]
    return np.concatenate([np.zeros(0, np.int64), *tiles])


def _is_nested(example: Any) -> bool:
    return len(example) > 0 and np.ndim(example[0]) == 1


def _joined(parts: Sequence[Sequence[Any]]) -> list[Any]:
    return [value for part in parts for value in part]


def _meta(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / "meta.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{folder}: no tokenized data is there; make it with tokenizing.tokenize()"
        )
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is damaged ({error}); tokenize again") from None
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"{folder}: is of format {meta.get('format')!r}, this reads {FORMAT}; tokenize again"
        )
    return meta


def _mapped(file: pathlib.Path, dtype: type, count: int) -> np.ndarray:
    size = file.stat().st_size if file.exists() else 0
    expected = count * np.dtype(dtype).itemsize
    if size != expected:
        raise ValueError(f"{file}: has {size} bytes, {expected} are expected; tokenize again")
    # Seen as a plain array, which is cut ten times as fast.
    return np.memmap(file, dtype, "r", shape=(count,)).view(np.ndarray)
