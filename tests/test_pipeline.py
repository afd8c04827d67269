"""Batches hold every token once, in segments that know where they begin, and go on exactly."""

import itertools
import json

import grain
import numpy as np
import pytest

from l4jax.data import packing, pipeline
from l4jax.data.mixture import Mixture
from l4jax.data.store import MemoryStore

LENGTH, ROWS = 16, 3
DOCUMENTS = [
    list(range(1000 * i, 1000 * i + n))
    for i, n in enumerate([5, 16, 0, 1, 40, 17, 160, 3, 0, 33, 2, 15, 16, 16, 7], start=1)
]
"""Every token tells its document and its place; some are empty, some longer than many rows."""
TOKENS = [token for document in DOCUMENTS for token in document]


def packed(seed=None, repeat=False, documents=DOCUMENTS, length=LENGTH, batch_size=ROWS, **options):
    return pipeline.packed(
        documents, length=length, batch_size=batch_size, seed=seed, repeat=repeat, **options
    )


def row_by_row(batches):
    """Tokens, segments and positions of every row of every batch."""
    for batch in batches:
        yield from zip(batch["tokens"], batch["segment_ids"], batch["positions"], strict=True)


def tokens_of(batches):
    """All tokens that are not padding, in order."""
    return [int(t) for ids, segments, _ in row_by_row(batches) for t in ids[segments > 0]]


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_an_epoch_uses_every_token_once(seed):
    """Rows one by one, so that no last batch is dropped."""
    found = tokens_of(packed(seed, batch_size=1))
    assert sorted(found) == sorted(TOKENS)


@pytest.mark.parametrize("seed", [None, 0])
def test_only_the_last_incomplete_batch_is_dropped(seed):
    """21 rows, the last one padded: five batches of 4, and a row that is left over."""
    found = tokens_of(packed(seed, batch_size=4))
    whole = tokens_of(packed(seed, batch_size=1))
    assert found == whole[: 5 * 4 * LENGTH]
    assert len(whole) == len(TOKENS) > len(found)


def test_shapes_and_types_are_what_models_take():
    for batch in packed(0):
        assert set(batch) == {"tokens", "segment_ids", "positions"}
        for value in batch.values():
            assert value.shape == (ROWS, LENGTH)
            assert value.dtype == np.int32


def test_without_a_seed_documents_come_in_their_order():
    assert tokens_of(packed(None, batch_size=1)) == TOKENS


@pytest.mark.parametrize("seed", [None, 0, 3])
def test_a_segment_is_a_run_of_neighbours_and_its_positions_start_from_zero(seed):
    for ids, segments, positions in row_by_row(packed(seed, batch_size=1)):
        assert segments[0] == 1
        for i in range(1, LENGTH):
            if segments[i] == 0:
                assert not np.any([ids[i:], segments[i:], positions[i:]])
                break
            if segments[i] == segments[i - 1]:
                assert (ids[i], positions[i]) == (ids[i - 1] + 1, positions[i - 1] + 1)
            else:
                assert (segments[i], positions[i]) == (segments[i - 1] + 1, 0)
        assert positions[0] == 0


def test_segments_change_exactly_where_documents_or_rows_do():
    """A document of n tokens at a row's start is cut at every row; inside, at its own end too."""
    documents = [[1] * 20, [2] * 10, [3] * 34]
    (batch,) = packed(documents=documents, batch_size=4)
    runs = [[(int(s), len(list(g))) for s, g in itertools.groupby(r)] for r in batch["segment_ids"]]
    assert runs == [
        [(1, 16)],
        [(1, 4), (2, 10), (3, 2)],
        [(1, 14), (2, 2)],
        [(1, 14), (2, 2)],
    ]


def test_the_same_seed_gives_the_same_batches_and_another_one_others():
    def take(seed):
        return tokens_of(itertools.islice(packed(seed, repeat=True), 15))

    assert take(7) == take(7)
    assert take(7) != take(8)


def test_an_iterable_can_be_read_twice():
    data = packed(5)
    assert tokens_of(data) == tokens_of(data)


