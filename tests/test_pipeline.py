"""Packed batches hold every token once, in segments that know where they begin."""

import itertools

import numpy as np
import pytest

from l4jax.data import pipeline

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
