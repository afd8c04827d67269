"""Updates of a part of the parameters, of batches of any arrays, and of what is not finite."""

import contextlib
import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import build
from flax import nnx
from jax.sharding import PartitionSpec

from l4jax import paths, presets, sharding
from l4jax.config import Layer
from l4jax.kernels import quantized
from l4jax.models.llama4 import Llama
from l4jax.training import objectives, trainer

SCOUT = presets.tiny(presets.llama4_scout())
CONFIG = dataclasses.replace(
    SCOUT,
    num_layers=2,
    embed_dim=32,
    vocab_size=32,
    mlp_dim=48,
    pattern=(Layer("causal", "dense"),),
    moe=None,
)
ROWS, LENGTH = 4, 12
BATCH = {"tokens": np.random.default_rng(0).integers(0, 32, (ROWS, LENGTH)).astype(np.int32)}


def flat(tree):
    return {paths.name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def head_only(name):
    return name == "head"


def training(model=None, objective=None, optimizer=None, **options):
    return trainer.Training(
        model or build(CONFIG),
        objective or objectives.next_token(),
        optimizer or optax.adam(0.01),
        **options,
    )


def quantize(model, *names):
    """The model with these weights in int8."""
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    for name in names:
        w = params["layers"][0]["ffn"][name]
        values, scale = quantized.quantize(np.asarray(w), "int8")
        params["layers"][0]["ffn"][name] = quantized.Quantized(
            jnp.asarray(values), jnp.asarray(scale)
        )
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, jax.device_put(state, sharding.shardings(state)))


# --- A part of the parameters --------------------------------------------------------------------
def test_frozen_parameters_have_no_optimizer_state_and_keep_their_bits():
    whole, part = training(), training(trainable=head_only)
    before = jax.tree.map(np.array, flat(part.state.params))
    assert flat(optax.tree.get(part.state.optimizer, "mu")).keys() == {"head"}
    (theirs,), (ours,) = list(whole.run([BATCH], 1)), list(part.run([BATCH], 1))
    assert ours["loss"] == theirs["loss"]
    assert 0 < ours["grad_norm"] < theirs["grad_norm"]
    after, expected = flat(part.state.params), flat(whole.state.params)
    for name, value in before.items():
        if name != "head":
            np.testing.assert_array_equal(after[name], value, err_msg=name)
    np.testing.assert_allclose(after["head"], expected["head"], atol=1e-6)
    assert not np.array_equal(after["head"], before["head"])


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "tensor": 2}], ids=["plain", "mesh"])
def test_what_is_frozen_may_be_quantized(mesh, caplog):
    with sharding.use(sharding.make_mesh(**mesh)) if mesh else contextlib.nullcontext():
        model = quantize(sharding.create(lambda: Llama(CONFIG, rngs=nnx.Rngs(0))), "gate", "up")
        run = training(model, trainable=paths.chosen(["*.down", "norm.scale"]))
        names = flat(optax.tree.get(run.state.optimizer, "mu")).keys()
        assert names == {"layers.0.ffn.down", "norm.scale"}
        values = np.array(run.state.params["layers"][0]["ffn"]["gate"].values)
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            losses = [float(m["loss"]) for m in run.run([BATCH] * 8, 8)]
        assert losses[-1] < losses[0] - 0.05
        kept = run.model.layers[0].ffn.gate.get_value()
        assert kept.values.dtype == jnp.int8
        np.testing.assert_array_equal(kept.values, values)
    compilations = [m for m in caplog.messages if "Finished XLA compilation of jit(step)" in m]
    assert len(compilations) == 1


def test_whole_numbers_cannot_be_trained():
    with pytest.raises(ValueError, match=r"layers\.0\.ffn\.up\.values holds int8 numbers"):
        training(quantize(build(CONFIG), "up"))


def test_something_must_be_trainable():
    with pytest.raises(ValueError, match=r"no parameter is trainable; there are embed, head,"):
        training(trainable=lambda name: name == "heads")


def test_an_abstract_state_is_that_of_the_first_step():
    """Shapes, types and places, with a frozen and quantized part, on a mesh."""
    with sharding.use(sharding.make_mesh(fsdp=2, tensor=2)):
        model = quantize(sharding.create(lambda: Llama(CONFIG, rngs=nnx.Rngs(0))), "gate")
        update = trainer.Update(
            model, objectives.next_token(), optax.adam(0.1), trainable=paths.chosen(["*.down"])
        )
        abstract = flat(update.abstract("bfloat16"))
        first = flat(update.first(nnx.to_pure_dict(nnx.state(model))))
        assert abstract.keys() == first.keys()
        for name, x in first.items():
            assert abstract[name].shape == x.shape, name
            assert abstract[name].sharding.is_equivalent_to(x.sharding, x.ndim), name
            floating = name.startswith("params") and jnp.issubdtype(x.dtype, jnp.floating)
            if not floating:
                continue
            assert abstract[name].dtype == jnp.bfloat16, name
        assert abstract["params.layers.0.ffn.gate.values"].dtype == jnp.int8


# --- Batches -------------------------------------------------------------------------------------
def weighted(model, batch):
    """An objective of arrays of every kind: tokens [b t], [b t k], by segment [b s], scalars."""
    picked = jnp.take_along_axis(
        model(batch["tokens"]), batch["ids"], axis=-1
    )  # the logits of some ids
    found = (batch["weights"] * picked).sum(-1).mean(-1) + batch["reference"].sum(-1)
    loss = jnp.square(found * batch["scale"]).mean()
    return loss, {"loss": loss, "count": jnp.int32(batch["tokens"].shape[0]), "found": found.mean()}


