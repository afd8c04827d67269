"""A run writes down what it does, goes on exactly, goes back from spikes, and stops when told."""

import io
import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import optax
import pytest
import toy_runs
from rich.console import Console
from toy_runs import Numbers, checkpoints, events, fit, lines, message

from l4jax.training import checkpointing, hooks, loop


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happens to."""
    out = tmp_path_factory.mktemp("whole")
    last = fit(out).last
    assert last == json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return out


def cut(whole, out, *, step, torn=""):
    """What a run killed after a checkpoint leaves: later lines, perhaps one that is not whole."""
    shutil.copytree(whole, out)
    for later in checkpoints(out):
        if later > step:
            shutil.rmtree(out / "checkpoints" / str(later))
    if torn:
        file = out / "metrics.jsonl"
        file.write_text("".join(file.read_text().splitlines(True)[: step + 2]) + torn)


# --- Lines ---------------------------------------------------------------------------------------
def test_every_step_has_a_line_with_its_numbers(whole):
    found = lines(whole)
    assert [line["step"] for line in found] == list(range(20))
    assert [line["number"] for line in found] == list(range(20))
    for line in found:
        rate = float(toy_runs.RATE(line["step"]))
        assert line["learning_rate"] == pytest.approx(rate, rel=1e-6)
        assert line.keys() == {
            *("step", "loss", "grad_norm", "learning_rate", "count", "number", "skipped")
        }
    raw = json.loads((whole / "metrics.jsonl").read_text().splitlines()[3])
    assert raw["tokens_per_second"] == pytest.approx(6 / raw["seconds"])
    assert events(whole) == []


def test_lines_are_there_while_the_next_step_runs(tmp_path):
    """So that whoever looks sees them, and so that the device does not wait for them."""

    class Watched(Numbers):
        def __next__(self):
            file = tmp_path / "metrics.jsonl"
            seen.append(len(file.read_text().splitlines()))
            return super().__next__()

    seen = []
    fit(tmp_path, data=Watched(), steps=8)
    assert seen == [0, 0, 1, 2, 3, 5, 5, 6]  # a checkpoint comes after five, which waits


def test_a_terminal_shows_progress_and_a_file_does_not(tmp_path):
    shown = io.StringIO()
    fit(tmp_path / "a", steps=3, console=Console(file=shown, force_terminal=True, width=120))
    assert "loss 0." in shown.getvalue()
    assert "tokens/s" in shown.getvalue()
    quiet = io.StringIO()
    fit(tmp_path / "b", steps=3, console=Console(file=quiet))
    assert quiet.getvalue() == ""


# --- Going on ------------------------------------------------------------------------------------
@pytest.mark.parametrize("torn", ["", '{"step": 12, "lo', '{"step": 12, "loss": 1.0}'])
def test_a_resumed_run_writes_the_same_lines(whole, tmp_path, torn):
    out = tmp_path / "run"
    cut(whole, out, step=15 if not torn else 10, torn=torn)
    if torn:
        shutil.rmtree(out / "checkpoints")
        assert fit(out, resume=True).step == 20  # no checkpoint: from the start
    else:
        assert fit(out, resume=True).step == 20
        assert events(out) == [("resume", 15)]
    assert lines(out) == lines(whole)
    assert checkpoints(out) == [15, 20]


def test_a_finished_run_has_nothing_to_go_on_with(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    result = fit(out, resume=True)
    assert (result.step, result.ended, result.last["step"]) == (20, "finished", 19)
    assert lines(out) == lines(whole)


def test_a_run_is_not_overwritten(whole):
    with pytest.raises(ValueError, match="holds a run of 20 steps; resume it, or choose another"):
        fit(whole)


def test_another_configuration_is_refused_and_its_leaves_named(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    with pytest.raises(
        ValueError, match=r"settings\.spike: None then, 4.0 now; settings\.steps: 20 then, 30 now"
    ):
        fit(out, resume=True, steps=30, spike=4.0)
    fit(out, resume=True, keep=5, tensorboard=False, checkpoint_minutes=1.0)
    fit(out, resume=True, checkpoint_every=3, evaluate_every=7, on_nonfinite="stop")


def test_a_recipe_s_own_configuration_is_what_counts(tmp_path):
    config = {"model": {"layers": 1}, "optimizer": {"peak": 0.05}, "out": "a"}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    fit(tmp_path, steps=5)
    file.write_text(json.dumps(config | {"out": "b", "optimizer": {"peak": 0.1, "b1": 0.9}}))
    words = "configuration: optimizer.b1: None then, 0.9 now; optimizer.peak: 0.05 then, 0.1 now"
    with pytest.raises(ValueError, match=f"{words}$"):
        fit(tmp_path, steps=6, resume=True)


def test_other_arrays_are_refused(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    with pytest.raises(ValueError, match="the run has embed trained, and it is frozen here"):
        fit(out, of=toy_runs.training(trainable=lambda name: name == "head"), resume=True)
    other = toy_runs.training(optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"optimizer\.0\.count is int32\[\] there and nothing in"):
        fit(out, of=other, resume=True)
    assert float(other.state.params["head"][0, 0]), "it is still there"


def test_other_frozen_parameters_are_refused(tmp_path):
    def half(change=0.0):
        made = toy_runs.training(trainable=lambda name: name == "head")
        made.state.params["embed"] = made.state.params["embed"].at[3, 5].add(change)
        return made

    fit(tmp_path, of=half(), steps=10)
    with pytest.raises(ValueError, match="frozen parameter embed is not what it was in the run"):
        fit(tmp_path, of=half(1e-3), steps=10, resume=True)
    assert fit(tmp_path, of=half(), steps=10, resume=True).step == 10


def test_batches_must_say_where_they_are(tmp_path):
    with pytest.raises(ValueError, match="list_iterator has no get_state"):
        fit(tmp_path, data=[{"number": 1}])


def test_data_may_end_before_the_steps_do(tmp_path):
    result = fit(tmp_path, data=Numbers(count=8))
    assert (result.step, result.ended) == (8, "out of data")
    assert len(lines(tmp_path)) == 8
    assert checkpoints(tmp_path) == [5, 8]


# --- What is not finite --------------------------------------------------------------------------
NAN = float("nan")


def test_an_update_that_is_not_finite_is_skipped_and_said(tmp_path):
    fit(tmp_path, data=Numbers({6: NAN, 7: float("inf"), 9: NAN}), steps=12)
    found = lines(tmp_path)
    assert [line["skipped"] for line in found] == [0] * 6 + [1, 1, 0, 1, 0, 0]
    assert found[6]["loss"] is None
    assert events(tmp_path) == [("skip", 6), ("skip", 7), ("skip", 9)]
    rates = [float(toy_runs.RATE(n)) for n in (0, 1, 2, 3, 4, 5, 6, 6, 6, 7, 7, 8)]
    assert [line["learning_rate"] for line in found] == pytest.approx(rates, rel=1e-6)


def test_a_run_that_is_never_finite_again_gives_up(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "PATIENCE", 4)
    with pytest.raises(loop.Diverged, match=r"the last 4 losses or gradients, since step 6, were"):
        fit(tmp_path, data=Numbers(dict.fromkeys(range(6, 20), NAN)))
    assert "as all are since step 6" in message(tmp_path, "skip")


def test_a_run_may_stop_where_it_is_not_finite(tmp_path):
    with pytest.raises(loop.Diverged, match=r"step 6: the loss is nan and .* checkpoints: \[5\]"):
        fit(tmp_path, data=Numbers({6: NAN}), on_nonfinite="stop")
    assert [line["step"] for line in lines(tmp_path)] == list(range(6))
    assert events(tmp_path) == [("nonfinite", 6)]


def test_skipping_needs_the_guard(tmp_path):
    with pytest.raises(ValueError, match="on_nonfinite 'skip' needs a Training with guard=True"):
        fit(tmp_path, of=toy_runs.training(guard=False))


# --- Spikes --------------------------------------------------------------------------------------
SPIKY = {"spike": 6.0, "spike_window": 6, "steps": 20}


def test_a_spike_takes_the_run_back_and_past_the_batches(tmp_path):
    fit(tmp_path, data=Numbers({13: 500.0}), **SPIKY)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == list(range(20))
    assert [line["number"] for line in found] == [*range(10), *range(14, 24)]
    assert events(tmp_path) == [("rewind", 13)]
    assert "going back to step 10, and on without the 4 batches since" in message(
        tmp_path, "rewind"
    )
    assert max(line["loss"] for line in found) < 10


@pytest.mark.parametrize("step", [10, 15])
def test_a_run_that_went_back_is_resumed_exactly(tmp_path, step):
    """Before the spike it goes back again; after it, it knows how often it did."""
    spikes = {13: 500.0, 22: 500.0}
    fit(tmp_path / "whole", data=Numbers(spikes), keep=9, **SPIKY)
    assert [event for event, _ in events(tmp_path / "whole")] == ["rewind", "rewind"]
    out = tmp_path / "run"
    cut(tmp_path / "whole", out, step=step)
    fit(out, data=Numbers(spikes), keep=9, resume=True, **SPIKY)
    assert lines(out) == lines(tmp_path / "whole")
    for each in (tmp_path / "whole", out):
        seen = json.loads((each / "checkpoints" / "20" / "run.json").read_text())["seen"]
        assert seen["rewinds"] == 2


def test_checkpoints_of_a_course_that_was_given_up_are_gone(tmp_path):
    """Those by time come between the others, and must not be what is resumed."""
    held = {}

    def look(moment):
        held.setdefault(moment.step, []).append(checkpoints(tmp_path)[-1])

    data, looks = Numbers({13: 500.0}), [hooks.Hook(lambda step, last: step in (10, 13), look)]
    fit(tmp_path, data=data, hooks=looks, keep=99, checkpoint_minutes=1e-9, **SPIKY)
    assert held[13][0] > 10, "there were later ones"
    for step in checkpoints(tmp_path):
        run = json.loads((tmp_path / "checkpoints" / str(step) / "run.json").read_text())
        assert run["data"]["next"] == (step if step <= 10 else step + 4)
    assert len(checkpoints(tmp_path)) == 20


def test_a_run_goes_back_only_so_often(tmp_path):
    fit(tmp_path, data=Numbers({8: 500.0, 14: 500.0}), rewinds=1, **SPIKY)
    assert events(tmp_path) == [("rewind", 8), ("spike", 10)]
    assert "gone back 1 times already" in message(tmp_path, "spike")
    assert [line["number"] for line in lines(tmp_path)] == [*range(5), *range(9, 24)]


def test_before_the_first_checkpoint_there_is_nothing_to_go_back_to(tmp_path):
    fit(tmp_path, data=Numbers({8: 500.0}), **SPIKY | {"checkpoint_every": 10})
    assert events(tmp_path) == [("spike", 8)]
    assert "no checkpoint to go back to" in message(tmp_path, "spike")
    assert [line["number"] for line in lines(tmp_path)] == list(range(20))


# --- Hooks ---------------------------------------------------------------------------------------
def test_hooks_are_called_at_their_steps_with_the_state_of_then(tmp_path):
    calls = []

    def measure(moment):
        head = float(moment.training.model.head[...].mean())
        calls.append((moment.step, moment.out == tmp_path))
        return {"eval_head": head}

    fit(
        tmp_path,
        steps=11,
        hooks=[hooks.every(4, measure), hooks.every(None, lambda moment: 1 / 0)],
    )
    assert calls == [(4, True), (8, True), (11, True)]
    found = lines(tmp_path)
    assert [line["step"] for line in found if "eval_head" in line] == [3, 7, 10]
    alone = toy_runs.training()
    list(alone.run(Numbers(), 4))
    assert found[3]["eval_head"] == float(alone.model.head[...].mean())


# --- Checkpoints ---------------------------------------------------------------------------------
def test_the_last_checkpoints_and_the_best_stay(tmp_path):
    values = {5: 3.0, 10: 1.0, 15: 2.0, 20: 9.0}
    for best, expected in ((None, [15, 20]), ("eval_x", [10, 15, 20]), ("-eval_x", [15, 20])):
        out = tmp_path / str(best)
        measure = hooks.every(5, lambda moment: {"eval_x": values[moment.step]})
        fit(out, keep_best=best, hooks=[measure])
        assert checkpoints(out) == expected, best
    fit(tmp_path / "unknown", keep_best="eval_y", keep=1)
    assert checkpoints(tmp_path / "unknown") == [20]


def test_checkpoints_come_by_time_too(tmp_path):
    fit(tmp_path, steps=4, checkpoint_every=None, checkpoint_minutes=1e-9, keep=9)
    assert checkpoints(tmp_path) == [1, 2, 3, 4]


def test_a_full_disk_stops_no_training(tmp_path, monkeypatch):
    """The second checkpoint cannot be written, neither can the third begin; the fourth can."""
    real = checkpointing.begin
    tries = []

    def full():
        raise OSError(28, "No space left on device")

    def begin(path, arrays):
        tries.append(int(path.name))
        if path.name == "15":
            full()
        if path.name == "10":
            (path.parent / "10.orbax-checkpoint-tmp").mkdir()
            return full
        return real(path, arrays)

    monkeypatch.setattr(checkpointing, "begin", begin)
    said = io.StringIO()
    fit(tmp_path, console=Console(file=said, width=200))
    assert tries == [5, 10, 15, 20]
    assert [kind for kind, _ in events(tmp_path)] == ["save_failed", "save_failed"]
    assert said.getvalue().count("No space left on device") == 2
    assert "checkpoint 10 could not be written ([Errno 28] No space left on device)" in (
        said.getvalue()
    )
    assert checkpoints(tmp_path) == [5, 20]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["20", "5"]
    assert len(lines(tmp_path)) == 20


# --- Being told to stop --------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_and_the_rest_can_follow(whole, tmp_path, number):
    before = signal.getsignal(number)
    tell = hooks.Hook(lambda step, last: step == 7, lambda moment: os.kill(os.getpid(), number))
    result = fit(tmp_path, hooks=[tell])
    assert signal.getsignal(number) is before
    assert result.ended == "stopped"
    assert checkpoints(tmp_path)[-1] == result.step == result.last["step"] + 1
    assert 7 <= result.step <= 9
    assert fit(tmp_path, resume=True).ended == "finished"
    assert lines(tmp_path) == lines(whole)
    assert [kind for kind, _ in events(tmp_path)] == ["stopped", "resume"]


def test_a_second_interrupt_does_not_wait(tmp_path):
    def twice(moment):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, hooks=[hooks.every(3, twice)])
    assert lines(tmp_path)[-1]["step"] == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 0}, "steps 0 must be at least 1"),
        ({"keep": 0}, "keep 0 must be at least 1"),
        ({"checkpoint_minutes": 0.0}, "checkpoint_minutes 0.0 must be above 0"),
        ({"spike": -1.0}, "spike -1.0 must be above 0"),
        ({"spike_window": 1}, "spike_window 1 must be at least 2"),
        ({"spike": 3.0, "checkpoint_every": None}, "spike needs checkpoint_every"),
    ],
)
def test_impossible_settings_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        loop.Settings(**{"steps": 5} | values)


def test_learning_rates_come_in_chunks_but_each_is_the_schedule_s():
    schedule = lambda n: 0.5 ** (n / 700)  # noqa: E731
    rates = loop._Rates(schedule)
    for n in (0, 1, 1023, 1024, 5, 3000):
        assert rates(n) == pytest.approx(float(schedule(n)), rel=1e-5)
    assert loop._Rates(lambda n: 0.25)(7) == 0.25
    assert loop._Rates(None)(7) is None
    assert isinstance(rates(1), float)
    assert (
        np.float32(rates(2)) == np.asarray(jax.vmap(schedule)(np.arange(1024, dtype=np.int32)))[2]
    )
