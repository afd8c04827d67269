"""What happens beside updates happens at its step, and is what it would be alone."""

import itertools
import json
import types

import jax
import jax.numpy as jnp
import pytest
import toy_runs
from conftest import build
from etils import epath

from l4jax import inference
from l4jax.data import tokenizer
from l4jax.training import hooks, trainer


def test_every_is_every_and_the_last():
    hook = hooks.every(3, lambda moment: None)
    due = [step for step in range(1, 9) if hook.due(step, step == 8)]
    assert due == [3, 6, 8]
    never = hooks.every(None, lambda moment: None)
    assert not any(never.due(step, step == 8) for step in range(1, 9))
    with pytest.raises(ValueError, match="every 0 steps: it must be at least 1, or None"):
        hooks.every(0, lambda moment: None)


def test_evaluation_is_the_trainer_s_under_other_names(tmp_path):
    def objective(model, batch):
        loss, metrics = toy_runs.distance(model, batch)
        return loss, metrics | {"accuracy": 1 - loss, "expert_load": jnp.ones((2, 3))}

    training, held_out = toy_runs.training(), list(itertools.islice(toy_runs.Numbers(), 3))
    expected = trainer.evaluate(training.model, objective, held_out)
    moment = hooks.Moment(training, 5, epath.Path(tmp_path))
    found = hooks.evaluate(objective, held_out)(moment)
    assert found == {
        "eval_loss": expected["loss"],
        "eval_count": 3,
        "eval_number": 3,
        "eval_accuracy": expected["accuracy"],
    }
    assert expected["accuracy"] == pytest.approx(1 - expected["loss"])
    assert hooks.evaluate(objective, held_out, prefix="valid_")(moment).keys() >= {"valid_loss"}


class Letters(tokenizer.Tokenizer):
    """The first letters, and an end."""

    stop_ids = (1,)

    def __init__(self):
        pass

    def encode(self, text, *, bos):
        return [0] * bos + [ord(c) - ord("a") + 2 for c in text]

    def decode(self, ids, *, skip_special):
        return "".join(chr(i - 2 + ord("a")) for i in ids if i > 1 or not skip_special)


def test_samples_are_what_the_model_would_write_and_are_not_doubled(tmp_path):
    model = build(toy_runs.CONFIG)
    letters = Letters()
    take = hooks.sample(letters, ["ab", "c"], max_new_tokens=5, temperature=0.7, seed=3)

    def at(step):
        take(hooks.Moment(types.SimpleNamespace(model=model), step, epath.Path(tmp_path)))
        return [json.loads(x) for x in (tmp_path / "samples.jsonl").read_text().splitlines()]

    ids = [letters.encode(x, bos=True) for x in ("ab", "c")]
    rows = inference.generate(
        model, ids, max_new_tokens=5, temperature=0.7, seed=3, stop_ids=(1,)
    ).tokens
    expected = [
        {"prompt": prompt, "text": letters.decode(row, skip_special=True)}
        for prompt, row in zip(("ab", "c"), rows, strict=True)
    ]
    assert at(4) == [{"step": 4} | x for x in expected]
    assert [x["step"] for x in at(8)] == [4, 4, 8, 8]
    assert [x["step"] for x in at(4)] == [4, 4], "the run went back"


def test_a_profile_is_of_its_steps(tmp_path, monkeypatch):
    running = []
    start, stop = jax.profiler.start_trace, jax.profiler.stop_trace
    monkeypatch.setattr(
        jax.profiler, "start_trace", lambda *a, **k: (running.append("on"), start(*a, **k))
    )
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (running.append("off"), stop()))

    class Watched(toy_runs.Numbers):
        def __next__(self):
            running.append(self.next)
            return super().__next__()

    toy_runs.fit(tmp_path, data=Watched(), steps=8, profile_at=3)
    assert running == [0, 1, 2, "on", 3, 4, 5, "off", 6, 7]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_profile_ends_with_the_run(tmp_path):
    toy_runs.fit(tmp_path, steps=4, profile_at=3)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    with pytest.raises(ValueError, match="after 0 steps: it must be at least 1"):
        hooks.profile("x", after=0)
