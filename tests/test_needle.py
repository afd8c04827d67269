"""Needles lie where they should, are found by who can find, and are no secret to nobody else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import build
from flax import nnx
from toy_recipes import CONFIG, VOCABULARY, texts

from l4jax import sharding
from l4jax.data import mixture, pipeline, store
from l4jax.data import tokenizer as tokenizers
from l4jax.evaluation import needle

LENGTHS = (57, 96)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(texts(0), vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def haystack(tokenizer):
    ids = [tokenizer.encode(text, bos=True) for text in texts(2)]
    return needle.Haystack([store.MemoryStore(ids[:3]), store.MemoryStore(ids[3:])], tokenizer)


@pytest.fixture(scope="module")
def needles(tokenizer, haystack):
    return needle.Needles(tokenizer, haystack, "\n{key}: {value}\n")


class Copier(nnx.Module):
    """Predicts what came after the last place where the same three tokens stood.

    It looks back `window` tokens, and never into another segment.
    """

    def __init__(self, window=10**6):
        self.window = window

    def hidden(self, tokens, *, positions, segment_ids):
        t = tokens.shape[1]
        at = jnp.arange(t)
        same = jnp.ones((len(tokens), t, t), bool)
        for back in range(3):
            moved = jnp.roll(tokens, back, axis=1)
            same &= moved[:, :, None] == moved[:, None, :]
        same &= (at[:, None] > at) & (at[:, None] - at < self.window)
        same &= segment_ids[:, :, None] == segment_ids[:, None, :]
        last = jnp.where(same, at, -1).max(-1)
        after = jnp.take_along_axis(tokens, jnp.maximum(last + 1, 0), axis=1)
        return jax.nn.one_hot(jnp.where(last < 0, 0, after), VOCABULARY), None

    def logits(self, x):
        return x


# --- Planting ------------------------------------------------------------------------------------
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_fact_lies_at_its_depth_and_is_asked_for_at_the_end(tokenizer, needles, depth):
    tokens, answer = needles.plant(np.random.default_rng(5), length=70, depths=[depth])
    assert tokens.dtype == np.int32
    assert len(tokens) == 70
    assert tokens[0] == tokenizer.bos_id
    value = tokenizer.decode(tokens[-answer:].tolist())
    assert 1000 <= int(value) < 10_000
    text = tokenizer.decode(tokens[1:].tolist())
    key, question = text[: -len(value)].rsplit("\n", 1)[1].split(":")[0], f": {value}"
    assert key in needle.KEYS
    assert text.endswith(f"\n{key}{question}")
    before, after = text[: -len(f"\n{key}{question}")].split(f"\n{key}{question}\n")
    assert "\n" not in before + after
    # Depths count tokens of the text around the fact.
    sizes = [len(tokenizer.encode(part)) for part in (before, after)]
    assert sizes[0] / sum(sizes) == pytest.approx(depth, abs=0.1)


def test_a_text_is_as_random_as_its_seed(needles):
    def plant(seed):
        return needles.plant(np.random.default_rng(seed), length=60, depths=[0.5]).tokens.tolist()

    assert plant(1) == plant(1)
    assert plant(1) != plant(2)


def test_where_there_is_no_room_it_says_how_much_is_needed(needles):
    with pytest.raises(
        ValueError, match=r"length 20 has no room for a needle: it needs \d+ tokens"
    ):
        needles.plant(np.random.default_rng(0), length=20, depths=[0.5])


@pytest.mark.parametrize("text", ["no holes", "only {key}", "{value} before {key}"])
def test_a_text_that_asks_for_nothing_is_refused(tokenizer, haystack, text):
    with pytest.raises(ValueError, match="must have {key} and, behind it, {value}"):
        needle.Needles(tokenizer, haystack, text)


def test_a_haystack_has_all_texts_and_no_special_tokens(tokenizer, haystack):
    rng = np.random.default_rng(0)
    taken = [haystack.take(rng, n) for n in (0, 1, 50, 5000)]
    assert [len(x) for x in taken] == [0, 1, 50, 5000]
    assert tokenizer.bos_id not in taken[-1]
    whole = tokenizer.decode(taken[-1].tolist())
    assert all(text[:200] in whole for text in texts(2)[:3])
    empty = needle.Haystack([store.MemoryStore([[tokenizer.bos_id]])], tokenizer)
    with pytest.raises(ValueError, match="no text to hide a needle in"):
        empty.take(rng, 3)


# --- Measuring -----------------------------------------------------------------------------------
def test_who_looks_it_up_finds_all_and_who_guesses_nothing(needles):
    probe = needle.Probe(needles, lengths=LENGTHS, samples=3, rows=7)
    assert probe(Copier()).tolist() == np.ones((len(needle.DEPTHS), 2)).tolist()
    assert probe(build(CONFIG)).max() == 0


def test_who_looks_back_a_little_finds_deep_ones_only(needles):
    probe = needle.Probe(needles, lengths=LENGTHS, depths=(0.0, 0.6, 1.0), samples=2)
    # From the answer back to the fact: at depth 1, one fact; at depth 0, the whole text.
    assert probe(Copier(window=40)).tolist() == [[0, 0], [1, 0], [1, 1]]


def test_an_answer_counts_only_if_all_of_it_is_right(needles):
    probe = needle.Probe(needles, lengths=LENGTHS[:1], depths=(0.5,), samples=1, rows=1)
    (batch,) = probe.batches
    model, length = Copier(), int(batch["loss_mask"].sum())
    assert length == 4
    assert needle.found(model, batch, length).tolist() == [True]
    for place in range(1, length + 1):
        wrong = {**batch, "tokens": batch["tokens"].copy()}
        wrong["tokens"][0, -place] += 1
        assert needle.found(model, wrong, length).tolist() == [False]


def test_on_a_mesh_the_same_is_found():
    model = build(dataclasses.replace(CONFIG, max_context=96))
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, VOCABULARY, (2, 64), np.int32),
        "segment_ids": np.repeat([[0, 1]], [20, 44], axis=1).repeat(2, 0).astype(np.int32),
        "positions": np.tile(np.r_[:20, :44].astype(np.int32), (2, 1)),
        "loss_mask": np.tile(np.arange(64) == 63, (2, 1)),
    }
    hidden, _ = model.hidden(**{k: jnp.asarray(v) for k, v in batch.items() if k != "loss_mask"})
    batch["tokens"][0, -1] = model.logits(hidden)[0, -2].argmax()
    run = jax.jit(lambda model, batch: needle.found(model, batch, 1))
    assert run(model, batch).tolist() == [True, False]
    with sharding.use(sharding.make_mesh(context=2, fsdp=2)):
        graph, state = nnx.split(model)
        spread = nnx.merge(graph, jax.device_put(state, sharding.shardings(state)))
        assert run(spread, batch).tolist() == [True, False]


@pytest.mark.parametrize(
    "options", [{"lengths": ()}, {"samples": 0}, {"rows": 0}, {"depths": (0.5, 1.2)}]
)
def test_a_probe_of_nothing_is_refused(needles, options):
    with pytest.raises(ValueError, match="at least|from 0 to 1"):
        needle.Probe(needles, **{"lengths": LENGTHS} | options)


def test_a_heat_map_is_a_picture(tmp_path):
    panels = {"before": ((64, 128), np.zeros((5, 2))), "after": ((64,), np.ones((5, 1)).tolist())}
    needle.draw(tmp_path / "needle.png", panels)
    assert (tmp_path / "needle.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# --- Learning ------------------------------------------------------------------------------------
def test_documents_are_the_same_in_whatever_order_they_are_read(needles):
    made = needle.Documents(needles, count=200, length=90, seed=3)
    again = needle.Documents(needles, count=200, length=90, seed=3)
    assert len(made) == 200
    assert set(made.lengths) == {90}
    numbers = range(200)
    forward = [made.tokens(n, 0, 90).tolist() for n in numbers]
    assert [again.tokens(n, 0, 90).tolist() for n in reversed(numbers)] == forward[::-1]
    assert made.tokens(7, 20, 31).tolist() == forward[7][20:31]
    assert len(set(map(tuple, forward))) == 200
    assert made.meta == again.meta
    for other in ({"seed": 4}, {"count": 201}, {"length": 91}):
        changed = needle.Documents(needles, **{"count": 200, "length": 90, "seed": 3} | other)
        assert changed.meta != made.meta


def test_documents_state_their_fact_once_or_more(tokenizer, needles):
    made = needle.Documents(needles, count=60, length=200, seed=0)
    counts = []
    for number in range(60):
        text = tokenizer.decode(made.tokens(number, 0, 200).tolist())
        question, value = text.rsplit("\n", 1)[1].split(": ")
        counts.append(text.count(f"\n{question}: {value}\n"))
    most = 199 // needles.longest - 1
    assert most > 2
    assert set(counts) == set(range(1, most + 1))


def test_no_document_is_in_the_probe(needles):
    probe = needle.Probe(needles, lengths=(90,), depths=(0.5,), samples=1, seed=0, rows=1)
    made = needle.Documents(needles, count=3, length=90, seed=0)
    assert probe.batches[0]["tokens"][0].tolist() != made.tokens(0, 0, 90).tolist()


def test_documents_are_a_store_to_mix_and_pack(needles):
    rest = store.MemoryStore([list(range(30)), list(range(40))])
    made = needle.Documents(needles, count=50, length=64, seed=0)
    mixed = mixture.Mixture([rest, made], [1, 1], unit="tokens")
    batches = pipeline.batches(mixed, length=64, batch_size=8, seed=0, packing="best_fit")
    batch = next(iter(batches))
    whole = {tuple(made.tokens(n, 0, 64)) for n in range(50)}
    alone = batch["segment_ids"].max(1) == 1
    rows = {tuple(row) for row in batch["tokens"][alone & (batch["segment_ids"].min(1) == 1)]}
    assert rows
    assert rows <= whole


def test_too_few_or_too_short_documents_are_refused(needles):
    with pytest.raises(ValueError, match="count 0 .* must be at least 1"):
        needle.Documents(needles, count=0, length=64, seed=0)
    with pytest.raises(ValueError, match="length 20 has no room"):
        needle.Documents(needles, count=1, length=20, seed=0)
