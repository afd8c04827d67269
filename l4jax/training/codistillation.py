"""Codistillation: a student learns from a teacher that is itself still learning.

Llama 4 Maverick was distilled so while Behemoth was pre-trained: the teacher's forward pass, which
its own training needs anyway, gives the student's targets (Meta's announcement of Llama 4, 2025).
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float32

from l4jax.config import TextConfig
from l4jax.models.llama4 import Llama
from l4jax.training import objectives
from l4jax.training.objectives import Batch, Metrics, Objective


class Pair(nnx.Module):
    """Two models of one vocabulary that train at once."""

    def __init__(self, teacher: Llama, student: Llama) -> None:
        of, by = teacher.config.vocab_size, student.config.vocab_size
        if of != by:
            raise ValueError(f"teacher and student have {of} and {by} tokens, not the same ones")
        self.teacher, self.student = teacher, student

    @property
    def config(self) -> TextConfig:
        """The student's, whose training this is."""
        return self.student.config


def codistill(
    k: int, *, soft: float = 0.5, temperature: float = 1.0, balance: float = 0.0
) -> Objective:
    """The student's `objectives.distill` plus the teacher's `objectives.next_token`.

    No gradient goes from the student's loss to the teacher, so either trains as it would without
    the other, if the optimizer keeps them apart (`optimizers.make`'s `apart`). Metrics are the
    student's, and `teacher_loss`.

    Args:
        k: the teacher's most likely tokens that the student is told.
        soft: as in `distill`, and temperature as well.
        temperature: see there.
        balance: of both models' routers.

    Raises:
        ValueError: an argument is impossible.
    """
    learn = objectives.distill(soft, temperature=temperature, balance=balance)

    def objective(pair: Pair, batch: Batch) -> tuple[Float32[Array, ""], Metrics]:
        hidden, routing = objectives.hidden_states(pair.teacher, batch)
        loss, told = objectives.next_token_after(
            pair.teacher, batch, hidden, routing, balance=balance
        )
        graph, state = nnx.split(pair.teacher)
        state, hidden = jax.lax.stop_gradient((state, hidden))
        ids, log_probs = objectives.likeliest(nnx.merge(graph, state), hidden, k)
        answers: Any = {"teacher_ids": ids, "teacher_log_probs": log_probs}
        students, metrics = learn(pair.student, {**batch, **answers})
        return loss + students, {**metrics, "teacher_loss": told["loss"]}

    return objective


def measure(pair: Pair, batch: Batch) -> tuple[Float32[Array, ""], Metrics]:
    """`objectives.next_token` of the student, with the teacher's as `teacher_loss`."""
    plain = objectives.next_token()
    loss, metrics = plain(pair.student, batch)
    return loss, {**metrics, "teacher_loss": plain(pair.teacher, batch)[1]["loss"]}
