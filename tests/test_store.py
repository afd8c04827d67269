"""Stores on disk and in memory give back what was put in, and say who may read them."""

import itertools
import pickle

import numpy as np
import pytest

from l4jax.data import pipeline
from l4jax.data.chat import Rendered
from l4jax.data.mixture import Mixture
from l4jax.data.sources import Report
from l4jax.data.store import MemoryStore, Store, Subset
from l4jax.data.tokenizing import _writing

EXAMPLES = [[[5, 6, 7]], [[1], [2, 3]], [[9] * 40, [8] * 3, [7]], [[4]]]
MASKS = [
    [[True, False, True]],
    [[False], [True, True]],
    [[False] * 40, [True] * 3, [True]],
    [[True]],
]
ABOUT = {"format": 1, "tokenizer": "abc"}


def written(folder, examples=EXAMPLES, masks=MASKS, about=ABOUT):
    with _writing(folder) as writer:
        for segments, learn in zip(examples, masks, strict=True):
            writer.add([Rendered(*both) for both in zip(segments, learn, strict=True)])
    writer.finish(about, Report())
    return Store(folder)


def trues(examples):
    return [[[True] * len(part) for part in segments] for segments in examples]


def assert_holds(store, examples, masks):
    assert len(store) == len(examples)
    assert store.lengths.tolist() == [sum(map(len, x)) for x in examples]
    assert store.segments.tolist() == [len(x) for x in examples]
    assert store.lengths.dtype == store.segments.dtype == np.int64
    for number, segments in enumerate(examples):
        found = store[number]
        assert found.tokens.dtype == np.int32
        cut = [part.tolist() for part in np.split(found.tokens, found.offsets[1:-1])]
        assert cut == segments
        if masks is None:
            assert found.loss_mask is None
        else:
            assert found.loss_mask.dtype == np.bool_
            assert found.loss_mask.tolist() == sum(masks[number], [])
        whole = sum(segments, [])
        assert store.tokens(number, 1, len(whole)).tolist() == whole[1:]
        assert store.ends(number).tolist() == found.offsets[1:].tolist()


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_what_goes_in_comes_out(kind, tmp_path):
    store = written(tmp_path / "x") if kind == "disk" else MemoryStore(EXAMPLES, MASKS)
    assert_holds(store, EXAMPLES, MASKS)
    assert store.has_mask
    assert store.most_segments == 3


def test_examples_of_one_segment_without_masks_need_fewer_files(tmp_path):
    single = [[[1, 2, 3]], [[4]], [[5, 6]]]
    store = written(tmp_path / "x", single, trues(single))
    assert_holds(store, single, None)
    assert sorted(file.name for file in (tmp_path / "x").iterdir()) == [
        "meta.json",
        "offsets.npy",
        "report.json",
        "tokens.bin",
    ]
    flat = MemoryStore([x for (x,) in single])
    assert_holds(flat, single, None)


def test_a_store_travels_by_its_name(tmp_path):
    store = written(tmp_path / "x")
    sent = pickle.dumps(store)
    assert len(sent) < 500
    assert_holds(pickle.loads(sent), EXAMPLES, MASKS)
    assert repr(store) == f"Store('{tmp_path / 'x'}')"


