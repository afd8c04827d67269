"""Which examples a model finds easy: for fine-tuning on the others.

Llama 4 was fine-tuned lightly, after models had judged more than half of the examples too easy
(Meta 2025, "The Llama 4 herd"). How is not published; here an example is as hard as its loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from l4jax.models.llama4 import Llama
from l4jax.training import objectives
from l4jax.training.trainer import Batch, spread


def gathered(x: Any) -> np.ndarray:
    """All processes' rows of an array of a batch, on every one of them."""
    if jax.process_count() > 1:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def example_losses(model: Llama, batches: Iterable[Batch], count: int) -> np.ndarray:
    """The mean loss, in nats, of what is to be predicted in each of `count` examples.

    Args:
        model: which judges.
        batches: of one epoch of whole examples, with `example` (`pipeline.batches(segments=…)`).
        count: examples.

    Returns:
        Float32[count], NaN for examples that no batch had.
    """

    @jax.jit
    def measure(model: Llama, batch: Batch) -> tuple[jax.Array, jax.Array]:
        segments = batch["example"].shape[1]
        log_probs = objectives.segment_log_probs(model, batch, segments=segments)
        return log_probs, objectives.targets(batch)[1]

    sums, tokens = np.zeros(count, np.float32), np.zeros(count, np.int64)
    for batch in batches:
        found = measure(model, spread(batch))
        log_probs, counted = (gathered(x) for x in found)
        examples, segments = gathered(batch["example"]), gathered(batch["segment_ids"])
        rows, places = np.nonzero(counted)
        np.add.at(tokens, examples[rows, segments[rows, places] - 1], 1)
        there = examples >= 0
        np.add.at(sums, examples[there], -log_probs[there])
    with np.errstate(invalid="ignore"):
        return sums / np.where(tokens == 0, np.nan, tokens).astype(np.float32)


def hardest(losses: np.ndarray, share: float) -> np.ndarray:
    """The numbers of the examples with the largest losses, ascending; those without one stay out.

    Args:
        losses: of each example.
        share: of the examples to keep, above 0; at least one is.
    """
    known = np.flatnonzero(np.isfinite(losses))
    keep = max(1, round(share * len(known)))
    return np.sort(known[np.argsort(losses[known], kind="stable")[-keep:]])
