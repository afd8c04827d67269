"""The objective is the loss it says it is, and the loop does what a plain loop does."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import build, forward
from flax import nnx

from l4jax import presets, sharding
from l4jax.config import Layer
from l4jax.models.llama4 import Llama
from l4jax.training import objectives, optimizers, schedules, trainer

SCOUT = presets.tiny(presets.llama4_scout())
ROUTED = dataclasses.replace(
    SCOUT,
    num_layers=2,
    embed_dim=32,
    vocab_size=32,
    mlp_dim=48,
    pattern=(Layer("chunked", "moe"),),
    moe=dataclasses.replace(SCOUT.moe, num_experts=4, mlp_dim=24, shared_mlp_dim=24),
)
DENSE = dataclasses.replace(ROUTED, pattern=(Layer("causal", "dense"),), moe=None)
ROWS, LENGTH = 3, 40


def model_of(config=ROUTED, **execution):
    return build(config, **execution)


def batch_of(seed=0):
    """Rows of several segments; the first one ends in padding."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(1, 4, (ROWS, LENGTH)), axis=1)
    segments[0, 33:] = 0
    changed = np.diff(segments, axis=1, prepend=-1) != 0
    starts = np.maximum.accumulate(np.where(changed, np.arange(LENGTH), 0), axis=1)
    return {
        "tokens": rng.integers(0, ROUTED.vocab_size, (ROWS, LENGTH)).astype(np.int32),
        "segment_ids": segments.astype(np.int32),
        "positions": (np.arange(LENGTH) - starts).astype(np.int32),
    }


def cross_entropies(model, batch):
    """The loss of every target that counts, one row and one token at a time."""
    logits = np.asarray(
        forward(model, batch["tokens"], batch["positions"], batch["segment_ids"]),
        np.float64,
    )
    found = []
    for row, (ids, segments) in enumerate(zip(batch["tokens"], batch["segment_ids"], strict=True)):
        for i in range(LENGTH - 1):
            if segments[i] == segments[i + 1] != 0:
                scores = logits[row, i]
                found.append(np.log(np.exp(scores).sum()) - scores[ids[i + 1]])
    return np.array(found)


def flat(tree):
    """The leaves of a nested dictionary by their joined names."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


@functools.cache
def plain_objective():
    """The objective without a balance term, compiled once."""
    return jax.jit(objectives.next_token())


@functools.cache
def compiled(balance=0.0):
    """The objective's value with its metrics and its gradient, as nested dictionaries."""
    objective = objectives.next_token(balance=balance)

    @jax.jit
    def measure(model, batch):
        graph, state = nnx.split(model)

        def loss(params):
            nnx.replace_by_pure_dict(state, params)
            return objective(nnx.merge(graph, state), batch)

        return jax.value_and_grad(loss, has_aux=True)(nnx.to_pure_dict(state))

    return measure


# --- Objectives ----------------------------------------------------------------------------------
@pytest.mark.parametrize("config", [ROUTED, DENSE], ids=["experts", "dense"])
def test_loss_is_the_mean_cross_entropy_of_targets_inside_segments(config):
    model, batch = model_of(config), batch_of()
    expected = cross_entropies(model, batch)
    loss, metrics = plain_objective()(model, batch)
    assert float(loss) == pytest.approx(expected.mean(), rel=1e-5)
    assert float(metrics["loss"]) == float(loss)
    assert int(metrics["count"]) == len(expected) < ROWS * (LENGTH - 1) - 6


def test_what_lies_behind_a_border_changes_nothing():
    """Neither another segment's tokens nor padding are targets, or seen."""
    model, batch = model_of(), batch_of()
    objective = plain_objective()
    only = batch["segment_ids"] == 2
    changed = batch | {"tokens": np.where(only, batch["tokens"], 5)}

    def loss(batch):
        segments = np.where(only, 2, 0).astype(np.int32)
        return float(objective(model, batch | {"segment_ids": segments})[0])

    assert loss(changed) == loss(batch)