def test_epochs_follow_each_other_without_a_gap_and_in_other_orders():
    """Over three epochs every token comes three times, and no order comes twice."""
    whole = 3 * len(TOKENS)
    rows = list(itertools.islice(row_by_row(packed(4, repeat=True)), -(-whole // LENGTH)))
    flat = [int(token) for ids, segments, _ in rows for token in ids[segments > 0]][:whole]
    epochs = [flat[i : i + len(TOKENS)] for i in range(0, whole, len(TOKENS))]
    for epoch in epochs:
        assert sorted(epoch) == sorted(TOKENS)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_endless_data_without_a_seed_repeats_its_order():
    batches = itertools.islice(packed(None, repeat=True), 12)
    found = tokens_of(batches)
    assert found == (TOKENS * 2)[: len(found)]
    assert len(found) > len(TOKENS)


def test_pieces_of_a_long_document_are_shuffled_apart():
    """Otherwise a batch would hold little but one document."""
    (batch, *_) = packed(0, documents=[list(range(16 * 64))], batch_size=8)
    starts = batch["tokens"][:, 0]
    assert not (np.diff(starts) == LENGTH).all()


@pytest.mark.parametrize("repeat", [False, True])
def test_processes_see_together_what_one_sees_alone(repeat):
    whole = list(itertools.islice(packed(3, repeat, batch_size=5), 9))
    parts = [
        list(itertools.islice(packed(3, repeat, batch_size=5, rows=rows), 9))
        for rows in ([0, 1], [2], [3, 4])
    ]
    assert len(whole) == (9 if repeat else 4)
    for batch, *pieces in zip(whole, *parts, strict=True):
        for name, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in pieces]), value)


class Watched(list):
    """A document that counts the tokens read from it."""

    read = 0

    def __getitem__(self, index):
        part = super().__getitem__(index)
        if isinstance(index, slice):
            Watched.read += len(part)
        return part


def test_a_process_reads_its_own_rows_only():
    documents = [Watched(document) for document in DOCUMENTS]
    tokens = tokens_of(packed(1, documents=documents, batch_size=5, rows=[3]))
    assert Watched.read == len(tokens) == 4 * LENGTH


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("skip", [0, 1, 4, 6, 7, 50])
def test_skipped_batches_are_those_that_came_before(repeat, skip):
    def take(**options):
        return tokens_of(itertools.islice(packed(2, repeat, **options), 60 - options["skip"]))

    whole = take(skip=0)
    assert take(skip=skip) == whole[skip * ROWS * LENGTH :]


def test_an_iterator_goes_on_where_it_stood():
    data = iter(packed(6, repeat=True))
    for _ in range(5):
        next(data)
    state = data.get_state()
    expected = next(data)
    again = iter(packed(6, repeat=True))
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["tokens"], expected["tokens"])


@pytest.mark.parametrize("rows", [[], [-1], [3]])
def test_rows_must_be_in_the_batch(rows):
    with pytest.raises(ValueError, match="must be some of the 3 of a batch"):
        packed(rows=rows)


def test_skip_must_not_be_negative():
    with pytest.raises(ValueError, match="skip -1 must not be negative"):
        packed(skip=-1)


@pytest.mark.parametrize("documents", [[], [[]], [[1] * 47], [[1] * 16, [2] * 31]])
def test_too_little_data_is_an_error(documents):
    with pytest.raises(ValueError, match=r"tokens, fewer than one batch of 3 × 16"):
        packed(documents=documents)


def test_exactly_one_batch_is_enough():
    (batch,) = packed(documents=[[1] * 48])
    assert (batch["tokens"] == 1).all()


@pytest.mark.parametrize(("length", "rows"), [(0, 3), (-16, 3), (16, 0), (16, -1)])
def test_sizes_must_be_positive(length, rows):
    with pytest.raises(ValueError, match=f"length {length} and batch_size {rows} must be at least"):
        packed(length=length, batch_size=rows)


# --- Mixtures of stores --------------------------------------------------------------------------
def numbered(count, most, seed, masked=False):
    """Examples whose tokens tell the example and the place; a mask is True on odd places."""
    sizes = np.random.default_rng(seed).integers(1, most, count)
    examples = [[1000 * i + t for t in range(n)] for i, n in enumerate(sizes.tolist())]
    masks = [[t % 2 == 1 for t in range(n)] for n in sizes.tolist()] if masked else None
    return MemoryStore(examples, masks)


PLAIN, MASKED, ONE = numbered(90, 21, 0), numbered(70, 15, 1, True), MemoryStore([[7, 8, 9]])
PAIRS = MemoryStore(
    [[[10 * i] * (1 + i % 4), [10 * i + 1] * (1 + i % 3)] for i in range(40)],
    [[[False] + [True] * (i % 4), [False] + [True] * (i % 3)] for i in range(40)],
)
TRIPLES = MemoryStore([[[i] * 2, [i] * 3, [i]] if i % 3 else [[i] * 2, [i]] for i in range(40)])
KINDS = ("split", "best_fit", "none")


def mixed(packing="best_fit", epochs=None, stores=(PLAIN, MASKED, ONE), **options):
    weights = [0.5, 0.3, 0.2][: len(stores)]
    return pipeline.batches(
        Mixture(stores, weights, epochs=epochs),
        **{"length": 23, "batch_size": 4, "seed": 2, "packing": packing} | options,
    )


