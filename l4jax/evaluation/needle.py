"""A needle in a haystack: does a model find one fact anywhere in a long text?

A fact, such as "The secret number of amber is 4821.", is planted in other text at a depth from 0,
its beginning, to 1, its end, and asked for behind the text (Kamradt 2023, "Needle In A Haystack").
One forward pass with the true answer tells whether greedy decoding would have given it: it would if
and only if each of its tokens is the likeliest one after those before it.

    needles = Needles(tokenizer, Haystack(stores, tokenizer))
    shares = Probe(needles, lengths=(4096, 8192))(model)    # [depths lengths]

`Documents` are texts to learn it from. Letters: see `models.layers`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

from l4jax import sharding
from l4jax.data.tokenizer import Tokenizer

TEXT = "\nThe secret number of {key} is {value}.\n"
"""A fact; the question is what stands before its value."""
KEYS = ("amber", "basil", "cedar", "delta", "ember", "fjord", "grove", "heron", "ivory", "jade")
VALUES = (1000, 10_000)
"""Values are numbers from the first to below the second: four digits."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
COPIES = 32
"""Most times that a text to learn from states its fact."""
_PROBE, _DOCUMENTS = range(2)
"""First part of random seeds: what is learned from is not what is measured on."""


class Haystack:
    """Text to hide something in: examples of stores, one after another from a random place.

    Args:
        stores: as `data.store` has them.
        tokenizer: its special tokens are left out, so that the text reads as one.
    """

    def __init__(self, stores: Sequence[Any], tokenizer: Tokenizer) -> None:
        self._stores = tuple(stores)
        self._special = np.array(sorted(set(tokenizer.special.values())), np.int32)
        self._first = np.cumsum([0, *(len(store) for store in stores)])

    @property
    def content(self) -> list[str]:
        """Of each store, what tells it from others."""
        return [store.meta["content"] for store in self._stores]

    def take(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Some `count` tokens, Int32[count].

        Raises:
            ValueError: the stores have no text.
        """
        total = int(self._first[-1])
        place, parts, found = int(rng.integers(total)), [np.zeros(0, np.int32)], 0
        for turn in range(place, place + total + count):
            if found >= count:
                return np.concatenate(parts)[:count]
            number = turn % total
            which = int(np.searchsorted(self._first, number, side="right")) - 1
            store, example = self._stores[which], number - int(self._first[which])
            size = int(store.lengths[example])
            start = int(rng.integers(size)) if turn == place else 0
            tokens = store.tokens(example, start, size)
            parts.append(tokens[~np.isin(tokens, self._special)])
            found += len(parts[-1])
        raise ValueError(f"no text to hide a needle in: {list(self._stores)} have none")


class Planted(NamedTuple):
    """A text with a fact, and the question.

    tokens: Int32[t], the answer at the end. answer: how many tokens it has.
    """

    tokens: np.ndarray
    answer: int


class Needles:
    """Plants facts.

    Args:
        tokenizer: of the model.
        haystack: to plant them in.
        text: of a fact, with {key} and {value} in it.

    Raises:
        ValueError: the text lacks one of the two, or has {value} before {key}.
    """

    def __init__(self, tokenizer: Tokenizer, haystack: Haystack, text: str = TEXT) -> None:
        self._before, value, self._after = text.partition("{value}")
        if not value or "{key}" not in self._before:
            raise ValueError(f"needle {text!r} must have {{key}} and, behind it, {{value}}")
        self._tokenizer, self.haystack, self.text = tokenizer, haystack, text
        after = len(tokenizer.encode(self._after))
        self.longest = max(len(self._question(key)) for key in KEYS) + len(str(VALUES[0])) + after
        """Tokens of a fact, at the most."""

    def _question(self, key: str) -> list[int]:
        return self._tokenizer.encode(self._before.replace("{key}", key))

    def plant(self, rng: np.random.Generator, *, length: int, depths: Sequence[float]) -> Planted:
        """A text of `length` tokens with a random fact, stated at each of these depths.

        Raises:
            ValueError: there is no room.
        """
        encode, bos = self._tokenizer.encode, self._tokenizer.bos_id
        value = str(rng.integers(*VALUES))
        # Encoded apart, so that fact and question are the same tokens.
        question, answer = self._question(str(rng.choice(KEYS))), encode(value)
        fact = [*question, *answer, *encode(self._after)]
        first = [] if bos is None else [bos]
        room = length - len(first) - len(question) - len(answer) - len(fact) * len(depths)
        if room < 0:
            raise ValueError(
                f"length {length} has no room for a needle: it needs {length - room} tokens"
            )
        hay = self.haystack.take(rng, room)
        places = sorted(round(depth * room) for depth in depths)
        parts = [np.asarray(first, np.int32)]
        for start, stop in zip([0, *places], [*places, room], strict=True):
            parts += [hay[start:stop], np.asarray(fact, np.int32)]
        parts[-1] = np.asarray(question + answer, np.int32)
        return Planted(np.concatenate(parts), len(answer))


# --- Measuring -----------------------------------------------------------------------------------
class Probe:
    """How often a model finds the fact, by depth and length.

    Args:
        needles: what to plant where.
        lengths: of texts, in tokens.
        depths: of facts.
        samples: texts for each depth and length.
        rows: texts in a forward pass.
        seed: of the texts.

    Raises:
        ValueError: a number is out of range, or a length has no room.
    """

    def __init__(
        self,
        needles: Needles,
        *,
        lengths: Sequence[int],
        depths: Sequence[float] = DEPTHS,
        samples: int = 4,
        rows: int = 8,
        seed: int = 0,
    ) -> None:
        if min(samples, rows) < 1 or not lengths or not depths:
            raise ValueError(
                f"samples {samples} and rows {rows} must be at least 1, lengths {lengths} and "
                f"depths {depths} at least one"
            )
        if not all(0 <= depth <= 1 for depth in depths):
            raise ValueError(f"depths {depths} must be from 0 to 1")
        self._shape = len(depths), len(lengths), samples
        planted = [
            needles.plant(
                np.random.default_rng([_PROBE, seed, length, number, sample]),
                length=length,
                depths=[depth],
            )
            for number, depth in enumerate(depths)
            for length in lengths
            for sample in range(samples)
        ]
        self.batches = [
            _batch(planted[start : start + rows], max(lengths), rows)
            for start in range(0, len(planted), rows)
        ]
        answer = max(x.answer for x in planted)
        self._run = jax.jit(lambda model, batch: found(model, batch, answer))

    def __call__(self, model: nnx.Module) -> np.ndarray:
        """The share of facts that are found, Float64[depths lengths].

        Called by all processes alike; the model lies on the current mesh.
        """
        rows = [np.asarray(self._run(model, _everywhere(batch))) for batch in self.batches]
        cases = math.prod(self._shape)
        return np.concatenate(rows)[:cases].reshape(self._shape).mean(-1)


def found(model: Any, batch: Mapping[str, Any], answer: int) -> Bool[Array, " b"]:
    """Whether each token to be predicted is the likeliest one, in each row.

    Args:
        model: any.
        batch: as for training, with a `loss_mask` that is True on some of the last tokens only.
        answer: the most tokens that a row has to predict; logits exist for so many.
    """
    hidden, _ = model.hidden(
        batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )
    likeliest = model.logits(hidden[:, -answer - 1 : -1]).argmax(-1)
    tokens, asked = (jnp.asarray(batch[name])[:, -answer:] for name in ("tokens", "loss_mask"))
    right = jnp.all((likeliest == tokens) | ~asked, axis=1)
    return sharding.constrain(right, None)  # whole in every process


def _batch(planted: Sequence[Planted], length: int, rows: int) -> dict[str, np.ndarray]:
    """Texts at the ends of rows, so that all answers are there; rows that are left over are empty.

    All lengths have one shape, and are compiled once.
    """
    made = {
        "tokens": np.zeros((rows, length), np.int32),
        "segment_ids": np.zeros((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "loss_mask": np.zeros((rows, length), np.bool_),
    }
    for row, (tokens, answer) in enumerate(planted):
        made["tokens"][row, -len(tokens) :] = tokens
        made["segment_ids"][row, -len(tokens) :] = 1
        made["positions"][row, -len(tokens) :] = np.arange(len(tokens))
        made["loss_mask"][row, -answer:] = True
    return made


def _everywhere(batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A batch that every process has whole, as arrays of all of them."""
    if jax.process_count() == 1:
        return dict(batch)
    place = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
    return {
        name: jax.make_array_from_callback(x.shape, place, x.__getitem__)
        for name, x in batch.items()
    }


def draw(file: epath.PathLike, panels: Mapping[str, tuple[Sequence[int], Any]]) -> None:
    """A heat map for each probe, depth against length: how often the fact was found.

    Args:
        file: of the picture, PNG.
        panels: by title, the lengths and what the probe gave, at `DEPTHS`.
    """
    width = sum(1.5 + 0.6 * len(lengths) for lengths, _ in panels.values())
    figure = matplotlib.figure.Figure(figsize=(width + 1, 3.2), layout="constrained")
    ratios = [1.5 + 0.6 * len(lengths) for lengths, _ in panels.values()]
    row = figure.subplots(1, len(panels), squeeze=False, width_ratios=ratios)[0]
    for axes, (title, (lengths, shares)) in zip(row, panels.items(), strict=True):
        grid = np.asarray(shares, np.float64)
        image = axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        for (depth, length), share in np.ndenumerate(grid):
            axes.text(length, depth, f"{share:.0%}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
        axes.set_yticks(range(len(DEPTHS)), [f"{depth:.0%}" for depth in DEPTHS])
        axes.set(title=title, xlabel="tokens")
    row[0].set_ylabel("depth of the fact")
    figure.colorbar(image, ax=row[-1], label="found")
    with epath.Path(file).open("wb") as opened:
        figure.savefig(opened, dpi=120, format="png")


# --- Learning ------------------------------------------------------------------------------------
class Documents:
    """A store of texts with a fact, for `data.mixture.Mixture`.

    Nothing is kept: a text is made from its number whenever it is read. Its fact is stated at
    random depths, once or more often, up to `COPIES` times if they fit: each time after the first
    is as good a lesson as the question.

    Args:
        needles: what to plant where.
        count: number of texts.
        length: tokens of each.
        seed: of the texts.

    Raises:
        ValueError: a number is out of range, or the length has no room.
    """

    has_mask = False
    most_segments = 1

    def __init__(self, needles: Needles, *, count: int, length: int, seed: int) -> None:
        if count < 1:
            raise ValueError(f"count {count} of documents with a needle must be at least 1")
        self._needles, self._seed, self._length = needles, seed, length
        self.lengths = np.full(count, length, np.int64)
        self.segments = np.ones(count, np.int64)
        self._made = functools.lru_cache(maxsize=64)(self._make)
        self._most = max(1, min(COPIES, (length - 1) // needles.longest - 1))
        self._make(0)

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return f"{len(self)} texts with a needle"

    @property
    def meta(self) -> dict[str, Any]:
        """As a `data.store.Store` has it, of this content."""
        needles = self._needles
        parts = [needles.text, needles.haystack.content, len(self), self._length, self._seed]
        return {"content": hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}

    def tokens(self, number: int, start: int, stop: int) -> np.ndarray:
        """See `data.store.Store.tokens`."""
        return self._made(number)[start:stop]

    def loss_mask(self, number: int, start: int, stop: int) -> None:
        """Every token counts."""

    def ends(self, number: int) -> np.ndarray:
        """See `data.store.Store.ends`."""
        return self.lengths[number : number + 1]

    def _make(self, number: int) -> np.ndarray:
        rng = np.random.default_rng([_DOCUMENTS, self._seed, self._length, number])
        depths = rng.random(int(rng.integers(1, self._most + 1)))
        return self._needles.plant(rng, length=self._length, depths=list(depths)).tokens
