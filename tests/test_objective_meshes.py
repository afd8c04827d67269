"""Objectives on a mesh that cuts rows, tokens and the vocabulary are those of one device."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import numpy as np
import pytest
from conftest import build
from flax import nnx
from objective_toys import packed

from l4jax import presets, sharding
from l4jax.training import objectives, trainer
from l4jax.training.rewards import RewardModel

CONFIG = presets.tiny(presets.llama4_scout())
CONFIG = dataclasses.replace(CONFIG, num_layers=2, pattern=CONFIG.pattern[-2:])
ROWS, LENGTH, SEGMENTS, K = 8, 48, 6, 9
QUICK = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else None
BOUND = 8e-6
"""128 roundings of float32, relative to the largest entry; twice those of `test_meshes`, as the
gradients of values cancel more here: two devices that only share the rows are 5.3e-6 apart."""


def batch_of():
    """Segments of one token to 21, which begin and end on either side of a cut; two empty rows."""
    rng = np.random.default_rng(0)
    lengths = [(13, 20, 9, 5), (21, 1, 7, 15), (24, 24), (), (3, 4, 5, 6, 7, 8), (17,), (), (9, 30)]
    batch = packed(lengths, LENGTH, vocabulary=CONFIG.vocab_size)
    best = rng.permuted(np.tile(np.arange(CONFIG.vocab_size), (ROWS, LENGTH, 1)), axis=2)[..., :K]
    odds = np.log(rng.dirichlet(np.ones(K + 1), (ROWS, LENGTH))[..., :K])
    return batch | {
        "reference": rng.normal(-60, 5, (ROWS, SEGMENTS)).astype(np.float32),
        "teacher_ids": best.astype(np.int32),
        "teacher_log_probs": odds.astype(np.float32),
        "groups": np.where(np.arange(SEGMENTS) < 4, 1, 2) * np.ones((ROWS, 1), np.int32),
        "ranks": rng.integers(0, 3, (ROWS, SEGMENTS)).astype(np.int32),
    }


OBJECTIVES = {
    "dpo": objectives.dpo(0.1, balance=0.1),
    "distill": objectives.distill(0.6, temperature=2.0, balance=0.1, z_loss=1e-3),
    "ranking": objectives.ranking(balance=0.1),
    "next_token": objectives.next_token(balance=0.1, z_loss=1e-3),
}


def measure(name, axes):
    """Loss, metrics and gradients, as NumPy arrays."""
    with sharding.use(sharding.make_mesh(**axes)) if axes else contextlib.nullcontext():
        graph, state = nnx.split(build(CONFIG))
        model = nnx.merge(graph, jax.device_put(state, sharding.shardings(state)))
        if name == "ranking":
            model = RewardModel(model, rngs=nnx.Rngs(0))
        graph, state = nnx.split(model)
        batch = batch_of()
        if axes:
            for key in ("tokens", "segment_ids", "positions", "loss_mask"):
                batch[key] = jax.device_put(batch[key], trainer.batch_sharding(ROWS, LENGTH))

        def loss(state, batch):
            return OBJECTIVES[name](nnx.merge(graph, state), batch)

        run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
        (loss, metrics), gradients = run(state, batch)
        return float(loss), jax.device_get(metrics), jax.device_get(nnx.to_pure_dict(gradients))


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("dpo", {"tensor": 2, "fsdp": 2, "context": 2}),
        pytest.param("distill", {"tensor": 2, "fsdp": 2, "expert": 2}, marks=pytest.mark.slow),
        ("ranking", {"tensor": 2, "fsdp": 2, "context": 2}),
        ("next_token", {"tensor": 2, "context": 2, "expert": 2}),
    ],
)
def test_a_mesh_changes_neither_losses_nor_gradients(name, axes):
    loss, metrics, gradients = measure(name, {})
    found = measure(name, axes)
    assert int(metrics["count"]) > 5
    assert found[0] == pytest.approx(loss, rel=BOUND)
    for key, value in metrics.items():
        np.testing.assert_allclose(found[1][key], value, rtol=5 * BOUND, err_msg=key)
    paths = jax.tree_util.tree_leaves_with_path(gradients)
    for (path, expected), other in zip(paths, jax.tree.leaves(found[2]), strict=True):
        largest = np.abs(expected).max()
        assert largest > 0, path
        assert np.abs(other - expected).max() <= BOUND * largest, path
