"""Each objective is the formula it says it is, in float64, with the same gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import build
from flax import nnx
from objective_toys import VOCABULARY, Table, assert_slopes, gradients, packed, segment_sums

from l4jax import presets
from l4jax.training import objectives, trainer

LENGTHS = [(5, 7, 9, 3), (12, 11), (8,), (), (4, 1, 6, 8, 3)]
"""Two pairs; one; a chosen answer alone; padding; a pair whose second answer is a single token, a
pair, and a chosen answer alone. So five pairs have both segments, and four count."""
WIDTH, SEGMENTS, PAIRS = 29, 6, 4
BETA = 0.3


def batch_of(seed=0):
    batch = packed(LENGTHS, WIDTH, seed=seed)
    rng = np.random.default_rng(seed + 9)
    return batch | {"reference": rng.normal(-9, 3, (len(LENGTHS), SEGMENTS)).astype(np.float32)}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def pairs_of(sums, counts):
    """(row, pair) of those with tokens to predict on both sides."""
    return [
        (row, pair)
        for row in range(len(sums))
        for pair in range(sums.shape[1] // 2)
        if counts[row, 2 * pair] and counts[row, 2 * pair + 1]
    ]


# --- Next tokens ---------------------------------------------------------------------------------
@pytest.mark.parametrize("z", [0.0, 0.05])
def test_only_tokens_under_the_mask_are_learnt(z):
    model, batch = Table(), packed(LENGTHS, WIDTH)
    batch["loss_mask"][:, 0] = True  # The first token of a row follows none.

    def plain(**moved):
        scores = model.logits(batch["tokens"], **moved)
        lse = np.log(np.exp(scores).sum(-1))
        found = []
        for row, i in zip(*np.nonzero(batch["loss_mask"]), strict=True):
            if i and batch["segment_ids"][row, i] == batch["segment_ids"][row, i - 1]:
                nll = lse[row, i - 1] - scores[row, i - 1, batch["tokens"][row, i]]
                found.append((nll, z * lse[row, i - 1] ** 2))
        return np.array(found)

    loss, metrics, found = gradients(objectives.next_token(z_loss=z), model, batch)
    nll, penalty = plain().T
    assert loss == pytest.approx(nll.mean() + penalty.mean(), rel=1e-6)
    assert float(metrics["loss"]) == pytest.approx(nll.mean(), rel=1e-6)
    assert int(metrics["count"]) == len(nll) < 0.75 * (batch["segment_ids"] > 0).sum()
    assert set(metrics) == {"loss", "count"} | ({"z_loss"} if z else set())
    if z:
        assert float(metrics["z_loss"]) == pytest.approx(penalty.mean(), rel=1e-6)
    assert_slopes(found, lambda **moved: plain(**moved).sum(1).mean(), model)


def test_a_mask_of_all_tokens_is_none():
    model, batch = Table(), packed(LENGTHS, WIDTH)
    batch["loss_mask"][:] = True
    plain = {name: x for name, x in batch.items() if name != "loss_mask"}
    losses = [gradients(objectives.next_token(), model, b)[0] for b in (batch, plain)]
    assert losses[0] == losses[1]


# --- Preferences ---------------------------------------------------------------------------------
PLAIN = {
    "sigmoid": lambda h, b, e: -(1 - e) * np.log(sigmoid(b * h)) - e * np.log(1 - sigmoid(b * h)),
    "robust": lambda h, b, e: (
        ((e - 1) * np.log(sigmoid(b * h)) + e * np.log(sigmoid(-b * h))) / (1 - 2 * e)
    ),
    "ipo": lambda h, b, e: (h - 0.5 / b) ** 2,
    "hinge": lambda h, b, e: max(0.0, 1 - b * h),
}
VARIANTS = [
    {"nll": 0.0},
    {},
    {"label_smoothing": 0.2},
    {"kind": "robust", "label_smoothing": 0.2},
    {"kind": "ipo"},
    {"kind": "ipo", "length_normalized": True, "reference_free": True},
    {"kind": "hinge", "nll": 1.0},
    {"length_normalized": True},
    {"reference_free": True, "nll": 0.0},
]


def plain_dpo(model, batch, *, kind="sigmoid", nll=0.2, label_smoothing=0.0, **options):
    """Loss with its terms, and the metrics, of every pair by itself."""

    def loss(**moved):
        return np.mean([pair["total"] for pair in each(**moved)])

    def each(**moved):
        sums, counts = segment_sums(model.log_probs(batch["tokens"], **moved), batch, SEGMENTS)
        scores = sums - (0 if options.get("reference_free") else batch["reference"])
        if options.get("length_normalized"):
            scores = scores / np.maximum(counts, 1)
        found = []
        for row, pair in pairs_of(sums, counts):
            chosen, rejected = (row, 2 * pair), (row, 2 * pair + 1)
            h = scores[chosen] - scores[rejected]
            value = {
                "loss": PLAIN[kind](h, BETA, label_smoothing),
                "nll": -sums[chosen] / counts[chosen],
                "accuracy": float(h > 0),
                "margin": BETA * h,
                "chosen_reward": BETA * scores[chosen],
                "rejected_reward": BETA * scores[rejected],
                "chosen_log_prob": sums[chosen],
                "rejected_log_prob": sums[rejected],
            }
            found.append(value | {"total": value["loss"] + nll * value["nll"]})
        return found

    return loss, each()


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: ", ".join(map(str, o.values())))
def test_preference_losses_are_their_formulas(options):
    # With this seed no margin is a small difference of large sums, of which float32 keeps little.
    model, batch = Table(5), batch_of()
    plain, each = plain_dpo(model, batch, **options)
    loss, metrics, found = gradients(objectives.dpo(BETA, **options), model, batch)
    assert loss == pytest.approx(plain(), rel=1e-5)
    assert int(metrics.pop("count")) == len(each) == PAIRS
    assert metrics.keys() == each[0].keys() - {"total"}
    for name, value in metrics.items():
        expected = np.mean([pair[name] for pair in each])
        assert float(value) == pytest.approx(expected, rel=1e-5), name
    assert 0 < metrics["accuracy"] < 1 or options.get("reference_free")
    assert_slopes(found, plain, model)


def test_what_is_no_pair_may_have_any_reference():
    """Not a number, beside an answer alone, behind the last segment, and where a side is empty."""
    model, batch = Table(), batch_of()
    odd = batch["reference"].copy()
    for row, sizes in enumerate(LENGTHS):
        odd[row, len(sizes) // 2 * 2 :] = np.nan
    odd[4, :2] = np.inf
    expected = gradients(objectives.dpo(BETA), model, batch)
    found = gradients(objectives.dpo(BETA), model, batch | {"reference": odd})
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.isfinite(found[0])


def test_a_live_reference_has_no_gradient_and_is_worth_as_much_as_one_from_the_batch():
    model, frozen, batch = Table(0), Table(1), batch_of()
    reference = objectives.segment_log_probs(frozen, batch, segments=SEGMENTS)
    assert reference.shape == (len(LENGTHS), SEGMENTS)
    expected = gradients(objectives.dpo(BETA), model, batch | {"reference": np.array(reference)})

    del batch["reference"]
    for segments in (SEGMENTS, SEGMENTS + 1, None):

        def other(_, batch, segments=segments):
            return objectives.segment_log_probs(frozen, batch, segments=segments)

        found = gradients(objectives.dpo(BETA, reference=other), model, batch)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), found, expected)

    # Of the model itself the loss is log 2 wherever the model stands, but the gradient is not 0.
    live = objectives.dpo(BETA, reference=objectives.segment_log_probs, nll=0.0)
    loss, metrics, found = gradients(live, model, batch)
    assert loss == pytest.approx(np.log(2), rel=1e-6)
    assert float(metrics["margin"]) == 0
    assert np.abs(found["head"]).max() > 0.01


def test_log_probabilities_are_those_of_each_segment():
    model, batch = Table(), batch_of()
    expected, counts = segment_sums(model.log_probs(batch["tokens"]), batch, SEGMENTS)
    np.testing.assert_allclose(objectives.segment_log_probs(model, batch), expected, rtol=1e-5)
    assert (expected[0, :4] < 0).all()
    assert (expected[counts == 0] == 0).all()
    del batch["reference"]
    assert objectives.segment_log_probs(model, batch).shape == (len(LENGTHS), WIDTH)


def test_answers_packed_into_a_row_are_those_in_rows_of_their_own():
    """Of a model that sees what went before: across chunks, and with prompts of the same words."""
    config = presets.tiny(presets.llama4_scout())
    config = dataclasses.replace(config, num_layers=2, pattern=config.pattern[-2:])
    batch = packed([(19, 23, 7), (30, 18)], 50, vocabulary=config.vocab_size)
    apart = packed([(n,) for n in (19, 23, 7, 30, 18)], 50)
    places = [(0, 0, 19), (0, 19, 42), (0, 42, 49), (1, 0, 30), (1, 30, 48)]
    for alone, (row, start, end) in enumerate(places):
        for name in ("tokens", "positions", "loss_mask"):
            apart[name][alone, : end - start] = batch[name][row, start:end]
    run = jax.jit(objectives.segment_log_probs, static_argnames="segments")
    model = build(config)
    together = np.asarray(run(model, batch, segments=3))
    alone = np.asarray(run(model, apart, segments=1))[:, 0]
    np.testing.assert_allclose([*together[0], *together[1, :2]], alone, rtol=2e-5)
    assert together[1, 2] == 0
    assert np.abs(alone).min() > 10


def test_more_segments_than_a_row_may_have_are_not_left_out_in_silence():
    batch = batch_of()
    few = batch | {"reference": batch["reference"][:, :4]}
    found = np.asarray(objectives.segment_log_probs(Table(), few))
    assert np.isnan(found[4]).all()
    assert np.isfinite(found[:4]).all()
    loss, *_ = gradients(objectives.dpo(BETA), Table(), few)
    assert np.isnan(loss)


@pytest.mark.parametrize(
    "objective",
    [
        objectives.next_token(z_loss=0.1),
        objectives.dpo(BETA),
        objectives.dpo(BETA, kind="ipo", length_normalized=True),
        objectives.distill(z_loss=0.1),
    ],
)
def test_nothing_to_learn_is_a_loss_of_zero_with_no_gradient(objective):
    batch = taught(Table(1), batch_of(), 3)
    batch["loss_mask"] = np.zeros_like(batch["loss_mask"])
    loss, metrics, found = gradients(objective, Table(), batch)
    assert (loss, int(metrics["count"])) == (0, 0)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), found)


@pytest.mark.parametrize(
    "objective", [objectives.next_token(), objectives.dpo(BETA), objectives.distill(0.3)]
)
def test_pieces_of_a_batch_are_weighed_by_what_counts_in_them(objective):
    """Of four rows, two pieces of two; one has three pairs, the other one, and other tokens."""
    batch = {name: x[:4] for name, x in taught(Table(1), batch_of(), 3).items()}
    found = []
    for pieces in (1, 2):
        model = Table()
        update = trainer.Update(model, objective, optax.sgd(1.0), accumulate=pieces)
        state = update.first(nnx.to_pure_dict(nnx.state(model)))
        found.append(jax.jit(update.__call__)(state, batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), *found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "kto"}, "'kto' is unknown; use one of sigmoid, robust, ipo, hinge"),
        ({"beta": 0.0}, "beta 0.0 must be above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing 0.5 must be .* below 0.5"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "label_smoothing 0.1 has no meaning for 'ipo'"),
        ({"reference": print, "reference_free": True}, "leave one out"),
    ],
)
def test_impossible_preferences_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        objectives.dpo(**options)


def test_a_batch_without_a_reference_is_refused():
    batch = packed(LENGTHS, WIDTH)
    with pytest.raises(ValueError, match="no 'reference': add one by teacher.reference"):
        objectives.dpo(BETA)(Table(), batch)


# --- Distillation --------------------------------------------------------------------------------
def taught(teacher, batch, k):
    """The batch with the k likeliest tokens after each, by float64."""
    scores = teacher.log_probs(batch["tokens"])
    ids = np.argsort(-scores, axis=-1)[..., :k]
    values = np.take_along_axis(scores, ids, axis=-1)
    return batch | {
        "teacher_ids": ids.astype(np.int32),
        "teacher_log_probs": values.astype(np.float32),
    }


def plain_distill(model, teacher, batch, k, soft, temperature):
    """The mix of both, one token at a time; every id beside k in one outcome."""
    whole = teacher.log_probs(batch["tokens"])

    def outcomes(log_probs, ids):
        p = np.exp(log_probs[ids])
        p = np.append(p, max(1 - p.sum(), 1e-6)) ** (1 / temperature)
        return p / p.sum()

    def each(**moved):
        scores, found = model.log_probs(batch["tokens"], **moved), []
        for row, i in zip(*np.nonzero(batch["loss_mask"]), strict=True):
            if i == 0 or batch["segment_ids"][row, i] != batch["segment_ids"][row, i - 1]:
                continue
            ids = np.argsort(-whole[row, i - 1])[:k]
            q, p = outcomes(whole[row, i - 1], ids), outcomes(scores[row, i - 1], ids)
            kl = temperature**2 * (q * np.log(q / p)).sum()
            found.append((kl, -scores[row, i - 1, batch["tokens"][row, i]]))
        return np.mean(found, axis=0)

    def loss(**moved):
        kl, hard = each(**moved)
        return soft * kl + (1 - soft) * hard

    return loss, each()


@pytest.mark.parametrize(
    ("k", "soft", "temperature"), [(3, 0.3, 1.0), (5, 1.0, 2.5), (VOCABULARY, 0.5, 1.0)]
)
def test_distillation_is_a_divergence_and_a_cross_entropy(k, soft, temperature):
    model, teacher = Table(), Table(1)
    batch = taught(teacher, packed(LENGTHS, WIDTH), k)
    plain, (kl, hard) = plain_distill(model, teacher, batch, k, soft, temperature)
    objective = objectives.distill(soft, temperature=temperature)
    loss, metrics, found = gradients(objective, model, batch)
    assert loss == float(metrics["loss"]) == pytest.approx(plain(), rel=1e-5)
    assert float(metrics["soft"]) == pytest.approx(kl, rel=1e-5)
    assert float(metrics["hard"]) == pytest.approx(hard, rel=1e-5)
    assert int(metrics["count"]) == int(objectives.targets(batch)[1].sum())
    assert kl > 0.4
    assert_slopes(found, plain, model)


def test_a_batch_may_change_the_weight_of_the_teacher():
    model, batch = Table(), taught(Table(1), packed(LENGTHS, WIDTH), 3)
    expected = gradients(objectives.distill(0.25), model, batch)
    batch["soft_weight"] = np.float32(0.25)
    found = gradients(objectives.distill(0.9), model, batch)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert float(found[1]["soft_weight"]) == 0.25


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_who_agrees_with_the_teacher_has_nothing_to_learn(temperature):
    model = Table()
    batch = taught(model, packed(LENGTHS, WIDTH), 4)
    objective = objectives.distill(1.0, temperature=temperature, z_loss=0.0)
    loss, _, found = gradients(objective, model, batch)
    assert abs(loss) < 1e-6
    assert max(np.abs(x).max() for x in jax.tree.leaves(found)) < 1e-5


def test_probability_taken_from_other_tokens_counts():
    """Twice as likely as the teacher has them, all k, is no agreement."""
    teacher = jnp.log(jnp.array([0.2, 0.1]))
    apart = objectives.divergence(teacher, teacher + jnp.log(2.0), 1.0)
    assert float(apart) == pytest.approx(0.3 * np.log(0.5) + 0.7 * np.log(0.7 / 0.4), rel=1e-5)
    whole = jnp.log(jnp.array([0.6, 0.4]))
    assert float(objectives.divergence(whole, whole, 1.0)) == pytest.approx(0, abs=1e-6)
    assert np.isfinite(float(objectives.divergence(whole, whole - 30, 1.0)))


def test_the_weight_falls_along_half_a_cosine():
    weights = [float(objectives.soft_weight(step, 101)) for step in range(120)]
    assert weights[0] == 1
    assert weights[50] == pytest.approx(0.5)
    assert weights[25] == pytest.approx((1 + np.sqrt(0.5)) / 2)
    assert weights[100:] == pytest.approx([0] * 20, abs=1e-7)
    assert (np.diff(weights[:101]) < 0).all()
    assert float(objectives.soft_weight(9, 10, first=0.2, last=0.7)) == pytest.approx(0.7)
    assert float(objectives.soft_weight(0, 1)) == 1
    assert objectives.soft_weight(3, 10).dtype == np.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"soft": 1.5}, "soft 1.5 must be"),
        ({"temperature": 0.0}, "temperature 0.0 must be above 0"),
    ],
)
def test_impossible_distillations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        objectives.distill(**options)
