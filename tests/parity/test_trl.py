"""Preference, reward and distillation losses against TRL's own code, on the same weights.

TRL's loss methods are called on stand-ins for its trainers and models, one pair at a time: some of
its losses mean over the tokens of a batch where ours, and the papers, mean over pairs.
"""

from __future__ import annotations

import collections
import types

import numpy as np
import pytest
from flax import nnx
from objective_toys import VOCABULARY, Table, gradients, packed

from l4jax.training import objectives
from l4jax.training.rewards import RewardModel

torch = pytest.importorskip("torch", reason="needs torch: pip install l4jax[parity]")
dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="needs trl: l4jax[parity]")
reward_trainer = pytest.importorskip("trl.trainer.reward_trainer", reason="needs trl")

pytestmark = pytest.mark.parity

LENGTHS = [(5, 7, 9, 3), (12, 11), (4, 6, 8, 8)]
WIDTH, SEGMENTS, BETA, SMOOTHING = 29, 4, 0.3, 0.2


def batch_of():
    batch = packed(LENGTHS, WIDTH)
    rng = np.random.default_rng(9)
    return batch | {"reference": rng.normal(-9, 3, (len(LENGTHS), SEGMENTS)).astype(np.float32)}


def segment(batch, row, number):
    """Tokens and mask of a segment; a token's mask says that it is to be predicted."""
    here = batch["segment_ids"][row] == number
    return batch["tokens"][row, here], batch["loss_mask"][row, here]


class Weights:
    """The toy's weights in float64, and its forward pass."""

    def __init__(self, model):
        self.embed, self.head = (
            torch.tensor(
                np.asarray(getattr(model, name)[...]), dtype=torch.float64
            ).requires_grad_()
            for name in ("embed", "head")
        )

    def hidden(self, ids):
        x = self.embed[ids]
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)

    def gradients(self):
        return {"embed": self.embed.grad.numpy(), "head": self.head.grad.numpy()}


class Causal:
    """What TRL's loss asks of a model whose head it has fused: log-probabilities of the labels."""

    training = False

    def __init__(self, weights):
        self.weights = weights

    def __call__(self, *, input_ids, labels, **_):
        scores = torch.log_softmax(self.weights.hidden(input_ids) @ self.weights.head, -1)[:, :-1]
        wanted = labels[:, 1:]
        picked = scores.gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
        found = torch.where(wanted >= 0, picked, 0.0)
        same = dict.fromkeys(("entropy", "mean_logits", "is_top1"), torch.zeros_like(found))
        return types.SimpleNamespace(log_probs=found, **same | {"is_top1": found > 1})


def stand_in(model, **fields):
    alone = types.SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    return types.SimpleNamespace(
        model=model,
        accelerator=alone,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **fields,
    )


def padded(parts):
    """Chosen and rejected as rows, padded on the right."""
    length = max(len(part) for part in parts)
    return torch.tensor(np.stack([np.pad(part, (0, length - len(part))) for part in parts]))


def trl_dpo(model, batch, terms, *, smoothing=0.0, reference_free=False):
    """Loss, metrics and gradients of TRL: means over pairs."""
    weights = Weights(model)
    losses, metrics = [], collections.defaultdict(list)
    for row, sizes in enumerate(LENGTHS):
        for pair in range(len(sizes) // 2):
            sides = [segment(batch, row, 2 * pair + 1 + side) for side in (0, 1)]
            trainer = stand_in(
                Causal(weights),
                aux_loss_enabled=False,
                ld_alpha=None,
                precompute_ref_logps=True,
                f_divergence_type="reverse_kl",
                loss_types=list(terms),
                loss_weights=list(terms.values()),
                beta=BETA,
                label_smoothing=smoothing,
                use_weighting=False,
            )
            reference = batch["reference"][row, 2 * pair : 2 * pair + 2].astype(np.float64)
            reference = torch.tensor(reference * (not reference_free))[:, None]
            inputs = {
                "input_ids": padded([tokens for tokens, _ in sides]).long(),
                "attention_mask": padded([np.ones_like(tokens) for tokens, _ in sides]),
                "completion_mask": padded([mask for _, mask in sides]).long(),
                "ref_chosen_logps": reference[0],
                "ref_rejected_logps": reference[1],
            }
            compute = dpo_trainer.DPOTrainer._compute_loss
            losses.append(compute(trainer, trainer.model, inputs, False))
            for name, values in trainer._metrics["eval"].items():
                if "/" in name:
                    metrics[name] += values
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), metrics, weights.gradients()