def test_a_batch_without_targets_gives_zero_and_no_nan():
    batch = batch_of()
    batch["segment_ids"] = np.zeros_like(batch["segment_ids"])
    (loss, metrics), gradient = compiled()(model_of(), batch)
    assert (float(loss), int(metrics["count"])) == (0, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_balance_is_added_to_the_loss_but_not_to_its_metric():
    model, batch = model_of(), batch_of()
    plain, plain_metrics = plain_objective()(model, batch)
    (loss, metrics), _ = compiled(0.5)(model, batch)
    assert float(loss) == pytest.approx(float(plain + 0.5 * metrics["router_balance"]), rel=1e-6)
    assert float(metrics["loss"]) == pytest.approx(float(plain_metrics["loss"]), rel=1e-6)
    assert float(metrics["router_balance"]) > 0.9


def test_the_gradient_of_balance_reaches_every_router_and_no_head():
    model, batch = model_of(), batch_of()
    (_, plain), (_, balanced) = compiled()(model, batch), compiled(0.5)(model, batch)
    change = jax.tree.map(lambda a, b: np.abs(a - b), flat(balanced), flat(plain))
    routers = [name for name in change if name.endswith("router")]
    assert len(routers) == len(ROUTED.pattern)
    for name in routers:
        assert (change[name].max(axis=(1, 2)) > 1e-4).all(), f"{name}: one entry per period"
    assert change["head"].max() < 1e-6


def test_router_metrics_describe_every_layer():
    _, metrics = plain_objective()(model_of(), batch_of())
    assert metrics["expert_load"].shape == (ROUTED.num_layers, ROUTED.moe.num_experts)
    assert (metrics["expert_load"].sum(1) == ROWS * LENGTH).all()
    assert 0 < float(metrics["router_entropy"]) <= math.log(ROUTED.moe.num_experts)


def test_a_dense_model_has_no_router_metrics_and_ignores_balance():
    model, batch = model_of(DENSE), batch_of()
    loss, metrics = jax.jit(objectives.next_token(balance=9.0))(model, batch)
    assert set(metrics) == {"loss", "count"}
    assert float(loss) == float(metrics["loss"])


# --- The loop ------------------------------------------------------------------------------------
STEPS = 4


def optimizer():
    return optimizers.adamw(schedules.warmup_cosine(1e-2, steps=10, warmup=2))


@pytest.fixture(scope="module")
def trained():
    """A training after a few steps, and the metrics that it yielded."""
    training = trainer.Training(model_of(), objectives.next_token(balance=0.5), optimizer())
    return training, list(training.run(map(batch_of, itertools.count()), STEPS))


@pytest.fixture(scope="module")
def plain():
    """Losses, gradient norms and last parameters of the same training, written as a plain loop."""
    model, rule = model_of(), optimizer()
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    update = jax.jit(rule.update)
    moments, losses, norms = rule.init(params), [], []
    for step in range(STEPS):
        nnx.replace_by_pure_dict(state, params)
        (_, metrics), gradient = compiled(0.5)(nnx.merge(graph, state), batch_of(step))
        losses.append(float(metrics["loss"]))
        squares = sum(np.square(np.asarray(g, np.float64)).sum() for g in jax.tree.leaves(gradient))
        norms.append(math.sqrt(squares))
        updates, moments = update(gradient, moments, params)
        params = optax.apply_updates(params, updates)
    return losses, norms, params


def test_metrics_come_once_for_each_step_and_in_order(trained):
    _, metrics = trained
    assert [m["step"] for m in metrics] == list(range(STEPS))
    assert all(m["seconds"] > 0 for m in metrics)
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(metrics))


def test_losses_and_gradient_norms_are_those_of_a_plain_loop(trained, plain):
    losses, norms, _ = plain
    assert [float(m["loss"]) for m in trained[1]] == pytest.approx(losses, rel=2e-5)
    assert [float(m["grad_norm"]) for m in trained[1]] == pytest.approx(norms, rel=2e-4)
    assert len(set(losses)) == STEPS


def test_parameters_end_where_a_plain_loop_ends(trained, plain):
    """Adam divides by the gradient's size, so that rounding shows where a gradient is nearly 0."""
    found = flat(nnx.to_pure_dict(nnx.state(trained[0].model)))
    for name, expected in flat(plain[2]).items():
        np.testing.assert_allclose(found[name], expected, atol=1e-3, err_msg=name)


def dense_training():
    objective = objectives.next_token()
    return trainer.Training(model_of(DENSE), objective, optax.sgd(0.05))


def distance(model, batch):
    """An objective that is no language model's, and compiles at once: how far the head is off."""
    loss = jnp.square(model.head[...] - batch["target"]).sum()
    return loss, {"loss": loss, "count": jnp.int32(1)}


def toy_training():
    return trainer.Training(model_of(DENSE), distance, optax.adam(0.05))


def target(step):
    return {"target": np.float32(step)}


