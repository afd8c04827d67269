"""What `l4jax plan` does with what it is told: one plan, a search, or the longest context."""

from __future__ import annotations

import json
import pathlib
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from l4jax import presets
from l4jax.planning import charts, chips, compiler, meshes, plan
from l4jax.planning.meshes import Task
from l4jax.planning.rounds import Rounds
from l4jax.training import checkpointing

How = Literal["plan", "measure", "search", "longest"]


def request(
    preset: str,
    *,
    topology: str,
    slices: int,
    task: Task,
    seq: int | None,
    context: str | None,
    mesh: str | None,
    local_steps: int | None = None,
    **rest: Any,
) -> plan.Request:
    """What the options ask for; `rest` as in `plan.Request`.

    With `local_steps` the mesh is of one slice, and the batch of all of them.

    Raises:
        ValueError: they do not go together, or are out of range.
    """
    if context is not None and task != "decode":
        raise ValueError(f"--context is for --task decode; a {task} step has --seq")
    if context is not None and seq is not None:
        raise ValueError("--seq and --context say the same when decoding: give one")
    length = seq
    if context not in (None, "max"):
        assert context is not None
        if not context.isdecimal():
            raise ValueError(f"context {context!r} must be a number of tokens or max")
        length = int(context)
    sizes = meshes.parse(mesh) if mesh is not None else None
    if preset.removeprefix("tiny-") not in presets.PRESETS and pathlib.Path(preset).exists():
        raise ValueError(f"{preset} is no preset: plan takes the name of the one that it is of")
    if local_steps is not None:
        rest |= _rounds(slices, local_steps, rest.get("batch"))
        slices = 1
    asked = plan.Request(
        preset=preset,
        topology=chips.parse(topology, slices=slices),
        task=task,
        mesh=sizes,
        length=length,
        **rest,
    )
    if sizes is not None:
        meshes.check(asked.config, asked.topology, asked.work, sizes)
    return asked


def _rounds(slices: int, steps: int, batch: int | None) -> dict[str, Any]:
    """What is asked of each slice where slices train by themselves."""
    if slices < 2:
        raise ValueError("--local-steps is for several --slices, which meet after so many")
    if batch is not None and batch % slices:
        raise ValueError(f"{slices} slices must divide the batch of {batch}")
    each = batch if batch is None or batch < 1 else batch // slices
    return {"rounds": Rounds(slices, steps), "batch": each}


def how(*, search: bool, limit: int, context: str | None, measure: bool) -> tuple[How, int]:
    """What kind of plan the options ask for, and how many programs at most.

    Raises:
        ValueError: they ask for two kinds.
    """
    asked: list[How] = []
    if search:
        asked.append("search")
    if context == "max":
        asked.append("longest")
    if measure:
        asked.append("measure")
    if len(asked) > 1:
        raise ValueError("--search, --context max and --measure do not go together: give one")
    if limit < 1:
        raise ValueError(f"limit {limit} must be at least 1")
    return (asked or ["plan"])[0], limit


def make(
    request: plan.Request, how: tuple[How, int], *, out: pathlib.Path | None, console: Console
) -> dict[str, Any]:
    """The plan, with `plans` if it was a search; written to `out` too.

    Raises:
        compiler.NoCompiler, compiler.Failed, ValueError: see `plan.plan`.
    """
    compiler.require()
    if how[0] != "measure":
        compiler.leave_tpu_alone()
    if out is not None:
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is a file; --out needs a folder")
        out.mkdir(parents=True, exist_ok=True)
        for name in ("plan.json", "plan.png", "compiler.txt"):
            (out / name).unlink(missing_ok=True)  # of an earlier plan
    about = f"Compiling {request.preset} for {request.topology.name}"
    with console.status(about) as status:
        facts = _apart(lambda: _made(request, how, out, lambda x: status.update(f"{about}: {x}")))
    if out is not None:
        with checkpointing.appearing(out / "plan.png") as file:
            charts.save(facts, file)
        with checkpointing.appearing(out / "plan.json") as file:
            file.write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def _made(
    request: plan.Request, how: tuple[How, int], out: pathlib.Path | None, notify: plan.Notify
) -> dict[str, Any]:
    kind, limit = how
    if kind == "longest":
        return plan.longest(request, notify=notify, out=out)
    if kind == "measure":
        return plan.measured(request, notify=notify, out=out)
    if kind == "plan":
        return plan.plan(request, out=out)
    plans = plan.search(request, limit=limit, notify=notify, out=out)
    if not plans:
        raise RuntimeError("the compiler refused every program that was tried")
    return plans[0] | {"plans": plans}


