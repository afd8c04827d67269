"""Learning rates by step, and batch sizes by batch: what changes while a run goes on.

A schedule is a function of the number of updates made before, as Optax wants it. All of them rise
linearly from 0 in `warmup` steps; a schedule without warm-up begins at its peak. After the last
step they stay where they ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax.numpy as jnp
import optax

Kind = Literal["cosine", "linear", "constant", "wsd", "wsd-sqrt"]
"""For a command line's own type."""


def schedule(
    kind: str,
    peak: float,
    *,
    steps: int,
    warmup: int,
    end: float | None = None,
    decay: float = 0.2,
) -> optax.Schedule:
    """The schedule of this kind, for a command line.

    Args:
        kind: "cosine", "linear" and "constant" are the functions below; "wsd" falls along a line,
            "wsd-sqrt" along one minus a square root.
        peak: the highest learning rate.
        steps: updates of the whole run.
        warmup: updates until the peak.
        end: share of the peak that is left at the end; by default the kind's own: 0.1 for "cosine",
            0 for the others.
        decay: share of the steps in which "wsd" and "wsd-sqrt" fall.

    Raises:
        ValueError: the kind is unknown, "constant" is given an end, or a number is out of range.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"schedule {kind!r} must be one of {', '.join(get_args(Kind))}")
    if kind == "constant":
        if end is not None:
            raise ValueError(f"a constant schedule has no end {end}; leave it out")
        return constant(peak, steps=steps, warmup=warmup)
    if kind == "cosine":
        return warmup_cosine(peak, steps=steps, warmup=warmup, end=0.1 if end is None else end)
    end = 0.0 if end is None else end
    if kind == "linear":
        return linear(peak, steps=steps, warmup=warmup, end=end)
    if not 0 < decay <= 1:
        raise ValueError(f"decay {decay} must be a share of the steps, above 0 and at most 1")
    length = max(1, round(decay * steps))
    shape: Literal["linear", "sqrt"] = "sqrt" if kind == "wsd-sqrt" else "linear"
    return wsd(peak, steps=steps, warmup=warmup, decay=length, end=end, shape=shape)


def warmup_cosine(peak: float, *, steps: int, warmup: int, end: float = 0.1) -> optax.Schedule:
    """Linear to `peak` in `warmup` steps, then half a cosine to `end · peak` at `steps`.

    Raises:
        ValueError: the warm-up does not fit into the steps, or the end is no share of the peak.
    """
    _check(steps, warmup, end)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, end * peak)


def linear(peak: float, *, steps: int, warmup: int, end: float = 0.0) -> optax.Schedule:
    """Linear to `peak` in `warmup` steps, then a line to `end · peak` at `steps`.

    To zero is best for long runs (Bergsma et al. 2025, "Straight to Zero"); Llama 3 anneals so.

    Raises:
        ValueError: the warm-up does not fit into the steps, or the end is no share of the peak.
    """
    _check(steps, warmup, end)
    return wsd(peak, steps=steps, warmup=warmup, decay=steps - warmup, end=end)


def constant(peak: float, *, steps: int, warmup: int) -> optax.Schedule:
    """Linear to `peak` in `warmup` steps, which it keeps.

    Raises:
        ValueError: the warm-up does not fit into the steps.
    """
    _check(steps, warmup, 1.0)
    return _rising(peak, warmup)


def wsd(
    peak: float,
    *,
    steps: int,
    warmup: int,
    decay: int,
    end: float = 0.0,
    shape: Literal["linear", "sqrt"] = "linear",
) -> optax.Schedule:
    """Warm-up, stable, decay (Hu et al. 2024, "MiniCPM"): `peak` until the last `decay` steps.

    One long run at the peak may be branched at any step into a short decay, so that models of
    several lengths cost one run. With u the share of the decay that is over, the rate is
    peak · (end + (1 - end) · (1 - u)) for "linear" and peak · (end + (1 - end) · (1 - √u)) for
    "sqrt" (Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
    Durations", who find it better than the line, with a tenth to a fifth of the steps).

    Raises:
        ValueError: warm-up and decay do not fit into the steps, or the end is no share of the peak.
    """
    _check(steps, warmup, end)
    if not 1 <= decay <= steps - warmup:
        raise ValueError(
            f"decay {decay} must be from 1 to the {steps - warmup} steps after the warm-up"
        )

    def falling(count: Any) -> Any:
        over = jnp.clip(count / decay, 0, 1)
        left = 1 - (jnp.sqrt(over) if shape == "sqrt" else over)
        return peak * (end + (1 - end) * left)

    return optax.join_schedules([_rising(peak, warmup), falling], [steps - decay])


def batch_ramp(
    stages: Sequence[tuple[int, int]],
    *,
    unit: Literal["batches", "tokens"] = "batches",
    length: int | None = None,
) -> list[tuple[int, int]]:
    """A batch size that grows, as (from which batch, rows) for `data.pipeline`.

    Llama 3 405B trained on 4 M tokens a step, on 8 M after 252 M tokens and on 16 M after 2.87 T
    (Llama 3 paper, §3.4.1).

    Args:
        stages: (from when, rows); the first one from 0 on.
        unit: what "when" counts: batches before, or tokens before. A stage that is reached within a
            batch begins with the next one.
        length: tokens of a row; needed for "tokens".

    Raises:
        ValueError: there is no stage, the first does not begin at 0, one does not begin after the
            one before it, a batch has no rows, or the length is missing.
    """
    if not stages or stages[0][0] != 0:
        raise ValueError(f"batch sizes {list(stages)} must have a stage that begins at 0")
    if unit == "tokens" and (length is None or length < 1):
        raise ValueError(f"stages in tokens need the length of a row, which is {length}")
    made: list[tuple[int, int]] = []
    batch = tokens = 0
    for begin, rows in stages:
        if rows < 1:
            raise ValueError(f"stage ({begin}, {rows}): a batch must have at least 1 row")
        if unit == "tokens" and made:
            assert length is not None
            each = made[-1][1] * length
            more = -(-(begin - tokens) // each)
            batch, tokens = batch + more, tokens + more * each
        else:
            batch = begin
        if made and batch <= made[-1][0]:
            raise ValueError(
                f"stage ({begin}, {rows}) must begin at least one batch after the one before it"
            )
        made.append((batch, rows))
    return made


def _rising(peak: float, warmup: int) -> optax.Schedule:
    """A line from 0 to `peak`, and no more; Optax's stays at 0 without warm-up."""
    if warmup == 0:
        return optax.constant_schedule(peak)
    return optax.linear_schedule(0.0, peak, warmup)


def _check(steps: int, warmup: int, end: float) -> None:
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup {warmup} must be at least 0 and below steps {steps}")
    if not 0 <= end <= 1:
        raise ValueError(f"end {end} must be a share of the peak, from 0 to 1")