def test_the_same_start_gives_the_same_bits():
    one, other = (list(toy_training().run(map(target, range(5)), 5)) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        names = {"step", "seconds", "loss", "count", "grad_norm", "skipped"}
        assert a.keys() == b.keys() == names
        for key in a.keys() - {"seconds"}:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_a_step_is_read_when_the_next_one_has_begun():
    """So that the device never waits for the host; no batch is taken that is not used."""
    taken = []
    batches = (taken.append(i) or target(i) for i in itertools.count())
    run = toy_training().run(batches, 3)
    assert taken == []
    seen = [(m["step"], len(taken)) for m in run]
    assert seen == [(0, 2), (1, 3), (2, 3)]
    assert taken == [0, 1, 2]


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "tensor": 2}], ids=["plain", "mesh"])
def test_the_step_is_compiled_once_and_moments_lie_where_their_parameters_do(mesh, caplog):
    """A state that comes out placed otherwise than it went in would compile the step again."""
    with sharding.use(sharding.make_mesh(**mesh)) if mesh else contextlib.nullcontext():
        model = sharding.create(lambda: Llama(DENSE, rngs=nnx.Rngs(0)))
        training = trainer.Training(model, distance, optimizer())
        before = jax.tree.map(lambda x: x.sharding, training.state)
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            assert len(list(training.run(map(target, range(3)), 3))) == 3
    compilations = [m for m in caplog.messages if "Finished XLA compilation of jit(step)" in m]
    assert len(compilations) == 1
    after = jax.tree.map(lambda x: x.sharding, training.state)
    moments = optax.tree.get(before.optimizer, "mu")
    same = jax.tree.map(
        lambda x, a, b, c: a.is_equivalent_to(b, x.ndim) and b.is_equivalent_to(c, x.ndim),
        training.state.params,
        before.params,
        after.params,
        moments,
    )
    assert all(jax.tree.leaves(same))


def test_a_run_ends_when_batches_or_steps_do():
    training = toy_training()
    assert [m["step"] for m in training.run([target(0)], 5)] == [0]
    assert list(training.run([], 5)) == []
    assert list(training.run([target(0)], 0)) == []


def test_a_model_taken_from_a_training_is_whole_until_the_next_step():
    """Steps donate their state: the loop and evaluation go on with the new one."""
    training, batch = toy_training(), target(1)
    start = training.model
    losses = [trainer.evaluate(start, distance, [batch])["loss"]]
    list(training.run([batch] * 2, 2))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(nnx.state(start)))
    losses.append(trainer.evaluate(training.model, distance, [batch])["loss"])
    list(training.run([batch] * 2, 2))
    losses.append(trainer.evaluate(training.model, distance, [batch])["loss"])
    assert losses[0] > losses[1] > losses[2]
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(training.state))
    assert training.model.config == DENSE


def test_twenty_steps_learn_to_count():
    """The next id is always one more: below a uniform guess at once, and nearly solved."""
    model = model_of(DENSE)
    schedule = schedules.warmup_cosine(2e-2, steps=20, warmup=2)
    training = trainer.Training(model, objectives.next_token(), optimizers.adamw(schedule))

    def counting(step):
        starts = np.random.default_rng(step).integers(0, 32, (16, 1))
        ids = (starts + np.arange(16)) % DENSE.vocab_size
        position = np.broadcast_to(np.arange(16, dtype=np.int32), ids.shape)
        ones = np.ones(ids.shape, np.int32)
        return {"tokens": ids.astype(np.int32), "segment_ids": ones, "positions": position}

    losses = [float(m["loss"]) for m in training.run(map(counting, itertools.count()), 20)]
    assert losses[0] > math.log(DENSE.vocab_size) - 0.1
    assert losses[-1] < 0.5 * math.log(DENSE.vocab_size)


# --- Evaluation ----------------------------------------------------------------------------------
def test_evaluation_weighs_batches_by_their_tokens():
    model, batches = model_of(), [batch_of(0), batch_of(1)]
    batches[1]["segment_ids"][:, 4:] = 0
    parts = [cross_entropies(model, batch) for batch in batches]
    found = trainer.evaluate(model, plain_objective(), batches)
    assert len(parts[0]) > 5 * len(parts[1]) > 0
    assert found["loss"] == pytest.approx(np.concatenate(parts).mean(), rel=1e-5)
    assert found["count"] == len(parts[0]) + len(parts[1])
    load = found["expert_load"]
    assert load.shape == (ROUTED.num_layers, ROUTED.moe.num_experts)
    assert (load.sum(1) == 2 * ROWS * LENGTH).all()


def test_evaluation_of_a_dense_model_has_no_load_and_leaves_it_alone():
    model = model_of(DENSE)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    assert trainer.evaluate(model, plain_objective(), [batch_of()])["expert_load"] is None
    after = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("batches", [[], [{"target": np.float32(0)}]])
def test_nothing_to_evaluate_is_an_error(batches):
    """No batch, or none with a token that counts."""

    def objective(model, batch):
        loss, metrics = distance(model, batch)
        return loss, metrics | {"count": jnp.int32(0)}

    with pytest.raises(ValueError, match="nothing to evaluate"):
        trainer.evaluate(model_of(DENSE), objective, batches)