def _apart(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`work()`, in a thread that Ctrl-C leaves behind: the compiler would not hear of it."""
    done: queue.SimpleQueue[dict[str, Any] | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put(work())
        except BaseException as error:
            done.put(error)

    threading.Thread(target=run, daemon=True).start()
    found = done.get()
    if isinstance(found, BaseException):
        raise found
    return found


def show(facts: Mapping[str, Any], console: Console) -> None:
    """Prints a plan for people."""
    console.print(charts.title(facts), style="bold", markup=False, highlight=False)
    table = Table(show_header=False, box=None)
    for row in _rows(facts):
        table.add_row(*row)
    console.print(table)
    for line in facts.get("advice", []):
        console.print(f"would fit, by estimate: {line}", markup=False, highlight=False)
    for name in facts.get("uncounted_kernels", []):
        console.print(f"operations of the kernel {name} are unknown", style="yellow")
    for name in facts.get("open_loops", []):
        console.print(f"counted once, as its trips are unknown: {name}", style="yellow")
    if "plans" in facts:
        console.print(_ranking(facts["plans"]))


def _gib(n: float) -> str:
    return f"{n:.1f}" if n >= 0.05 else f"{n:.2g}"


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    hbm = facts["hbm_gib"]
    outer = ("total", "capacity", "missing", "host")
    shown = {k: n for k, n in hbm.items() if k not in outer and n >= hbm["total"] / 200}
    parts = ", ".join(f"{k} {_gib(n)}" for k, n in shown.items())
    parts = f" ({parts})" if parts else ""
    least = "" if facts["fits"] else "at least "
    verdict = "fits" if facts["fits"] else f"does not fit by {hbm['missing']:.1f} GiB"
    took = facts["compile_seconds"]
    rows = [
        ("HBM", f"{least}{_gib(hbm['total'])} of {hbm['capacity']} GiB{parts}: {verdict}"),
    ]
    if facts["remat"] is not None:
        rows.append(("rematerialization", facts["remat"]))
    if "meetings" in facts:
        met = facts["meetings"]
        rows.append(
            (
                "slices meet",
                f"every {met['steps']} steps: {met['wire_gb']:.3g} GB of each device, "
                f"at least {met['seconds']:.3g} s; {met['seconds_per_step']:.2g} s for each step",
            )
        )
    if "tiles" in facts:
        encoder = "left as it is" if facts["freeze_vision"] else "trained"
        trained = f", the encoder {encoder}" if facts["remat"] is not None else ""
        rows.append(("images", f"{facts['tiles']} tiles in each sequence{trained}"))
    if facts["fits"]:
        wire, flops, times = facts["wire_gb"], facts["flops"], facts["roofline_seconds"]
        for name, group in (("by kind", wire["by_kind"]), ("by mesh axis", wire["by_axis"])):
            listed = ", ".join(f"{kind} {n:.3g}" for kind, n in group.items())
            rows.append((f"traffic {name}", f"{wire['total']:.4g} GB: {listed or 'none'}"))
        times_listed = ", ".join(
            f"{name} {n:.3g}"
            for name, n in times.items()
            if name not in ("total", "without_overlap")
        )
        rows += [
            (
                "FLOPs",
                f"{flops['executed'] / 1e12:,.4g} T per device and step, "
                f"{flops['executed'] / flops['ideal']:.2f} times the model's own",
            ),
            (
                "least time",
                f"{times['total']:.3g} s, bound by {facts['bound']} ({times_listed}); "
                f"{times['without_overlap']:.3g} s if nothing overlaps",
            ),
            (
                "at best",
                f"{facts['mfu_bound']:.1%} of peak, {facts['tokens_per_second']:,.0f} tokens/s",
            ),
        ]
    if "cost_per_million_tokens" in facts:
        rows.append(("cost at best", f"{facts['cost_per_million_tokens']:.4g} per million tokens"))
    if "measured_seconds" in facts:
        rows.append(
            ("measured", f"{facts['measured_seconds']:.3g} s, {facts['measured_mfu']:.1%} of peak")
        )
    rows.append(("compiled in", f"{took['wall']:.0f} s, {took['cpu']:.0f} CPU-seconds"))
    return rows


def _ranking(plans: list[dict[str, Any]]) -> Table:
    table = Table("mesh", "remat", "GiB", "GB sent", "least s", "MFU at best", title="Ranking")
    for found in plans:
        fits = found["fits"]
        table.add_row(
            meshes.show(found["mesh"]),
            found["remat"] or "",
            _gib(found["hbm_gib"]["total"]) + ("" if fits else " (too large)"),
            f"{found['wire_gb']['total']:.4g}" if fits else "",
            f"{found['roofline_seconds']['total']:.3g}" if fits else "",
            f"{found['mfu_bound']:.1%}" if fits else "",
        )
    return table
