"""However a record names its images, they stand in the same places of the same conversation."""

import base64
import dataclasses
import json

import numpy as np
import pytest
from image_toys import encoded, noise, tokenizer

from l4jax.data import chat, images, tokenizing
from l4jax.data.conversations import Conversations, Documents, Preferences
from l4jax.data.illustrations import measured
from l4jax.data.sources import Source
from l4jax.data.store import Store, Subset

SETTINGS = images.Settings(tile_size=24, max_tiles=4, tokens_per_tile=4)
ONE, FOUR = encoded(noise(20, 24, seed=1), "PNG"), encoded(noise(40, 48, seed=2), "PNG")
"""Files of one tile, and of 2 × 2 and the whole."""
ANSWER = {"role": "assistant", "content": "Noise."}


def image(source=None):
    return {"type": "image"} | ({} if source is None else {"image": source})


def said(text):
    return {"type": "text", "text": text}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def url(content):
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "one.png").write_bytes(ONE)
    (tmp_path / "four.png").write_bytes(FOUR)
    return tmp_path


PARTS = user(image(ONE), said("a"), image(FOUR), said("b"))
FORMS = {
    "bytes": {"messages": [PARTS, ANSWER]},
    "files": {
        "messages": [user(image("one.png"), said("a"), image("four.png"), said("b")), ANSWER]
    },
    "OpenAI's": {
        "messages": [
            user(
                {"type": "image_url", "image_url": {"url": url(ONE)}},
                said("a"),
                {"type": "image_url", "image_url": {"url": url(FOUR)}},
                said("b"),
            ),
            ANSWER,
        ]
    },
    "listed beside parts": {
        "messages": [user(image(), said("a"), image(), said("b")), ANSWER],
        "images": [{"bytes": ONE, "path": None}, {"bytes": None, "path": "four.png"}],
    },
    "LLaVA's": {
        "conversations": [
            {"from": "human", "value": "<image>a<image>b"},
            {"from": "gpt", "value": "Noise."},
        ],
        "image": ["one.png", "four.png"],
    },
    "tags in parts": {
        "messages": [user(said("<image>a<image>b")), ANSWER],
        "images": ["one.png", "four.png"],
    },
    "prompt and completion": {
        "prompt": "<image>a<image>b",
        "completion": "Noise.",
        "images": ["one.png", FOUR],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_what_chat_renders(folder, form):
    encode = Conversations(tokenizer(), images=SETTINGS, folder=str(folder))
    (found,) = encode(FORMS[form])
    expected = chat.render([PARTS, ANSWER], tokenizer(), images=SETTINGS)
    assert (found.tokens, found.loss_mask) == expected[:2]
    assert [x.content for x in found.images] == [ONE, FOUR]
    assert [x.grid for x in found.images] == [x.grid for x in expected.images]
    assert [x.tiles for x in found.images] == [len(x.tiles) for x in expected.images] == [1, 5]


def test_images_that_stand_nowhere_come_first(folder):
    encode = Conversations(tokenizer(), images=SETTINGS, folder=str(folder))
    expected = encode({"messages": [user(image(ONE), image(FOUR), said("ab")), ANSWER]})
    for value in (
        {"prompt": "ab", "completion": "Noise."},
        {"messages": [{"role": "user", "content": "ab"}, ANSWER]},
        {"conversations": [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "Noise."}]},
    ):
        assert encode({**value, "images": [ONE, "four.png"]}) == expected


def test_arrays_are_kept_without_loss():
    pixels = noise(20, 24, seed=1)
    (found,) = Conversations(tokenizer(), images=SETTINGS)(
        {"messages": [user(image(pixels)), ANSWER]}
    )
    np.testing.assert_array_equal(np.asarray(images.read(found.images[0].content)), pixels)


def test_both_answers_to_a_picture_have_it():
    value = {"prompt": "<image>?", "chosen": "good", "rejected": "bad", "images": [FOUR]}
    chosen, rejected = Preferences(tokenizer(), images=SETTINGS)(value)
    assert [x.content for x in (*chosen.images, *rejected.images)] == [FOUR, FOUR]
    patch = tokenizer().special["<|patch|>"]
    for segment in (chosen, rejected):
        assert segment.tokens.count(patch) == 20
        learned = [t for t, m in zip(segment.tokens, segment.loss_mask, strict=True) if m]
        assert patch not in learned
        assert tokenizer().decode(learned) in ("good<|eot|>", "bad<|eot|>")


def test_documents_are_interleaved_and_images_not_learned():
    (found,) = Documents(tokenizer(), images=SETTINGS)(
        {"text": "See <image> and <image>.", "images": [ONE, FOUR]}
    )
    learned = [t for t, m in zip(found.tokens, found.loss_mask, strict=True) if m]
    assert tokenizer().decode(learned) == "<|begin_of_text|>See  and .<|end_of_text|>"
    layouts = [images.layout(x.grid, tokenizer(), 4) for x in found.images]
    assert len(found.tokens) == len(learned) + sum(map(len, layouts))


def test_all_that_is_said_is_learned_but_no_image():
    encode = Conversations(tokenizer(), images=SETTINGS, learn="all")
    (found,) = encode({"messages": [PARTS, ANSWER]})
    left = [t for t, m in zip(found.tokens, found.loss_mask, strict=True) if not m]
    assert left == [
        *images.layout((1, 1), tokenizer(), 4),
        *images.layout((2, 2), tokenizer(), 4),
    ]


def test_records_without_images_are_as_before():
    value = {"messages": [{"role": "user", "content": "<image> is a tag"}, ANSWER], "image": ""}
    plain, reading = (Conversations(tokenizer(), images=x) for x in (None, SETTINGS))
    assert plain(value) == reading(value)
    assert measured(value, SETTINGS) == {"messages": value["messages"]}


def test_stores_hold_the_files(folder):
    records = folder / "records.jsonl"
    lines = [
        {"prompt": "<image>a", "completion": "b", "images": ["four.png"]},
        {"prompt": "a", "completion": "b"},
        {"prompt": "<image><image>a", "completion": "b", "images": ["one.png", "four.png"]},
    ]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    encode = Conversations(tokenizer(), images=SETTINGS, folder=str(folder))
    made = [
        tokenizing.tokenize(
            Source(str(records)), encode, folder / f"store{workers}", workers=workers
        )
        for workers in (0, 2)
    ]
    for name in ("one.png", "four.png"):
        (folder / name).unlink()
    for store in made:
        store = Store(store.folder)
        assert store.tiles.tolist() == [5, 0, 6]
        assert [[x.content for x in store.pictures(n)] for n in range(3)] == [
            [FOUR],
            [],
            [ONE, FOUR],
        ]
        assert [x.grid for x in store.pictures(2)] == [(1, 1), (2, 2)]
        assert store.meta["images"] == 3
        part = Subset(store, [2, 1])
        assert (part.tiles.tolist(), part.pictures(0)) == ([6, 0], store.pictures(2))
    assert made[0].meta["content"] == made[1].meta["content"]
    memory = tokenizing.encoded(
        [{"prompt": "a", "completion": "b"}, {**lines[0], "images": [FOUR]}], encode
    )
    assert (memory.tiles.tolist(), memory.pictures(1)) == ([0, 5], made[0].pictures(0))
    other = tokenizing.encoded(
        [
            {"prompt": "a", "completion": "b"},
            {**lines[0], "images": [encoded(noise(40, 48, seed=3), "PNG")]},
        ],
        encode,
    )
    assert other.meta["content"] != memory.meta["content"]
    # The same files cut in another way are another store.
    more = dataclasses.replace(encode, images=dataclasses.replace(SETTINGS, max_tiles=1))
    assert more.settings() != encode.settings()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"prompt": "<image>a", "completion": "b", "images": [ONE, ONE]}, "lists 2 images, but 1"),
        ({"prompt": "<image><image>a", "completion": "b", "images": [ONE]}, "more images stand"),
        ({"messages": [user(image(), said("a")), ANSWER]}, "more images stand in messages than"),
        ({"prompt": "a", "completion": "b", "images": ["no.png"]}, r"image 0 \(.*no.png\)"),
        ({"prompt": "a", "completion": "b", "images": [b"no image"]}, "no image of a kind"),
        ({"messages": [user(image("no.png")), ANSWER]}, "no.png"),
        ({"instruction": "a", "output": "b", "images": [ONE]}, "needs messages or a prompt"),
        ({"messages": [user(image(ONE), said("a")), ANSWER], "images": [ONE]}, "lists 1 .* but 0"),
        (
            {
                "messages": [
                    {"role": "user", "content": "<image> a"},
                    ANSWER,
                    {"role": "user", "content": "<image> b"},
                    ANSWER,
                ],
                "images": [ONE],
            },
            "more images stand in messages than",
        ),
        ({"prompt": "a", "completion": "b", "images": ["https://x.org/a.png"]}, "downloaded"),
    ],
)
def test_what_does_not_fit_is_told(value, message):
    with pytest.raises(ValueError, match=message):
        Conversations(tokenizer(), images=SETTINGS)(value)


@pytest.mark.parametrize("encoder", [Conversations, Documents, Preferences])
def test_models_of_text_refuse_images(encoder):
    value = {"text": "a", "messages": [ANSWER], "images": [ONE]}
    with pytest.raises(ValueError, match="has images, and the model reads text only"):
        encoder(tokenizer())(value)
