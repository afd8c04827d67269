"""An example is as hard as its loss, and the hardest stay."""

import numpy as np
import pytest
from conftest import build, forward

from l4jax import presets
from l4jax.data import pipeline
from l4jax.data.mixture import Mixture
from l4jax.data.store import MemoryStore
from l4jax.training import filtering

CONFIG = presets.get("tiny-llama4-scout").make()


@pytest.mark.parametrize("segments", [pytest.param(2, marks=pytest.mark.slow), 9])
def test_losses_are_those_of_each_example_alone(segments):
    rng = np.random.default_rng(0)
    sizes = [9, 30, 2, 17, 1, 25]
    examples = [rng.integers(0, CONFIG.vocab_size, size).tolist() for size in sizes]
    masks = [rng.random(size) < 0.6 for size in sizes]
    masks[2][:] = [True, False]  # only its first token, which nothing predicts
    store, model = MemoryStore(examples, masks), build(CONFIG)
    batches = pipeline.batches(
        Mixture([store], epochs=1),
        length=32,
        batch_size=2,
        seed=None,
        packing="best_fit",
        segments=segments,
    )
    found = filtering.example_losses(model, batches, len(store))
    for number, (tokens, mask) in enumerate(zip(examples, masks, strict=True)):
        logits = forward(model, np.array([tokens], np.int32))[0].astype(np.float64)
        scores = np.log(np.exp(logits).sum(1)) - logits[range(len(tokens)), np.roll(tokens, -1)]
        counted = mask[1:]
        if counted.any():
            assert found[number] == pytest.approx(scores[:-1][counted].mean(), rel=1e-5)
        else:
            assert np.isnan(found[number])


def test_the_hardest_stay_in_their_order():
    losses = np.array([0.5, np.nan, 3.0, 1.0, 1.0], np.float32)
    np.testing.assert_array_equal(filtering.hardest(losses, 0.5), [2, 4])
    np.testing.assert_array_equal(filtering.hardest(losses, 1e-9), [2])
    np.testing.assert_array_equal(filtering.hardest(losses, 1.0), [0, 2, 3, 4])
