"""Two models that train at once do what either does by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from objective_toys import Table, packed

from l4jax.training import objectives, optimizers, schedules
from l4jax.training.codistillation import Pair, codistill, measure
from l4jax.training.trainer import Training

PARTS = ("teacher", "student")
K, SOFT, TEMPERATURE = 5, 0.7, 1.5
LENGTHS = [(5, 7), (11,), (3, 3, 2)]


class Sized(Table):
    """A table that says how many tokens it knows."""

    @property
    def config(self):
        return type("Config", (), {"vocab_size": self.embed.shape[0]})


@pytest.fixture
def pair():
    return Pair(Sized(1, width=20), Sized(2))


def answered(teacher, batch):
    ids, log_probs = objectives.top_log_probs(teacher, batch, K)
    return {**batch, "teacher_ids": ids, "teacher_log_probs": log_probs}


def gradients(objective, model, batch):
    graph, state = nnx.split(model)
    run = jax.value_and_grad(lambda s: objective(nnx.merge(graph, s), batch)[0])
    loss, found = run(state)
    return float(loss), nnx.to_pure_dict(found)


def close(x, y, **tolerances):
    """Two trees of arrays."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(*map(np.asarray, (x, y)), **tolerances), x, y
    )


def test_each_has_the_gradient_that_it_would_have_alone(pair):
    batch = packed(LENGTHS, 13)
    loss, found = gradients(codistill(K, soft=SOFT, temperature=TEMPERATURE), pair, batch)
    alone, teachers = gradients(objectives.next_token(), pair.teacher, batch)
    learn = objectives.distill(SOFT, temperature=TEMPERATURE)
    taught, students = gradients(learn, pair.student, answered(pair.teacher, batch))
    assert loss == pytest.approx(alone + taught, rel=1e-6)
    close(found, {"teacher": teachers, "student": students}, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_steps_are_those_of_a_teacher_alone_and_of_a_student_who_asks_it_each_time(pair):
    """With a norm to clip at that the teacher exceeds and the student does not."""

    def optimizer(apart=None):
        schedule = schedules.schedule("linear", 0.03, steps=4, warmup=1)
        made = optimizers.make("adamw", schedule, clip_norm=0.05)
        return optimizers.averaged(optimizers.apart(made, apart) if apart else made, 0.9)

    batches = [packed(LENGTHS, 13, seed=seed) for seed in range(4)]
    graph, state = nnx.split(pair)
    alone = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    teacher = Training(alone.teacher, objectives.next_token(), optimizer())
    student = Training(alone.student, objectives.distill(SOFT), optimizer())
    both = Training(pair, codistill(K, soft=SOFT), optimizer(PARTS))
    for batch in batches:
        told = student.step(answered(teacher.model, batch))
        taught = teacher.step(batch)
        found = both.step(batch)
        assert float(found["teacher_loss"]) == pytest.approx(float(taught["loss"]), rel=1e-5)
        for name in ("loss", "soft", "hard"):
            assert float(found[name]) == pytest.approx(float(told[name]), rel=1e-5)
        assert float(told["grad_norm"]) != pytest.approx(float(taught["grad_norm"]), rel=0.1)
    averages = optimizers.average_of(both.state.optimizer)
    for part, training in zip(PARTS, (teacher, student), strict=True):
        one, other = (nnx.state(x) for x in (getattr(both.model, part), training.model))
        close(nnx.to_pure_dict(one), nnx.to_pure_dict(other), rtol=1e-4, atol=1e-6)
        average = optimizers.average_of(training.state.optimizer)
        close(averages[part], average, rtol=1e-4, atol=1e-6)


def test_what_is_measured_is_the_loss_of_both_on_data(pair):
    batch = packed(LENGTHS, 13)
    metrics = measure(pair, batch)[1]
    plain = objectives.next_token()
    assert metrics["loss"] == plain(pair.student, batch)[0]
    assert metrics["teacher_loss"] == plain(pair.teacher, batch)[0]


def test_two_vocabularies_are_refused():
    with pytest.raises(ValueError, match="teacher and student have 41 and 40 tokens"):
        Pair(Sized(1, vocabulary=41), Sized(2))