def same(found, expected):
    """Whether two lists of batches are equal to the last bit and type."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert set(a) == set(b)
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 50)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_batch_of_an_epoch_is_filled_up_with_empty_rows(kind):
    data = pipeline.batches(
        Mixture([PLAIN, MASKED], epochs=1), length=21, batch_size=11, seed=0, packing=kind
    )
    batches = list(data)
    assert all(batch["tokens"].shape == (11, 21) for batch in batches)
    assert sorted(tokens_of(batches)) == sorted(
        token for store in (PLAIN, MASKED) for i in range(len(store)) for token in store[i].tokens
    )
    assert not batches[-1]["segment_ids"][-1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_masks_positions_and_segments_belong_to_their_tokens(kind):
    for batch in itertools.islice(mixed(kind, stores=(PLAIN, MASKED)), 20):
        padding = batch["segment_ids"] == 0
        assert not batch["tokens"][padding].any()
        assert not batch["loss_mask"][padding].any()
        assert batch["loss_mask"].dtype == np.bool_
        for row, ids in enumerate(batch["segment_ids"]):
            assert np.unique(ids[ids > 0]).tolist() == list(range(1, ids.max() + 1))
            for segment in range(1, ids.max() + 1):
                where = ids == segment
                tokens, mask = batch["tokens"][row][where], batch["loss_mask"][row][where]
                assert (np.diff(tokens) == 1).all()
                np.testing.assert_array_equal(batch["positions"][row][where], range(len(tokens)))
                # Of the store without a mask every token counts.
                assert mask.all() or (mask == tokens % 2).all()


def test_without_masks_there_is_no_mask():
    assert set(next(iter(mixed(stores=(PLAIN, ONE))))) == set(pipeline.KEYS)


@pytest.mark.parametrize("kind", ["best_fit", "none"])
def test_pairs_stay_together_and_are_told_by_their_examples(kind):
    data = mixed(kind, epochs=2, stores=(PAIRS, TRIPLES), segments=6)
    seen = 0
    for batch in data:
        for name in ("example", "groups", "ranks"):
            assert (batch[name].shape, batch[name].dtype) == ((4, 6), np.int32)
        for row in range(4):
            ids, column = batch["segment_ids"][row], 0
            while column < 6 and (example := int(batch["example"][row, column])) >= 0:
                store, number = (PAIRS, example) if example < 40 else (TRIPLES, example - 40)
                wanted = store[number]
                count = len(wanted.offsets) - 1
                part = slice(column, column + count)
                assert (batch["example"][row, part] == example).all()
                assert np.unique(batch["groups"][row, part]).size == 1
                assert batch["ranks"][row, part].tolist() == list(range(count))[::-1]
                for place in range(count):
                    cut = slice(*wanted.offsets[place : place + 2])
                    where = ids == column + place + 1
                    np.testing.assert_array_equal(batch["tokens"][row][where], wanted.tokens[cut])
                    if wanted.loss_mask is not None:
                        found = batch["loss_mask"][row][where]
                        np.testing.assert_array_equal(found, wanted.loss_mask[cut])
                column, seen = column + count, seen + 1
            assert ids.max() == column
            groups = batch["groups"][row, :column]
            assert np.unique(groups).tolist() == list(range(1, groups.max(initial=0) + 1))
            assert not batch["groups"][row, column:].any()
    assert seen >= 80


def test_examples_of_one_segment_are_in_no_group():
    batch = next(iter(mixed(stores=(PLAIN, MASKED), segments=9)))
    assert set(batch) == {*pipeline.KEYS, "loss_mask", "example"}


# --- Going on ------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_from_every_position_it_goes_on_as_if_uninterrupted(kind, workers):
    def data():
        return pipeline.batches(
            Mixture([PLAIN, ONE, MASKED], epochs=3),
            length=23,
            batch_size=[(0, 4), (3, 7), (9, 1)],
            seed=4,
            packing=kind,
            workers=workers,
        )

    batches, states = [], []
    iterator = iter(data())
    while True:
        states.append(json.loads(json.dumps(iterator.get_state())))
        try:
            batches.append(next(iterator))
        except StopIteration:
            break
    assert len(batches) > 40
    for place in [*range(14), len(batches) - 1, len(batches)]:
        fresh = iter(data())
        fresh.set_state(states[place])
        assert fresh.get_state() == states[place]
        same(list(itertools.islice(fresh, 9)), batches[place : place + 9])
    iterator.set_state(states[5])
    same(list(iterator), batches[5:])


@pytest.mark.parametrize("kind", KINDS)
def test_workers_change_neither_batches_nor_states(kind):
    alone, helped = iter(mixed(kind)), iter(mixed(kind, workers=3))
    for _ in range(25):
        same([next(alone)], [next(helped)])
        assert alone.get_state() == helped.get_state()
    # A state of one is good for the other.
    helped.set_state(alone.get_state())
    same([next(alone)], [next(helped)])
    helped.close()
    with pytest.raises(ValueError, match="closed"):
        next(helped)


def test_an_error_of_a_worker_is_raised():
    class Broken(MemoryStore):
        def tokens(self, number, start, stop):
            raise OSError("the disk is gone")

    data = pipeline.batches(Mixture([Broken([[1, 2]])]), length=2, batch_size=1, seed=0, workers=2)
    with pytest.raises(OSError, match="the disk is gone"):
        next(iter(data))


def test_a_state_is_of_its_data_and_settings_only():
    state = iter(mixed()).get_state()
    others = [
        mixed(seed=3),
        mixed(length=24),
        mixed("none"),
        mixed(segments=8),
        mixed(epochs=1),
        mixed(stores=(PLAIN, MASKED)),
        mixed(stores=(MASKED, PLAIN, ONE)),
        mixed(stores=(PLAIN, numbered(70, 15, 1), ONE)),
        pipeline.batches(
            Mixture([PLAIN, MASKED, ONE]), length=23, batch_size=4, seed=2, packing="best_fit"
        ),
    ]
    for other in others:
        with pytest.raises(ValueError, match="the state is of other data"):
            iter(other).set_state(state)
    iter(mixed(workers=2, rows=[1])).set_state(state)


def test_batches_may_change_their_size_on_the_way():
    iterator = iter(mixed())
    first = list(itertools.islice(iterator, 3))
    other = iter(mixed(batch_size=7))
    other.set_state(iterator.get_state())
    then = list(itertools.islice(other, 4))
    whole = tokens_of(itertools.islice(mixed(batch_size=1), 3 * 4 + 4 * 7))
    assert tokens_of([*first, *then]) == whole


def test_grain_goes_on_from_here():
    """Its transformations keep our state."""

    def data():
        return mixed().map(lambda batch: batch | {"weight": np.float32(2)})

    iterator = iter(data())
    next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = next(iterator)
    fresh = iter(data())
    fresh.set_state(state)
    same([next(fresh)], [expected])
    assert isinstance(iterator, grain.DatasetIterator)


# --- Parts of batches ----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epochs", [None, 1])
def test_four_processes_see_together_what_one_sees(kind, epochs):
    """Also where the batches grow, and where the last one is not full."""

    def take(host=None):
        rows = None if host is None else lambda size: range(host, size, 4)
        data = mixed(kind, epochs, batch_size=[(0, 4), (2, 8), (5, 12)], rows=rows)
        return list(itertools.islice(data, 12))

    whole, parts = take(), [take(host) for host in range(4)]
    for batch, *pieces in zip(whole, *parts, strict=True):
        for name, value in batch.items():
            together = np.stack([piece[name] for piece in pieces], axis=1)
            np.testing.assert_array_equal(together.reshape(value.shape), value)


def test_batch_sizes_follow_their_plan():
    ramp = itertools.islice(mixed(batch_size=[(0, 2), (3, 5)]), 6)
    assert [len(batch["tokens"]) for batch in ramp] == [2, 2, 2, 5, 5, 5]
    grown = itertools.islice(mixed(batch_size=lambda n: 1 + n // 2), 6)
    assert [len(batch["tokens"]) for batch in grown] == [1, 1, 2, 2, 3, 3]


def test_rows_come_in_their_order_whatever_the_batch_sizes():
    small = itertools.islice(mixed(batch_size=1), 30)
    large = itertools.islice(mixed(batch_size=15), 2)
    assert tokens_of(small) == tokens_of(large)


def test_efficiency_is_that_of_the_batches():
    data = mixed()
    batches = list(itertools.islice(data, 30))
    padding = np.mean([batch["segment_ids"] == 0 for batch in batches])
    assert data.efficiency(rows=120).padding == pytest.approx(padding)


# --- Errors --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "split", "segments": 4}, "rows of 'split' hold as many as come"),
        ({"segments": 0}, "segments=0 with packing='best_fit': it must be at least 1"),
        ({"length": 14}, "examples are longer than a row of 14 tokens"),
        ({"length": 0, "batch_size": [(0, 1)]}, "length 0 must be at least 1"),
        ({"workers": -1}, "workers -1"),
        ({"batch_size": []}, "must be pairs"),
        ({"batch_size": [(1, 4)]}, "the first from batch 0"),
        ({"batch_size": [(0, 4), (5, 8), (5, 9)]}, "later ones from later batches"),
        ({"batch_size": [(0, 4), (5, 0)]}, "batch size 0 from batch 5 on must be at least 1"),
        ({"batch_size": lambda n: 0}, "batch 0 has size 0"),
        ({"rows": [4]}, "must be some of the 4 of a batch"),
        ({"rows": lambda size: [size]}, "must be some of the 4 of a batch"),
    ],
)
def test_odd_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mixed(**options)
