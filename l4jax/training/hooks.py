"""What a run does beside its updates, now and then: evaluate, sample, profile."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from l4jax import inference
from l4jax.data.tokenizer import Tokenizer
from l4jax.training import tracking
from l4jax.training.objectives import Objective
from l4jax.training.trainer import Batch, Training, evaluator

PROFILED = 3
"""Updates that a profile shows."""


class Moment(NamedTuple):
    """When a hook is called: after update number `step` of a run in the folder `out`."""

    training: Training
    step: int
    out: epath.Path


Function = Callable[[Moment], Mapping[str, Any] | None]
"""Its result goes into the metrics of the update. All processes call it."""


class Hook(NamedTuple):
    """A function, and whether it is due after so many updates, the last ones or not."""

    due: Callable[[int, bool], bool]
    call: Function


def every(n: int | None, function: Function) -> Hook:
    """Calls a function after each `n`-th update and after the last one; None for never."""
    if n is not None and n < 1:
        raise ValueError(f"a hook is called every {n} steps: it must be at least 1, or None")
    return Hook(lambda step, last: n is not None and (last or step % n == 0), function)


def evaluate(objective: Objective, batches: Iterable[Batch], *, prefix: str = "eval_") -> Function:
    """The objective's scalar metrics over held-out batches, as `eval_loss` and so on."""
    measure = evaluator(objective)

    def call(moment: Moment) -> Mapping[str, Any]:
        found = measure(moment.training.model, batches)
        return {prefix + name: x for name, x in found.items() if isinstance(x, int | float)}

    return call


def sample(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.7,
    seed: int = 0,
) -> Function:
    """Continues every prompt; the texts go to `samples.jsonl`, one line for each."""
    ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts]

    def call(moment: Moment) -> None:
        made = inference.generate(
            moment.training.model,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop_ids=tokenizer.stop_ids,
        ).tokens
        if jax.process_index() == 0:
            # A run that went back comes by here again.
            lines = tracking.Lines(moment.out / "samples.jsonl", below=moment.step)
            for prompt, row in zip(prompts, made, strict=True):
                text = tokenizer.decode(row, skip_special=True)
                lines.write({"step": moment.step, "prompt": prompt, "text": text})
            lines.close()

    return call


def profile(folder: str, *, after: int, updates: int = PROFILED) -> Hook:
    """A trace of the updates after the first `after` ones, for XProf and Perfetto.

    Args:
        folder: of the trace; a cloud store's address too.
        after: updates before it begins; 0 would show the compilation and is not allowed.
        updates: how many it shows.
    """
    if after < 1:
        raise ValueError(f"a profile begins after {after} steps: it must be at least 1")
    running = False

    def call(moment: Moment) -> None:
        nonlocal running
        jax.block_until_ready(moment.training.state)
        if running:
            jax.profiler.stop_trace()
        elif moment.step == after:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # else it holds little but Python's calls
            if "://" not in folder:
                pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(folder, profiler_options=options)
        running = moment.step == after and not running

    return Hook(lambda step, last: step in (after, after + updates) or last and running, call)
