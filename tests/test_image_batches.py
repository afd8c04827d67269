"""Batches hold every image's tiles once, where their tokens ask for them, however they are cut."""

import base64
import dataclasses
import itertools
import json

import numpy as np
import pytest
from image_toys import encoded, noise, tokenizer

from l4jax.data import images, pipeline, tokenizing
from l4jax.data.conversations import Conversations, Preferences
from l4jax.data.mixture import Mixture
from l4jax.data.pipeline import Images
from l4jax.data.sources import Source

SETTINGS = images.Settings(tile_size=24, max_tiles=4, tokens_per_tile=4)
PATCH = tokenizer().special["<|patch|>"]
HOW = Images(settings=SETTINGS, patch_id=PATCH)
SIZES = [(20, 24), (40, 48), (24, 60), None, (100, 20), (40, 48), None, None, (24, 24)]
FILES = [size and encoded(noise(*size, seed=n)) for n, size in enumerate(SIZES)]


def record(*files):
    return {"prompt": "What is in it?", "completion": "A cat.", "images": [x for x in files if x]}


@pytest.fixture(scope="module")
def store():
    encode = Conversations(tokenizer(), images=SETTINGS)
    pairs = [record(x) for x in FILES] + [record(FILES[0], FILES[1], FILES[4])]
    return tokenizing.encoded(pairs, encode)


def batches(store, how=HOW, **options):
    settings = {"length": 160, "batch_size": 4, "seed": 3, "packing": "best_fit", "segments": 4}
    return pipeline.batches(Mixture([store], epochs=2), **settings | options).with_images(how)


def seen(batch, store, pieces=1):
    """Of each example in a batch, its tiles as its tokens ask for them, in order."""
    found = {}
    each = SETTINGS.tokens_per_tile
    for row in range(len(batch["tokens"])):
        own = batch["tiles"][row % pieces :: pieces]
        for segment, example in enumerate(batch["example"][row], 1):
            there = batch["places"][row][batch["segment_ids"][row] == segment]
            there = there[there >= 0].reshape(-1, each)
            # A tile's tokens are its features in order.
            assert (there % each == np.arange(each)).all()
            if example >= 0:
                found.setdefault(int(example), []).append(own[there[:, 0] // each])
    return found


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_every_token_asks_for_its_tile(store, pieces):
    how = dataclasses.replace(HOW, pieces=pieces, multiple=2)
    count = 0
    for batch in batches(store, how):
        tokens, places = batch["tokens"], batch["places"]
        assert ((places >= 0) == (tokens == PATCH)).all()
        assert places.dtype == np.int32
        assert len(batch["tiles"]) % (2 * pieces) == 0
        for example, copies in seen(batch, store, pieces).items():
            expected = images.process([x.content for x in store.pictures(example)], SETTINGS)
            empty = np.zeros((0, 3, 24, 24), np.float32)
            expected = np.concatenate([empty, *(x.tiles for x in expected)])
            for found in copies:
                np.testing.assert_array_equal(found, expected)
                count += 1
        # Nothing refers to what is left, which is black.
        used = sum(int(store.tiles[n]) * len(x) for n, x in seen(batch, store, pieces).items())
        black = (batch["tiles"] == -1).all(axis=(1, 2, 3)).sum()
        assert black == len(batch["tiles"]) - used
    assert count == 2 * len(store)


@pytest.mark.parametrize("pieces", [1, 2])
def test_processes_make_shares_that_are_the_whole(store, pieces):
    """Two of them, each of which makes every second row and tile."""
    how = dataclasses.replace(HOW, pieces=pieces, multiple=2)
    whole = batches(store, how)
    parts = [batches(store, how, rows=lambda n, k=k: range(k, n, 2)) for k in range(2)]
    for batch, *shares in zip(whole, *parts, strict=True):
        for name, value in batch.items():
            joined = np.empty_like(value)
            for k, share in enumerate(shares):
                joined[k::2] = share[name]
            np.testing.assert_array_equal(joined, value, err_msg=name)


SHOWN = [[x] if x else [] for x in FILES] + [[FILES[0], FILES[1], FILES[0]]]
"""What both answers of a preference see; at the end one picture twice."""


def pairs(name=lambda content: content):
    said = {"prompt": "What is in it?", "chosen": "A cat.", "rejected": "A dog."}
    return [said | {"images": list(map(name, files))} for files in SHOWN]


@pytest.mark.parametrize("pieces", [1, 2])
def test_answers_share_their_pictures(pieces):
    how = dataclasses.replace(HOW, pieces=pieces, multiple=2)
    store = tokenizing.encoded(pairs(), Preferences(tokenizer(), images=SETTINGS))
    assert store.tiles.tolist() == [1, 5, 4, 0, 5, 5, 0, 0, 1, 6]
    whole = list(batches(store, how, length=256))
    for batch in whole:
        used = 0
        for example, copies in seen(batch, store, pieces).items():
            expected = [x.tiles for x in images.process(SHOWN[example], SETTINGS)]
            expected = np.concatenate([np.zeros((0, 3, 24, 24), np.float32), *expected])
            assert len(copies) % 2 == 0
            for found in copies:
                np.testing.assert_array_equal(found, expected)
            used += int(store.tiles[example]) * len(copies) // 2
        assert (batch["tiles"] != -1).any(axis=(1, 2, 3)).sum() == used
    parts = [batches(store, how, length=256, rows=lambda n, k=k: range(k, n, 2)) for k in range(2)]
    for batch, *shares in zip(whole, *parts, strict=True):
        for k, share in enumerate(shares):
            for name, value in share.items():
                np.testing.assert_array_equal(value, batch[name][k::2], err_msg=name)


def test_a_folder_keeps_a_shared_picture_once(tmp_path):
    def url(content):
        return f"data:image/png;base64,{base64.b64encode(content).decode()}"

    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in pairs(url)))
    encode = Preferences(tokenizer(), images=SETTINGS)
    memory = tokenizing.encoded(pairs(), encode)
    disk = tokenizing.tokenize(Source(str(tmp_path / "pairs.jsonl")), encode, tmp_path / "store")
    assert (tmp_path / "store" / "images.bin").stat().st_size == sum(
        len(x) for files in SHOWN for x in set(files)
    )
    for one, other in zip(batches(disk, length=256), batches(memory, length=256), strict=True):
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_a_folder_of_before_is_read_as_it_was(tmp_path, store):
    """Then every place had an image of its own."""
    file = tmp_path / "records.jsonl"
    files = [FILES[0], FILES[1], FILES[4]]
    urls = [f"data:image/png;base64,{base64.b64encode(x).decode()}" for x in files]
    file.write_text(json.dumps(record(*urls)))
    encode = Conversations(tokenizer(), images=SETTINGS)
    disk = tokenizing.tokenize(Source(str(file)), encode, tmp_path / "store")
    with np.load(disk.folder / "images.npz") as found:
        arrays = {name: found[name] for name in ("offsets", "examples", "grids")}
    np.savez(disk.folder / "images.npz", **arrays)
    np.testing.assert_array_equal(type(disk)(disk.folder).asked(0), store.asked(len(FILES)))
    assert len(disk.asked(0)) == 11