def test_batches_do_not_tell_disk_from_memory(tmp_path):
    for store in (written(tmp_path / "x"), MemoryStore(EXAMPLES, MASKS)):
        data = pipeline.batches(
            Mixture([store]), length=47, batch_size=3, seed=0, packing="best_fit", segments=4
        )
        found = list(itertools.islice(data, 5))
        if isinstance(store, Store):
            expected = found
    for one, other in zip(expected, found, strict=True):
        assert set(one) == set(other) >= {"loss_mask", "example", "ranks"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_meta_counts_and_knows_its_content(tmp_path):
    meta = written(tmp_path / "x").meta
    assert meta["examples"] == 4
    assert meta["segments"] == 7
    assert meta["tokens"] == 51
    assert meta["tokens_to_predict"] == 9
    assert (meta["largest_token"], meta["longest_example"]) == (9, 44)
    assert written(tmp_path / "same").meta["content"] == meta["content"]
    for number, (examples, masks) in enumerate(
        [
            ([*EXAMPLES[:3], [[3]]], MASKS),
            (EXAMPLES, [*MASKS[:3], [[False]]]),
            (
                [EXAMPLES[0], [[1, 2], [3]], *EXAMPLES[2:]],
                [MASKS[0], [[False, True], [True]], *MASKS[2:]],
            ),
            (
                [[[5, 6, 7]], [[1]], [[2, 3]], *EXAMPLES[2:]],
                [MASKS[0], [[False]], [[True, True]], *MASKS[2:]],
            ),
        ]
    ):
        other = written(tmp_path / str(number), examples, masks).meta["content"]
        assert other != meta["content"]
        assert MemoryStore(examples, masks).meta != MemoryStore(EXAMPLES, MASKS).meta
    assert MemoryStore(EXAMPLES, MASKS).meta == MemoryStore(EXAMPLES, MASKS).meta


def test_models_and_tokenizers_that_do_not_fit_are_refused(tmp_path):
    store = written(tmp_path / "x")
    store.require(vocab_size=10, tokenizer="abc")
    with pytest.raises(ValueError, match="has token 9, but the model's vocabulary ends at 8"):
        store.require(vocab_size=9)
    with pytest.raises(ValueError, match="was made with tokenizer abc, not xyz; tokenize again"):
        store.require(tokenizer="xyz")


def test_damage_is_noticed(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenized data is there"):
        Store(tmp_path)
    folder = tmp_path / "x"
    written(folder)
    tokens = (folder / "tokens.bin").read_bytes()
    (folder / "tokens.bin").write_bytes(tokens[:-4])
    with pytest.raises(ValueError, match=r"tokens\.bin: has 200 bytes, 204 are expected"):
        Store(folder)
    (folder / "tokens.bin").write_bytes(tokens)
    (folder / "meta.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="is of format 0, this reads 1; tokenize again"):
        Store(folder)
    (folder / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta\.json: is damaged"):
        Store(folder)


def test_there_is_no_example_beyond_the_last(tmp_path):
    store = written(tmp_path / "x")
    for number in (-1, 4):
        with pytest.raises(IndexError, match=f"has no example {number}; it has 4"):
            store[number]


def test_a_mask_must_fit():
    with pytest.raises(ValueError, match="example 1 has 2 tokens, but a loss mask of 3"):
        MemoryStore([[1], [2, 3]], [[True], [True] * 3])


def test_a_subset_reads_like_a_store_of_its_own_examples():
    whole = MemoryStore(
        [[[1, 2], [3]], [[4], [5, 6]], [[7], [8]]],
        [[[0, 1], [1]], [[1], [0, 1]], [[1], [1]]],
    )
    part, alone = Subset(whole, [2, 0]), MemoryStore([[[7], [8]], [[1, 2], [3]]])
    assert (len(part), part.most_segments, part.has_mask) == (2, 2, True)
    np.testing.assert_array_equal(part.lengths, alone.lengths)
    np.testing.assert_array_equal(part.segments, alone.segments)
    for number in range(2):
        np.testing.assert_array_equal(part[number].tokens, alone[number].tokens)
        np.testing.assert_array_equal(part.ends(number), alone.ends(number))
        np.testing.assert_array_equal(part.tokens(number, 1, 2), alone.tokens(number, 1, 2))
    np.testing.assert_array_equal(part.loss_mask(1, 0, 3), [False, True, True])
    assert part.meta != Subset(whole, [0, 2]).meta
    assert part.meta == Subset(whole, [2, 0]).meta


@pytest.mark.parametrize(
    ("numbers", "told"), [([], "without any"), ([1], "no example 1"), ([-1], "no example -1")]
)
def test_a_subset_of_nothing_or_of_what_is_not_there_is_refused(numbers, told):
    with pytest.raises(ValueError, match=told):
        Subset(MemoryStore([[1]]), numbers)
