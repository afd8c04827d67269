"""A model that compiles at once, batches of odd segments, and losses in plain float64."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from l4jax.models.layers import RMSNorm, weight
from l4jax.models.llama4 import Llama

VOCABULARY, WIDTH = 40, 12


class Table(Llama):
    """What objectives use of a language model; it sees one token only."""

    def __init__(self, seed=0, vocabulary=VOCABULARY, width=WIDTH):
        rngs = nnx.Rngs(seed)
        self.embed = weight(rngs, (vocabulary, width), ("vocab", "embed"), fan_in=1)
        self.norm = RMSNorm(width, eps=1e-5)
        self.head = weight(rngs, (width, vocabulary), ("embed", "vocab"), fan_in=width)

    def hidden(self, tokens, positions=None, segment_ids=None):
        return self.embed[...][tokens], None

    def logits(self, tokens, **moved):
        """Of every next token, float64 [… v]; with other weights where they are given."""
        embed, head = (
            moved.get(name, np.asarray(getattr(self, name)[...], np.float64))
            for name in ("embed", "head")
        )
        x = embed[tokens]
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)
        return x @ head

    def log_probs(self, tokens, **moved):
        logits = self.logits(tokens, **moved)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def packed(lengths, width, *, seed=0, vocabulary=VOCABULARY):
    """Rows of segments of these lengths, with a mask that leaves out the first third of each."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), width)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["loss_mask"] = np.zeros(shape, bool)
    for row, sizes in enumerate(lengths):
        start = 0
        for number, n in enumerate(sizes, 1):
            part = np.s_[row, start : start + n]
            batch["tokens"][part] = rng.integers(0, vocabulary, n)
            batch["segment_ids"][part] = number
            batch["positions"][part] = np.arange(n)
            batch["loss_mask"][part] = np.arange(n) >= n // 3
            start += n
    return batch


def segment_sums(log_probs, batch, segments):
    """Each segment's log-probability and tokens to predict, one token at a time."""
    sums, counts = (np.zeros((len(log_probs), segments)) for _ in range(2))
    ids = batch["segment_ids"]
    for row in range(len(ids)):
        for i in range(1, ids.shape[1]):
            segment = ids[row, i]
            if segment and ids[row, i - 1] == segment and batch["loss_mask"][row, i]:
                sums[row, segment - 1] += log_probs[row, i - 1, batch["tokens"][row, i]]
                counts[row, segment - 1] += 1
    return sums, counts


def gradients(objective, model, batch):
    """Loss, metrics and gradients as a nested dictionary."""

    @jax.jit
    def measure(model, batch):
        graph, state = nnx.split(model)

        def loss(params):
            nnx.replace_by_pure_dict(state, params)
            return objective(nnx.merge(graph, state), batch)

        return jax.value_and_grad(loss, has_aux=True)(nnx.to_pure_dict(state))

    (loss, metrics), found = measure(model, batch)
    return float(loss), jax.device_get(metrics), jax.device_get(found)


def assert_slopes(found, loss, model, *, entries=10, step=1e-5):
    """Gradients against central differences of the float64 `loss(**weights)`, at some entries."""
    rng = np.random.default_rng(3)
    for name in ("head", "embed"):
        value = np.asarray(getattr(model, name)[...], np.float64)
        largest = np.abs(found[name]).max()
        # Entries of which some matter: the largest ones, and any.
        chosen = np.argsort(-np.abs(found[name]), axis=None)[: entries // 2]
        for flat in [*chosen, *rng.choice(value.size, entries // 2)]:
            index = np.unravel_index(flat, value.shape)
            moved = [value.copy(), value.copy()]
            moved[0][index] += step
            moved[1][index] -= step
            slope = (loss(**{name: moved[0]}) - loss(**{name: moved[1]})) / (2 * step)
            assert abs(found[name][index] - slope) < 2e-5 * largest, (name, index, slope)