def mixed_batch():
    rng = np.random.default_rng(1)
    return {
        **BATCH,
        "ids": rng.integers(0, 32, (ROWS, LENGTH, 3)).astype(np.int32),
        "weights": rng.random((ROWS, LENGTH, 3)).astype(np.float32),
        "reference": rng.random((ROWS, 2)).astype(np.float32),
        "scale": np.float32(0.5),
    }


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({}, id="plain", marks=pytest.mark.slow),
        pytest.param({"data": 2, "context": 2}, id="mesh"),
    ],
)
def test_accumulation_cuts_what_has_rows_and_leaves_scalars_whole(mesh):
    with sharding.use(sharding.make_mesh(**mesh)) if mesh else contextlib.nullcontext():
        found = []
        for pieces in (1, 2):
            model = sharding.create(lambda: Llama(CONFIG, rngs=nnx.Rngs(0)))
            run = training(model, weighted, optax.sgd(0.1), accumulate=pieces)
            (metrics,) = run.run([mixed_batch()], 1)
            found.append((metrics, flat(jax.tree.map(np.asarray, run.state.params))))
    (one, params), (two, others) = found
    for name in ("loss", "grad_norm", "found", "count"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, err_msg=name)
    for name, value in params.items():
        np.testing.assert_allclose(others[name], value, atol=1e-6, err_msg=name)


def test_arrays_lie_by_rows_and_tokens_by_rows_or_whole():
    with sharding.use(sharding.make_mesh(data=2, fsdp=2, context=2)):
        placed = trainer.spread(mixed_batch() | {"table": np.zeros((7, LENGTH))})
    rows = ("data", "fsdp")
    assert {name: x.sharding.spec for name, x in placed.items()} == {
        "tokens": PartitionSpec(rows, "context"),
        "ids": PartitionSpec(rows, "context"),
        "weights": PartitionSpec(rows, "context"),
        "reference": PartitionSpec(rows),
        "scale": PartitionSpec(),
        "table": PartitionSpec(),
    }


def test_rows_that_accumulation_or_the_mesh_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="accumulate 3 does not divide the batch's 4 rows"):
        list(training(accumulate=3).run([BATCH], 1))
    with (
        sharding.use(sharding.make_mesh(fsdp=8)),
        pytest.raises(ValueError, match="fsdp=8 does not divide the 4 rows"),
    ):
        trainer.spread(mixed_batch())


# --- What is not finite --------------------------------------------------------------------------
def scaled(model, batch):
    """An objective that a batch can make infinite, or whose gradient alone it can."""
    root = jnp.sqrt(batch["root"] + model.head[...][0, 0] * 0)
    loss = batch["scale"] * jnp.square(model.head[...] - 1).mean() + 0 * root
    return loss, {"loss": loss, "count": jnp.int32(1)}


GOOD = {"scale": np.float32(1), "root": np.float32(1)}


@pytest.mark.parametrize(
    "bad", [{"scale": np.float32("inf")}, {"scale": np.float32("nan")}, {"root": np.float32(0)}]
)
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_guarded_update_that_is_not_finite_changes_nothing(bad, pieces):
    """Neither parameters nor moments nor the optimizer's count; the next one goes on from there."""
    rows = {"rows": np.zeros((2, 1), np.float32)}
    plain, guarded = (training(objective=scaled, accumulate=pieces) for _ in range(2))
    expected = [float(m["loss"]) for m in plain.run([GOOD | rows] * 3, 3)]
    metrics = list(guarded.run([x | rows for x in (GOOD, GOOD | bad, GOOD, GOOD)], 4))
    assert [int(m["skipped"]) for m in metrics] == [0, 1, 0, 0]
    assert not np.isfinite(metrics[1]["grad_norm"])
    assert [float(m["loss"]) for m in metrics[:1] + metrics[2:]] == expected
    for name, x in flat(guarded.state).items():
        np.testing.assert_array_equal(x, flat(plain.state)[name], err_msg=name)


def test_without_a_guard_it_goes_into_the_parameters():
    run = training(objective=scaled, guard=False)
    (metrics,) = run.run([GOOD | {"scale": np.float32("nan")}], 1)
    assert "skipped" not in metrics
    assert np.isnan(run.state.params["head"]).all()


# --- Evaluation ----------------------------------------------------------------------------------
def test_an_evaluator_is_compiled_once_and_means_what_it_sums(caplog):
    def objective(model, batch):
        count = batch["tokens"].size
        loss = batch["tokens"].mean() + 0 * model.head[...].mean()
        return loss, {
            "loss": loss,
            "count": jnp.int32(count),
            "accuracy": loss / 10,
            "dropped": jnp.int32(2),
            "rows": jnp.zeros(3),
        }

    measure, model = trainer.evaluator(objective), build(CONFIG)
    batches = [{"tokens": np.full((2, 3), 4.0)}, {"tokens": np.full((2, 1), 8.0)}]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for _ in range(3):
            found = measure(model, batches)
    assert found == {
        "loss": pytest.approx(5.0),
        "count": 8,
        "accuracy": pytest.approx(0.5),
        "dropped": 4,
        "expert_load": None,
    }
    compiled = [m for m in caplog.messages if m.startswith("Finished XLA compilation of jit(<lam")]
    assert len(compiled) == len(batches)