@pytest.mark.parametrize(
    ("ours", "terms", "theirs"),
    [
        ({"nll": 0.0}, {"sigmoid": 1.0}, {}),
        ({"nll": 0.2}, {"sigmoid": 1.0, "sft": 0.2}, {}),
        ({"nll": 1.0, "kind": "hinge"}, {"hinge": 1.0, "sft": 1.0}, {}),
        ({"nll": 0.0, "kind": "ipo", "length_normalized": True}, {"ipo": 1.0}, {}),
        ({"nll": 0.0, "length_normalized": True}, {"sigmoid_norm": 1.0}, {}),
        (
            {"nll": 0.0, "kind": "robust", "label_smoothing": SMOOTHING},
            {"robust": 1.0},
            {"smoothing": SMOOTHING},
        ),
        # Of a single pair, which there is nothing to sort with, AOT is DPO with smoothed labels.
        ({"nll": 0.0, "label_smoothing": SMOOTHING}, {"aot": 1.0}, {"smoothing": SMOOTHING}),
        ({"nll": 0.0, "reference_free": True}, {"sigmoid": 1.0}, {"reference_free": True}),
        (
            {"nll": 0.2, "reference_free": True, "length_normalized": True},
            {"sigmoid_norm": 1.0, "sft": 0.2},
            {"reference_free": True},
        ),
    ],
    ids=lambda x: "+".join(x) if x and "nll" not in x else "",
)
def test_preference_losses_are_trl_s(ours, terms, theirs):
    model, batch = Table(), batch_of()
    loss, metrics, found = gradients(objectives.dpo(BETA, **ours), model, batch)
    expected, their_metrics, slopes = trl_dpo(model, batch, terms, **theirs)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, slope in slopes.items():
        np.testing.assert_allclose(
            found[name], slope, atol=4e-6 * np.abs(slope).max(), err_msg=name
        )
    names = {"logps/chosen": "chosen_log_prob", "logps/rejected": "rejected_log_prob"}
    if not ours.get("length_normalized"):
        names |= {"rewards/chosen": "chosen_reward", "rewards/rejected": "rejected_reward"}
        names |= {"rewards/margins": "margin", "rewards/accuracies": "accuracy"}
    for name, our_name in names.items():
        assert len(their_metrics[name]) == 5
        assert float(metrics[our_name]) == pytest.approx(np.mean(their_metrics[name]), rel=1e-5)


def test_ranking_of_two_answers_is_trl_s_reward_loss():
    """Both read it at the last token; their batch is all chosen answers, then all rejected ones."""
    model, batch = RewardModel(Table(), rngs=nnx.Rngs(5)), batch_of()
    model.head.set_value(20 * model.head[...])
    batch["groups"] = np.array([[1, 1, 2, 2]] * 3, np.int32)
    batch["ranks"] = np.array([[1, 0, 1, 0]] * 3, np.int32)
    loss, metrics, found = gradients(objectives.ranking(), model, batch)

    weights = Weights(Table())
    head = torch.tensor(np.asarray(model.head[...]), dtype=torch.float64).requires_grad_()
    pairs = [(row, pair) for row, sizes in enumerate(LENGTHS) for pair in range(len(sizes) // 2)]
    last = [segment(batch, r, 2 * p + 1 + side)[0][-1] for side in (0, 1) for r, p in pairs]

    def classifier(**_):
        return types.SimpleNamespace(logits=(weights.hidden(torch.tensor(last)) @ head)[:, None])

    classifier.training = False
    trainer = stand_in(classifier, args=types.SimpleNamespace(center_rewards_coefficient=None))
    expected = reward_trainer.RewardTrainer.compute_loss(trainer, classifier, {})
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert int(metrics["count"]) == len(pairs) == 5
    slope = head.grad.numpy()
    np.testing.assert_allclose(found["head"], slope, atol=4e-6 * np.abs(slope).max())
    for name in ("accuracy", "margin"):
        assert float(metrics[name]) == pytest.approx(trainer._metrics["eval"][name][0], rel=1e-5)


def test_the_divergence_from_all_of_a_teacher_s_tokens_is_trl_s():
    """With every token listed, what is left for others is a millionth."""
    distillation = pytest.importorskip("trl.trainer.distillation_trainer", reason="needs trl")
    student, teacher, batch = Table(), Table(1), packed(LENGTHS, WIDTH)
    _, counted = objectives.targets(batch)
    ids = np.broadcast_to(np.arange(VOCABULARY, dtype=np.int32), (3, WIDTH, VOCABULARY))
    log_probs = teacher.log_probs(batch["tokens"]).astype(np.float32)
    taught = batch | {"teacher_ids": ids, "teacher_log_probs": log_probs}
    loss, _, found = gradients(objectives.distill(1.0), student, taught)

    ours, theirs = Weights(student), Weights(teacher)
    tokens = torch.tensor(batch["tokens"])
    expected, _, count = distillation._chunked_divergence_loss(
        ours.hidden(tokens),
        theirs.hidden(tokens).detach(),
        ours.head.T,
        theirs.head.T.detach(),
        torch.tensor(np.asarray(counted)).long(),
        0.0,
    )
    expected.backward()
    assert int(count) == int(counted.sum())
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, slope in ours.gradients().items():
        np.testing.assert_allclose(
            found[name], slope, atol=1e-5 * np.abs(slope).max(), err_msg=name
        )
