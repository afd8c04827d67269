"""Schedules go through the corners they name; ramps begin where their tokens say."""

import numpy as np
import pytest

from l4jax.training import schedules


def rates(schedule, last):
    return np.array([float(schedule(step)) for step in range(last + 1)])


def test_warm_up_is_linear_and_decay_is_half_a_cosine():
    found = rates(schedules.warmup_cosine(2.0, steps=110, warmup=10), 120)
    assert found[:11] == pytest.approx(np.arange(11) * 0.2)
    wave = 0.2 + 1.8 * (1 + np.cos(np.pi * np.arange(101) / 100)) / 2
    assert found[10:111] == pytest.approx(wave, rel=1e-5)
    assert found[111:] == pytest.approx(np.full(10, 0.2))


def test_a_line_ends_at_its_end_and_stays():
    found = rates(schedules.linear(3.0, steps=25, warmup=5, end=0.2), 30)
    assert found[:6] == pytest.approx(0.6 * np.arange(6))
    assert found[5:26] == pytest.approx(np.linspace(3.0, 0.6, 21), rel=1e-6)
    assert found[25:] == pytest.approx(np.full(6, 0.6))


def test_a_constant_stays_at_its_peak():
    found = rates(schedules.constant(4.0, steps=9, warmup=4), 12)
    assert found == pytest.approx([0, 1, 2, 3, *[4] * 9])


@pytest.mark.parametrize("shape", ["linear", "sqrt"])
@pytest.mark.parametrize("end", [0.0, 0.1])
def test_warm_up_stable_decay(shape, end):
    found = rates(
        schedules.wsd(2.0, steps=30, warmup=4, decay=9, end=end, shape=shape),
        33,
    )
    assert found[:5] == pytest.approx([0, 0.5, 1.0, 1.5, 2.0])
    assert found[4:22] == pytest.approx(np.full(18, 2.0))
    over = np.arange(10) / 9
    left = 1 - (np.sqrt(over) if shape == "sqrt" else over)
    assert found[21:31] == pytest.approx(2 * (end + (1 - end) * left), rel=1e-5, abs=1e-7)
    assert found[30:] == pytest.approx(np.full(4, 2 * end))


def test_a_decay_may_follow_the_warm_up_at_once():
    found = rates(schedules.wsd(1.0, steps=7, warmup=3, decay=4), 7)
    assert found == pytest.approx([0, 1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd", "wsd-sqrt"])
def test_a_schedule_without_warm_up_begins_at_its_peak(kind):
    found = schedules.schedule(kind, 3.0, steps=10, warmup=0)
    assert float(found(0)) == pytest.approx(3.0)


def test_names_choose_the_functions():
    steps = {"steps": 40, "warmup": 4}
    pairs = [
        (("cosine", {}), schedules.warmup_cosine(1.0, **steps, end=0.1)),
        (("cosine", {"end": 0.3}), schedules.warmup_cosine(1.0, **steps, end=0.3)),
        (("linear", {}), schedules.linear(1.0, **steps)),
        (("constant", {}), schedules.constant(1.0, **steps)),
        (("wsd", {}), schedules.wsd(1.0, **steps, decay=8)),
        (
            ("wsd-sqrt", {"decay": 0.25, "end": 0.05}),
            schedules.wsd(1.0, **steps, decay=10, end=0.05, shape="sqrt"),
        ),
    ]
    curves = []
    for (kind, leaves), expected in pairs:
        curves.append(rates(schedules.schedule(kind, 1.0, **steps, **leaves), 41))
        np.testing.assert_array_equal(curves[-1], rates(expected, 41), err_msg=kind)
    assert len({tuple(x) for x in curves}) == len(curves)


@pytest.mark.parametrize(("steps", "warmup"), [(10, 10), (10, 11), (10, -1), (0, 0)])
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_a_warm_up_that_does_not_fit_is_refused(kind, steps, warmup):
    with pytest.raises(ValueError, match=f"warmup {warmup} must be .* below steps {steps}"):
        schedules.schedule(kind, 1.0, steps=steps, warmup=warmup)


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"kind": "cosin"}, "'cosin' must be one of cosine, linear, constant, wsd, wsd-sqrt"),
        ({"kind": "cosine", "end": 1.5}, "end 1.5 must be a share"),
        ({"kind": "linear", "end": -0.1}, "end -0.1 must be a share"),
        ({"kind": "constant", "end": 0.1}, "constant schedule has no end 0.1"),
        ({"kind": "wsd", "decay": 0.0}, "decay 0.0 must be a share of the steps"),
        ({"kind": "wsd", "decay": 1.0}, "decay 20 must be from 1 to the 18 steps"),
    ],
)
def test_what_makes_no_schedule_is_refused(leaves, message):
    with pytest.raises(ValueError, match=message):
        schedules.schedule(**{"kind": "cosine", "peak": 1.0, "steps": 20, "warmup": 2, **leaves})


# --- Batch sizes ---------------------------------------------------------------------------------
def test_a_ramp_in_batches_is_as_it_was_said():
    assert schedules.batch_ramp([(0, 4), (10, 6)]) == [(0, 4), (10, 6)]


def test_a_ramp_in_tokens_begins_with_the_first_batch_after_them():
    """By going through the batches one by one."""
    stages, length = [(0, 3), (100, 5), (333, 8)], 11
    seen, starts, rows = 0, [], None
    for batch in range(40):
        now = [size for begin, size in stages if begin <= seen][-1]
        if now != rows:
            starts.append((batch, now))
        rows = now
        seen += rows * length
    assert schedules.batch_ramp(stages, unit="tokens", length=length) == starts
    assert len(starts) == 3


@pytest.mark.parametrize(
    ("stages", "more", "message"),
    [
        ([], {}, "must have a stage that begins at 0"),
        ([(1, 4)], {}, "must have a stage that begins at 0"),
        ([(0, 0)], {}, r"stage \(0, 0\): a batch must have at least 1 row"),
        ([(0, 4), (0, 8)], {}, r"stage \(0, 8\) must begin at least one batch after"),
        ([(0, 4), (9, 8), (5, 9)], {}, r"stage \(5, 9\) must begin"),
        ([(0, 4), (5, 8), (6, 9)], {"unit": "tokens", "length": 2}, r"\(6, 9\) must begin"),
        ([(0, 4)], {"unit": "tokens"}, "need the length of a row, which is None"),
    ],
)
def test_what_is_no_ramp_is_refused(stages, more, message):
    with pytest.raises(ValueError, match=message):
        schedules.batch_ramp(stages, **more)
