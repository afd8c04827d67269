"""Rewards are read at the last token of an answer, and learn its rank among a prompt's answers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import build
from flax import nnx
from jax.sharding import PartitionSpec
from objective_toys import Table, gradients, packed

from l4jax import paths, presets, sharding
from l4jax.models.llama4 import Llama
from l4jax.training import objectives, trainer
from l4jax.training.rewards import RewardModel

LENGTHS = [(5, 7, 4, 6), (9, 8, 5), (8,), (), (3, 1, 6, 8, 3)]
WIDTH, SEGMENTS = 26, 6
GROUPS = [[1, 1, 1, 0, 0, 0], [1, 2, 2, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0] * 6, [2, 2, 1, 1, 1, 0]]
RANKS = [[1, 2, 0, 9, 0, 0], [7, 0, 1, 0, 0, 0], [2, 0, 0, 0, 0, 0], [0] * 6, [1, 1, 0, 1, 0, 0]]
"""Three pairs (the fourth answer is in no group); one, beside a group of one; none; padding; two of
equal answers and two of a best one: six pairs."""


def batch_of():
    batch = packed(LENGTHS, WIDTH)
    return batch | {"groups": np.array(GROUPS, np.int32), "ranks": np.array(RANKS, np.int32)}


def plain(model, batch, head):
    """Rewards [b s] and the loss of each pair, float64."""
    x = np.asarray(model.embed[...], np.float64)[batch["tokens"]]
    x /= np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)
    rewards = np.zeros((len(LENGTHS), SEGMENTS))
    for row, sizes in enumerate(LENGTHS):
        for number, end in enumerate(np.cumsum(sizes)):
            rewards[row, number] = x[row, end - 1] @ head
    margins = [
        rewards[row, i] - rewards[row, j]
        for row in range(len(LENGTHS))
        for i in range(SEGMENTS)
        for j in range(SEGMENTS)
        if GROUPS[row][i] == GROUPS[row][j] > 0 and RANKS[row][i] > RANKS[row][j]
    ]
    return rewards, np.array(margins)


def test_ranking_is_the_mean_over_all_better_and_worse_answers_of_a_group():
    model, batch = RewardModel(Table(), rngs=nnx.Rngs(5)), batch_of()
    model.head.set_value(20 * model.head[...])
    head = np.asarray(model.head[...], np.float64)
    rewards, margins = plain(model.backbone, batch, head)
    losses = np.log1p(np.exp(-margins))
    loss, metrics, found = gradients(objectives.ranking(), model, batch)
    assert len(margins) == int(metrics["count"]) == 6
    assert loss == float(metrics["loss"]) == pytest.approx(losses.mean(), rel=1e-5)
    assert float(metrics["margin"]) == pytest.approx(margins.mean(), rel=1e-4)
    assert float(metrics["accuracy"]) == pytest.approx((margins > 0).mean(), rel=1e-6)
    assert 0 < (margins > 0).mean() < 1
    seen = objectives.segment_rewards(model, jax.tree.map(jnp.asarray, batch), SEGMENTS)
    np.testing.assert_allclose(seen, rewards, rtol=1e-4, atol=1e-6)
    for i in range(len(head)):
        ends = []
        for step in (1e-5, -1e-5):
            moved = head.copy()
            moved[i] += step
            ends.append(np.log1p(np.exp(-plain(model.backbone, batch, moved)[1])).mean())
        assert found["head"][i] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-5)


def test_rows_without_pairs_have_no_loss():
    batch = batch_of()
    batch["ranks"][:] = 1
    model = RewardModel(Table(), rngs=nnx.Rngs(5))
    loss, metrics, found = gradients(objectives.ranking(), model, batch)
    assert (loss, int(metrics["count"])) == (0, 0)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), found)


def test_pieces_weigh_by_their_pairs():
    batch = {name: x[:4] for name, x in batch_of().items()}
    found = []
    for pieces in (1, 2):
        model = RewardModel(Table(), rngs=nnx.Rngs(5))
        update = trainer.Update(model, objectives.ranking(), optax.sgd(1.0), accumulate=pieces)
        found.append(
            jax.jit(update.__call__)(update.first(nnx.to_pure_dict(nnx.state(model))), batch)
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), *found)


CONFIG = presets.tiny(presets.llama4_scout())
CONFIG = dataclasses.replace(CONFIG, num_layers=2, pattern=CONFIG.pattern[-2:])


def test_a_reward_model_has_a_decoder_and_a_small_head_and_leaves_its_start_alone():
    llama = build(CONFIG)
    before = paths.names(nnx.to_pure_dict(nnx.state(llama)))
    model = RewardModel(llama, rngs=nnx.Rngs(0))
    names = paths.names(nnx.to_pure_dict(nnx.state(model)))
    assert "head" in before
    assert set(names) == {f"backbone.{name}" for name in before if name != "head"} | {"head"}
    assert paths.names(nnx.to_pure_dict(nnx.state(llama))) == before
    assert model.head.shape == (CONFIG.embed_dim,)
    assert 0.5 < float(model.head[...].std()) * CONFIG.embed_dim < 2
    tokens = np.arange(40, dtype=np.int32).reshape(2, 20)
    rewards, routing = jax.jit(lambda model, x: model.rewards(x))(model, tokens)
    assert (rewards.shape, rewards.dtype) == ((2, 20), jnp.float32)
    assert routing.load.shape[0] == 2


@pytest.mark.slow
def test_on_a_mesh_the_head_lies_with_the_decoder_and_learns():
    """Made in place, or from a model that lies there."""
    lies = PartitionSpec(("fsdp", "expert", "context"))
    with sharding.use(sharding.make_mesh(fsdp=2, tensor=2, context=2)):
        graph, state = nnx.split(build(CONFIG))
        llama = nnx.merge(graph, jax.device_put(state, sharding.shardings(state)))
        model = RewardModel(llama, rngs=nnx.Rngs(0))
        assert model.head[...].sharding.spec == lies
        model = sharding.create(
            lambda: RewardModel(Llama(CONFIG, rngs=nnx.Rngs(1)), rngs=nnx.Rngs(0))
        )
        assert model.head[...].sharding.spec == lies
        batch = packed([(9, 8, 7), (12, 11)] * 4, 32, vocabulary=CONFIG.vocab_size)
        batch["groups"] = np.array([[1, 1, 1], [1, 1, 0]] * 4, np.int32)
        batch["ranks"] = np.array([[2, 1, 0], [0, 1, 0]] * 4, np.int32)
        training = trainer.Training(model, objectives.ranking(), optax.adam(3e-3))
        losses = [float(m["loss"]) for m in training.run([batch] * 8, 8)]
    assert losses[0] == pytest.approx(np.log(2), rel=0.1)
    assert losses[-1] < 0.3