@pytest.mark.parametrize("workers", [0, 3])
def test_state_goes_on_with_the_same_images(store, workers):
    whole = list(batches(store))
    iterator = iter(batches(store, workers=workers))
    next(iterator), next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    again = iter(batches(store))
    again.set_state(state)
    for batch, expected in itertools.zip_longest(again, whole[2:]):
        for name, value in expected.items():
            np.testing.assert_array_equal(batch[name], value)
    larger = dataclasses.replace(HOW, settings=dataclasses.replace(SETTINGS, tile_size=48))
    with pytest.raises(ValueError, match="the state is of other data"):
        iter(batches(store, larger)).set_state(state)


def test_rows_without_images_have_no_places(store):
    (batch,) = pipeline.batches(
        Mixture([tokenizing.encoded([record()], Conversations(tokenizer()))], epochs=1),
        length=64,
        batch_size=2,
        seed=0,
        packing="none",
    ).with_images(HOW)
    assert (batch["places"] == -1).all()
    assert batch["tiles"].shape == (1, 3, 24, 24)


@pytest.mark.parametrize(("multiple", "sizes"), [(1, [1, 2, 3, 4, 6, 8, 12, 16]), (5, [5, 10, 15])])
def test_there_are_few_numbers_of_tiles(multiple, sizes):
    how = dataclasses.replace(HOW, multiple=multiple)
    rooms = [how.room(n) for n in range(sizes[-1] + 1)]
    assert sorted(set(rooms)) == sizes
    assert all(room >= n for n, room in enumerate(rooms))


def test_images_are_neither_forgotten_nor_cut(store):
    with pytest.raises(ValueError, match="the examples have images: say how they become tiles"):
        next(
            iter(
                pipeline.batches(Mixture([store]), length=160, batch_size=2, seed=0, packing="none")
            )
        )
    with pytest.raises(ValueError, match="would cut images"):
        batches(store, packing="split", segments=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tiles": 1}, r"an image has \(1, 1\) tiles and had \(\d, \d\) when it was tokenized"),
        ({"tokens_per_tile": 9}, "tiles of 9 features: tokenize again"),
    ],
)
def test_other_settings_than_when_it_was_tokenized_are_told(store, settings, message):
    how = dataclasses.replace(HOW, settings=dataclasses.replace(SETTINGS, **settings))
    with pytest.raises(ValueError, match=message):
        list(batches(store, how))
