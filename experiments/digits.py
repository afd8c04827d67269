"""Early fusion in small: a twin of Scout learns to read handwritten digits, and to add them.

    python -m experiments.digits

Its pictures are made of scikit-learn's scans, 8 × 8 pixels each, by several hands: one digit, two
side by side (which take two tiles and the whole), or two pictures in one question; and of pieces of
its two photos, in colour. Some scans, and the right of each photo, are never trained on; held-out
questions are of those alone, in pictures and sums that the model has not seen. It learns by what
any conversation with images goes through: `conversations`, packing, `pipeline`,
`objectives.next_token`, from random parameters, encoder and all.

Leaves what pre-training leaves, the model in `model/` and in Hugging Face's format in `export/`;
`report.json` with the share of held-out questions that are answered exactly, and `answers.png`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import matplotlib.figure
import numpy as np
from flax import nnx
from PIL import Image

import l4jax.data.images as pictures
from experiments import examples, leaves, recipe
from experiments.console import say, told
from l4jax import inference, presets, roofline, sharding
from l4jax.config import TextConfig, VisionConfig
from l4jax.data import chat, pipeline, tokenizing
from l4jax.data import tokenizer as tokenizers
from l4jax.data.conversations import Conversations
from l4jax.data.mixture import Mixture
from l4jax.data.tokenizer import Tokenizer
from l4jax.models.multimodal import Multimodal, arrange
from l4jax.training import checkpointing, hooks, loop, objectives

SCAN = 8
"""Pixels of a scan's side, as scikit-learn has them."""
TILE = 16
"""Pixels of a tile's side: a digit has room to stand anywhere in it."""
KINDS = {
    "one digit": "Which digit is it?",
    "two in a picture": "What is the sum?",
    "two pictures": "What do they add up to?",
    "a photo": "Which photo is it from?",
}
"""What is asked, by what is shown."""
ORDER = (*("one digit", "two in a picture", "two pictures") * 2, "a photo")
"""Kinds of the questions to learn from, again and again."""
RIGHT = 0.75
"""Where the part of a photo begins that is held out, in its width."""
SHOWN = 8
"""Answers of each kind in the figure."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits(leaves.Recipe):
    """Leaves of the recipe."""

    out: str = "runs/digits"
    batch: int = 16
    length: int = 128
    questions: int = 60_000
    """To learn from."""
    held_out: int = 300
    """Of each kind, to be answered at the end."""
    run: loop.Settings = loop.Settings(steps=3000, checkpoint_every=500, evaluate_every=250)
    optimization: leaves.Optimization = leaves.Optimization(learning_rate=1e-3, warmup=50)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.questions < 1 or self.held_out < SHOWN:
            raise ValueError(
                f"questions {self.questions} must be at least 1, held_out {self.held_out} at least "
                f"{SHOWN}"
            )
        if self.files.data or self.files.images:
            raise ValueError("this recipe makes its own pictures; use sft with --images for yours")


class Question(NamedTuple):
    """What is shown and asked, and the answer."""

    kind: str
    shown: list[np.ndarray]
    answer: str

    @property
    def asked(self) -> dict[str, Any]:
        """The message of the user."""
        parts: list[Any] = [{"type": "image", "image": image} for image in self.shown]
        return {"role": "user", "content": [*parts, {"type": "text", "text": KINDS[self.kind]}]}

    @property
    def record(self) -> dict[str, Any]:
        """The whole conversation."""
        return {"messages": [self.asked, {"role": "assistant", "content": self.answer}]}


def run(settings: Digits) -> loop.Result:
    recipe.begin(settings)
    with told("Drawing pictures of digits"):
        train, held_out = questions(settings)
        tokenizer = tokenizer_of(train)
        settings_of_images = pictures.Settings(tile_size=TILE, max_tiles=2, tokens_per_tile=4)
        encode = Conversations(tokenizer, images=settings_of_images)
        mixture = Mixture([tokenizing.encoded((x.record for x in train), encode)])
    patch = pictures.special(tokenizer, pictures.PATCH)
    images = pipeline.Images(settings=settings_of_images, patch_id=patch)
    text, vision = config_of(tokenizer)
    recipe.check_model(settings, text)
    model = sharding.create(
        lambda: Multimodal(
            text, vision, execution=settings.place.execution, rngs=nnx.Rngs(settings.seed)
        )
    )
    sees = roofline.vision_parameters(vision, text.embed_dim)
    total = roofline.parameters(text).total + sees
    say(f"{total:,} parameters, {sees:,} of them of the image encoder")

    def right(moment: hooks.Moment) -> dict[str, float]:
        some = [x for kind in KINDS for x in held_out[kind][:50]]
        return {"eval_right": share(some, ask(moment.training.model, tokenizer, images, some))}

    training, result = recipe.train(
        settings,
        model,
        objectives.next_token(balance=0.01),
        examples.training_batches(mixture, settings, packing="best_fit", images=images),
        every=[right],
    )
    saved: Any = recipe.finish(
        settings, training, tokenizer, export=True, images=settings_of_images
    )
    with told("Answering what it was not trained on"):
        report(settings, saved, tokenizer, images, held_out)
    return result


# --- Questions -----------------------------------------------------------------------------------
def questions(settings: Digits) -> tuple[list[Question], dict[str, list[Question]]]:
    """To learn from, all kinds mixed; and to be answered, by kind, of other scans and places."""
    train, held_out = sources(settings.seed)
    rng = np.random.default_rng(settings.seed)
    learned = [draw(ORDER[n % len(ORDER)], train, rng) for n in range(settings.questions)]
    return learned, {
        kind: [draw(kind, held_out, rng) for _ in range(settings.held_out)] for kind in KINDS
    }


class Source(NamedTuple):
    """What pictures are made of.

    scans: [8 8] from 0 to 16, and their digits. photos: by name, [y x 3] uint8.
    """

    scans: list[tuple[np.ndarray, int]]
    photos: dict[str, np.ndarray]


def sources(seed: int) -> tuple[Source, Source]:
    """To train on, four fifths of scikit-learn's scans and the left of its photos; and the rest."""
    try:
        from sklearn import datasets
    except ImportError:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from None
    found = datasets.load_digits()
    whole = list(zip(found.images, found.target.tolist(), strict=True))
    order = np.random.default_rng(seed).permutation(len(whole))
    cut = len(whole) * 4 // 5
    photos = {name: datasets.load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    edges = {name: round(RIGHT * photo.shape[1]) for name, photo in photos.items()}
    return (
        Source([whole[n] for n in order[:cut]], {x: y[:, : edges[x]] for x, y in photos.items()}),
        Source([whole[n] for n in order[cut:]], {x: y[:, edges[x] :] for x, y in photos.items()}),
    )


def draw(kind: str, source: Source, rng: np.random.Generator) -> Question:
    """A question about something drawn from these."""
    if kind == "a photo":
        name = str(rng.choice(list(source.photos)))
        return Question(kind, [piece(source.photos[name], rng)], name)
    count = 1 if kind == "one digit" else 2
    chosen = [source.scans[int(n)] for n in rng.integers(len(source.scans), size=count)]
    tiles = [place(scan, rng) for scan, _ in chosen]
    digits = [digit for _, digit in chosen]
    if kind == "one digit":
        return Question(kind, tiles, str(digits[0]))
    shown = [np.concatenate(tiles, axis=1)] if kind == "two in a picture" else tiles
    return Question(kind, shown, f"{digits[0]} + {digits[1]} = {sum(digits)}")


def place(scan: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A scan, leaning a little, at some place in a tile, enlarged by half, [y x] uint8."""
    side = SCAN * 3 // 2
    grey = Image.fromarray(np.asarray(np.round(scan * (255 / 16)), np.uint8))
    leaning = grey.resize((side, side)).rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
    enlarged = np.asarray(leaning)
    tile = np.zeros((TILE, TILE), np.uint8)
    y, x = rng.integers(0, TILE - side + 1, size=2)
    tile[y : y + side, x : x + side] = enlarged
    return tile


def piece(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A square of a photo, a tenth of its height or more, as small as a tile, [y x 3] uint8."""
    high, wide = photo.shape[:2]
    side = int(rng.integers(high // 10, min(high, wide) + 1))
    y, x = (int(rng.integers(0, size - side + 1)) for size in (high, wide))
    square = Image.fromarray(photo[y : y + side, x : x + side])
    return np.asarray(square.resize((TILE, TILE), Image.Resampling.BILINEAR))


# --- Model ---------------------------------------------------------------------------------------
def tokenizer_of(asked: Sequence[Question]) -> Tokenizer:
    """A tokenizer of the words that are asked, with Llama 4's tokens for images."""
    texts = [f"{KINDS[x.kind]} {x.answer}" for x in asked[:1000]]
    return tokenizers.train(texts, vocab_size=384, images=True)


def config_of(tokenizer: Tokenizer) -> tuple[TextConfig, VisionConfig]:
    """A twin of Scout, and of its encoder, that learn in minutes."""
    base = presets.tiny(presets.llama4_scout())
    assert base.moe is not None
    text = dataclasses.replace(
        base,
        num_layers=4,
        embed_dim=96,
        vocab_size=tokenizer.vocab_size,
        attention=dataclasses.replace(base.attention, head_dim=24, chunk_size=64),
        moe=dataclasses.replace(base.moe, mlp_dim=128, shared_mlp_dim=128),
    )
    vision = dataclasses.replace(
        presets.tiny_vision(presets.llama4_vision()),
        embed_dim=64,
        num_heads=4,
        mlp_dim=256,
        output_dim=96,
        image_size=TILE,
        patch_size=4,
    )
    return text, vision


# --- Answers -------------------------------------------------------------------------------------
def ask(
    model: Multimodal, tokenizer: Tokenizer, images: pipeline.Images, asked: Sequence[Question]
) -> list[str]:
    """What the model answers, most likely token after most likely token."""
    found = []
    fast, vision = inference.decoding.unrolled(model), model.vision.config
    for part in _parts(asked, 50):
        rendered = [
            chat.render([x.asked], tokenizer, add_generation_prompt=True, images=images.settings)
            for x in part
        ]
        longest = max(len(x.tokens) for x in rendered)
        tokens = np.zeros((len(part), longest), np.int32)
        for row, x in enumerate(rendered):
            tokens[row, : len(x.tokens)] = x.tokens
        tiles = np.concatenate([image.tiles for x in rendered for image in x.images])
        generated = inference.generate(
            fast,
            tokens,
            lengths=[len(x.tokens) for x in rendered],
            images=arrange(tokens, tiles, vision, patch_id=images.patch_id),
            max_new_tokens=12,
            stop_ids=tokenizer.stop_ids,
        )
        found += [tokenizer.decode(row, skip_special=True) for row in generated.tokens]
    return found


def share(asked: Sequence[Question], answers: Sequence[str]) -> float:
    """Of exact answers."""
    pairs = zip(asked, answers, strict=True)
    return sum(question.answer == answer for question, answer in pairs) / len(asked)


def report(
    settings: Digits,
    model: Multimodal,
    tokenizer: Tokenizer,
    images: pipeline.Images,
    held_out: dict[str, list[Question]],
) -> None:
    """Writes `report.json` and `answers.png`."""
    answers = {kind: ask(model, tokenizer, images, asked) for kind, asked in held_out.items()}
    right = {kind: share(asked, answers[kind]) for kind, asked in held_out.items()}
    for kind, part in right.items():
        say(f"{kind}: {part:.1%} of {settings.held_out} held-out questions answered exactly")
    if jax.process_index():
        return
    text = json.dumps({"right": right, "questions": settings.held_out, "seed": settings.seed})
    checkpointing.write(settings.folder / "report.json", text + "\n")
    path = settings.folder / "answers.png"
    with checkpointing.appearing(path) as partial, partial.open("wb") as file:
        drawn(held_out, answers, right).savefig(file, dpi=110, format="png")


def drawn(
    held_out: dict[str, list[Question]], answers: dict[str, list[str]], right: dict[str, float]
) -> matplotlib.figure.Figure:
    """Some questions of each kind with their answers, wrong ones, if there are any, among them."""
    figure = matplotlib.figure.Figure(figsize=(11, 6.8), layout="constrained")
    parts: Any = figure.subfigures(len(KINDS), 1)
    for part, kind in zip(parts, KINDS, strict=True):
        part.suptitle(f"{KINDS[kind]}   {right[kind]:.1%} of {len(held_out[kind])} right", size=10)
        pairs = list(zip(held_out[kind], answers[kind], strict=True))
        wrong = [pair for pair in pairs if pair[0].answer != pair[1]][:2]
        shown = [pair for pair in pairs if pair[0].answer == pair[1]][: SHOWN - len(wrong)] + wrong
        for axes, (question, answer) in zip(part.subplots(1, SHOWN), shown, strict=False):
            gap = np.full((TILE, 2, 3), 255, np.uint8)
            coloured = [np.stack([x] * 3, -1) if x.ndim == 2 else x for x in question.shown]
            row = [x for image in coloured for x in (image, gap)][:-1]
            axes.imshow(np.concatenate(row, axis=1))
            colour = "black" if answer == question.answer else "firebrick"
            # A model that has learned little may say anything.
            shown_as = "".join(c if c.isprintable() and c.isascii() else "·" for c in answer)
            axes.set_title(shown_as.replace("$", "·"), size=9, color=colour)
            axes.axis("off")
    return figure


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


PRESETS: dict[str, Digits] = {}

if __name__ == "__main__":
    sys.exit(recipe.main(Digits(), run, PRESETS, __doc__))
