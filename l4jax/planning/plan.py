"""Plans: what a step needs, moves and takes on a pod, as the TPU compiler and arithmetic say.

A plan is plain JSON values. Its memory is the compiler's own figure, its traffic and operations are
counted in the compiled program, its times are the least that these allow.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from l4jax import presets, sharding
from l4jax.config import Execution, Remat, TextConfig
from l4jax.models.vision import tile_features
from l4jax.planning import compiler, counting, measuring, meshes, programs, rounds, timing
from l4jax.planning.chips import GIB, Topology
from l4jax.planning.meshes import Task, Work
from l4jax.planning.rounds import Rounds

Notify = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to plan; None where a rule decides.

    Raises:
        ValueError: a number is out of range, or the model cannot do it.
    """

    preset: str
    topology: Topology
    task: Task = "train"
    mesh: Mapping[str, int] | None = None
    remat: Remat | None = None
    batch: int | None = None
    """Sequences in a step of all devices; by default one for each device."""
    length: int | None = None
    """Tokens of a sequence, of decoding those in the cache; by default 8192, or all it allows."""
    tiles: int = 0
    """Of images in each sequence; with any, the image encoder is part of the step."""
    freeze_vision: bool = False
    """Leave the image encoder as it is."""
    rounds: Rounds | None = None
    """Of slices that train by themselves; the rest is then of one slice."""
    price: float | None = None
    """Of a chip and hour."""

    def __post_init__(self) -> None:
        length = "context" if self.task == "decode" else "seq"
        for name, value in (
            ("batch", self.batch),
            (length, self.length),
            ("price_per_chip_hour", self.price),
        ):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} {value} must be greater than 0, and finite")
        limit = self.config.max_context
        if self.length is not None and self.length > limit:
            raise ValueError(f"{self.length} tokens are more than the model's {limit}")
        if self.remat is not None and not self.work.trains:
            raise ValueError(f"remat is for training: a {self.task} step has no backward pass")
        if self.rounds is not None and (self.task not in meshes.UPDATES or self.rounds.steps < 1):
            raise ValueError(
                f"local_steps {self.rounds.steps} must be at least 1, and the task one of "
                f"{', '.join(meshes.UPDATES)}, not {self.task}"
            )
        self._check_images()

    def _check_images(self) -> None:
        if self.tiles < 0:
            raise ValueError(f"tiles {self.tiles} must be at least 0")
        if self.freeze_vision and not (self.tiles and self.task in meshes.UPDATES):
            raise ValueError("--freeze-vision is for training with --tiles")
        if not self.tiles:
            return
        vision = presets.get(self.preset).vision
        if vision is None:
            raise ValueError(f"{self.preset} reads text only: it has no encoder for --tiles")
        if self.task == "decode":
            raise ValueError("a decode step reads no images: they are in the cache; leave --tiles")
        each, length = tile_features(vision), self.work.length
        if self.tiles * each > length:
            raise ValueError(
                f"{self.tiles} tiles of {each} tokens are more than the {length} of a sequence: "
                f"at most {length // each} tiles"
            )

    @property
    def config(self) -> TextConfig:
        """The model."""
        return presets.get(self.preset).make()

    @property
    def work(self) -> Work:
        """What a step does, defaults filled in."""
        length = min(8192, self.config.max_context) if self.length is None else self.length
        batch = meshes.rows(self.task, self.topology) if self.batch is None else self.batch
        vision, images = presets.get(self.preset).vision, None
        if self.tiles and vision is not None:
            images = meshes.Pictures(vision, self.tiles, self.freeze_vision)
        meets = self.rounds is not None
        return Work(task=self.task, batch=batch, length=length, images=images, meets=meets)

    @property
    def alone(self) -> int:
        """How many slices make this step by themselves."""
        return 1 if self.rounds is None else self.rounds.slices

    def layout(self) -> tuple[dict[str, int], Remat]:
        """The mesh and what is kept for the backward pass: as asked, or as `meshes` recommends.

        Raises:
            ValueError: the mesh is not one of the slice, or no mesh divides the model and batch.
        """
        ranked = meshes.rank(self.config, self.topology, self.work, self.remat)
        if self.mesh is not None:
            meshes.check(self.config, self.topology, self.work, self.mesh)
            ranked = [option for option in ranked if option[0] == dict(self.mesh)]
        if not ranked:
            raise ValueError(
                f"no mesh of {self.topology.devices} devices divides {self.preset} and a batch of "
                f"{self.work.batch} × {self.work.length} tokens; try a batch that is a multiple of "
                f"{self.topology.devices}"
            )
        return ranked[0]


def plan(request: Request, *, out: pathlib.Path | None = None) -> dict[str, Any]:
    """Compiles what is asked, and reports.

    Args:
        request: what to plan.
        out: folder for the compiler's whole message if it refuses; none is written by default.

    Raises:
        compiler.NoCompiler: libtpu is not installed.
        compiler.Failed: the compiler refuses the program, but not for want of memory.
        ValueError: what is asked does not go together.
    """
    mesh, remat = request.layout()
    return compiled(request, mesh, remat, out=out)[0]


def compiled(
    request: Request,
    sizes: Mapping[str, int],
    remat: Remat,
    *,
    devices: Sequence[Any] | None = None,
    out: pathlib.Path | None = None,
) -> tuple[dict[str, Any], compiler.Compiled | None]:
    """The plan with this mesh, and the compiled program if it fits.

    Args:
        request: what to plan.
        sizes: of the mesh.
        remat: what to keep for the backward pass.
        devices: to compile for; by default such as nobody holds.
        out: as in `plan`.
    """
    topology, work = request.topology, request.work
    versions = compiler.versions()
    mesh = sharding.make_mesh(devices or compiler.devices(topology), **sizes)
    execution = Execution(dtype="bfloat16", remat=remat)
    program = programs.program(request.config, work, execution=execution, mesh=mesh)
    try:
        found = compiler.compile(program, mesh)
    except compiler.Failed as error:
        _keep(error.text, out)
        raise
    report: dict[str, Any] = {
        "preset": request.preset,
        "task": work.task,
        "topology": topology.name,
        "slices": topology.slices * request.alone,
        "chips": topology.chips * request.alone,
        "devices": topology.devices * request.alone,
        "mesh": {axis: n for axis, n in sizes.items() if n > 1},
        "remat": remat if work.trains else None,
        "batch": work.batch * request.alone,
        "length": work.length,
        **({"tiles": request.tiles, "freeze_vision": request.freeze_vision} if work.images else {}),
    }
    if isinstance(found, compiler.TooLarge):
        _keep(found.text, out)
        report |= {"fits": False, "hbm_gib": _too_large(request, program, found)}
        report["advice"] = advice(request, sizes, remat, found.needed_gib)
    else:
        report |= {"fits": True, "hbm_gib": _memory(request, program, found)}
        report |= _costs(request, sizes, found, list(mesh.devices.flat))
        if request.rounds is not None:
            report |= _with_meetings(request, sizes, report, program.parts["parameters"])
    report |= {
        "compile_seconds": {"wall": found.wall_seconds, "cpu": found.cpu_seconds},
        "versions": dataclasses.asdict(versions),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    return report, found if isinstance(found, compiler.Compiled) else None


def _keep(text: str, out: pathlib.Path | None) -> None:
    """Keeps the compiler's whole message."""
    if out is not None:
        (out / "compiler.txt").write_text(text)


def _memory(request: Request, program: Any, found: compiler.Compiled) -> dict[str, float]:
    parts = {name: size / GIB for name, size in program.bytes().items()}
    known = sum(parts.values())
    parts |= {
        "other arguments": max(0.0, found.memory.arguments - known),
        "temporaries": found.memory.temporaries,
        "total": found.memory.peak,
        "capacity": request.topology.generation.hbm_gib,
    }
    return parts | ({"host": found.memory.host} if found.memory.host else {})


def _too_large(request: Request, program: Any, found: compiler.TooLarge) -> dict[str, float]:
    """What it needs at least: the compiler may have given up before it knew of everything."""
    capacity = request.topology.generation.hbm_gib
    parts = {name: size / GIB for name, size in program.bytes().items()}
    total = max(found.needed_gib, sum(parts.values()))
    return parts | {
        "temporaries": total - sum(parts.values()),
        "total": total,
        "capacity": capacity,
        "missing": total - capacity,
    }


def _costs(
    request: Request,
    sizes: Mapping[str, int],
    found: compiler.Compiled,
    devices: list[Any],
) -> dict[str, Any]:
    """What the compiled program moves and computes, and the time that it takes at least."""
    topology, work = request.topology, request.work
    counts = counting.count(
        found.text,
        sizes,
        slices=topology.slices,
        grouped_rows=meshes.expert_rows(request.config, work, sizes),
        in_order=meshes.in_order(request.config, work, sizes),
        steps=programs.STEPS if work.task == "decode" else None,
    )
    times = timing.seconds(counts, topology, devices)
    ideal = meshes.ideal_flops(request.config, work) / topology.devices
    rate = work.tokens / times.total
    costs: dict[str, Any] = {
        "wire_gb": {
            "total": counts.wire() / 1e9,
            "by_kind": {kind: n / 1e9 for kind, n in counts.wire_by_kind().items()},
            "by_axis": {axes: n / 1e9 for axes, n in counts.wire_by_axes().items()},
        },
        "hbm_gb": counts.hbm_bytes / 1e9,
        "host_gb": {"out": counts.to_host_bytes / 1e9, "in": counts.from_host_bytes / 1e9},
        "flops": {
            "ideal": ideal,
            "executed": counts.flops,
            "products": counts.product_flops,
            "kernels": counts.kernel_flops,
        },
        "roofline_seconds": {
            "compute": times.compute,
            "hbm": times.hbm,
            "ici": times.ici,
            **({"dcn": times.dcn} if topology.slices > 1 else {}),
            "total": times.total,
            "without_overlap": times.serial,
        },
        "bound": times.bound,
        "mfu_bound": ideal / (topology.generation.flops * times.total),
        "tokens_per_second": rate,
        "idle_loops": counts.idle_loops,
        "open_loops": list(counts.open_loops),
        "uncounted_kernels": list(counts.uncounted_kernels),
    }
    if request.price is not None:
        hourly = request.price * topology.chips
        costs["cost_per_million_tokens"] = hourly / 3600 / rate * 1e6
    return costs


def _with_meetings(
    request: Request, sizes: Mapping[str, int], report: Mapping[str, Any], params: Any
) -> dict[str, Any]:
    """What changes in the plan of a slice's step where slices meet every so many of them."""
    assert request.rounds is not None
    if request.freeze_vision:  # alike on all slices
        params = {name: x for name, x in params.items() if name != "vision"}
    found = rounds.meeting(params, request.topology, sizes, request.rounds.slices)
    changed = rounds.together(report, found, request.rounds)
    if not changed["fits"]:
        total = changed["hbm_gib"]["total"]
        changed["advice"] = advice(request, sizes, report["remat"], total)
    return changed


def measured(request: Request, *, notify: Notify, out: pathlib.Path | None) -> dict[str, Any]:
    """The plan for this machine's own devices, with the seconds and the MFU of running it.

    Raises:
        ValueError: this machine has other devices.
    """
    devices = jax.devices()
    if devices[0].platform != "tpu" or len(devices) != request.topology.devices:
        raise ValueError(
            f"--measure needs {request.topology.name} itself, with {request.topology.devices} "
            f"devices; here are {len(devices)} {devices[0].platform.upper()} devices"
        )
    mesh, remat = request.layout()
    report, program = compiled(request, mesh, remat, devices=devices, out=out)
    if program is None:
        return report
    notify("running")
    seconds = measuring.measure(program.executable)
    peak = request.topology.generation.flops
    return report | {
        "measured_seconds": seconds,
        "measured_mfu": report["flops"]["ideal"] / (peak * seconds),
    }


# --- When it does not fit ------------------------------------------------------------------------
Fits = Callable[[Work, Mapping[str, int], Remat], bool]
"""Whether there is room for some work on a mesh."""


def advice(
    request: Request, sizes: Mapping[str, int], remat: Remat, needed_gib: float
) -> list[str]:
    """What would make it fit, by the compiler's figure and what the estimate changes by."""
    topology, work, config = request.topology, request.work, request.config
    beyond = needed_gib - meshes.estimate(config, topology, work, sizes, remat).gib

    def fits(work: Work, sizes: Mapping[str, int], remat: Remat) -> bool:
        guess = meshes.estimate(config, topology, work, sizes, remat)
        return guess.gib + beyond <= topology.generation.hbm_gib

    found = [*_otherwise(request, sizes, remat, fits), *_less(request, sizes, remat, fits)]
    if not any("--batch" in option or "--mesh" in option for option in found):
        found += _less_otherwise(request, fits)
    return [*found, *_larger(request, beyond)]


def _otherwise(
    request: Request, sizes: Mapping[str, int], remat: Remat, fits: Fits
) -> Iterator[str]:
    """The same work, with less kept or on another mesh."""
    work = request.work
    if work.trains:
        heavier: tuple[Remat, ...] = ("attention", "full", "offload")
        rest = heavier[heavier.index(remat) + 1 :] if remat in heavier else heavier
        yield from [f"--remat {r}" for r in rest if fits(work, sizes, r)][:1]
    for mesh, ranked in meshes.rank(request.config, request.topology, work)[:50]:
        kept = request.remat or ranked
        if mesh != dict(sizes) and fits(work, mesh, kept):
            yield f"--mesh {meshes.show(mesh)}" + (f" --remat {kept}" if work.trains else "")
            return


def _less(request: Request, sizes: Mapping[str, int], remat: Remat, fits: Fits) -> Iterator[str]:
    """Fewer or shorter sequences."""
    work = request.work
    option, mesh = "--context" if work.task == "decode" else "--seq", meshes.show(sizes)
    batches = _smaller(work.batch, math.prod(sizes[axis] for axis in sharding.BATCH))
    lengths = _smaller(work.length, math.lcm(1024, sizes["context"]))
    tried = (
        (
            (f"--batch {n * request.alone} --mesh {mesh}", dataclasses.replace(work, batch=n))
            for n in batches
        ),
        ((f"{option} {n}", dataclasses.replace(work, length=n)) for n in lengths),
    )
    for options in tried:
        yield from itertools.islice((x for x, less in options if fits(less, sizes, remat)), 1)


def _less_otherwise(request: Request, fits: Fits) -> Iterator[str]:
    """Fewer sequences on another mesh."""
    for batch in _smaller(request.work.batch, 1):
        less = dataclasses.replace(request.work, batch=batch)
        ranked = meshes.rank(request.config, request.topology, less, request.remat)
        if ranked and fits(less, *ranked[0]):
            yield f"--batch {batch * request.alone} --mesh {meshes.show(ranked[0][0])}"
            return


def _smaller(n: int, unit: int) -> Iterator[int]:
    """Multiples of `unit`, the first at most half of `n`, each other at most half of the last."""
    while n := n // 2 // unit * unit:
        yield n


def _larger(request: Request, beyond: float) -> Iterator[str]:
    """The smallest larger slice of this generation on which it should fit, as options."""
    here, capacity = request.topology, request.topology.generation.hbm_gib
    for shape in here.generation.shapes:
        sides = tuple(int(n) for n in shape.split("x"))
        topology = dataclasses.replace(here, shape=sides)
        if topology.chips <= here.chips:
            continue
        ranked = meshes.rank(request.config, topology, request.work, request.remat)
        if ranked:
            guess = meshes.estimate(request.config, topology, request.work, *ranked[0])
            if guess.gib + max(0.0, beyond) <= capacity:
                # A mesh that was asked for is not one of the larger slice.
                mesh = f" --mesh {meshes.show(ranked[0][0])}" if request.mesh is not None else ""
                yield f"--topology {topology.name}{mesh}"
                return


# --- Several plans -------------------------------------------------------------------------------
def search(
    request: Request, *, limit: int, notify: Notify, out: pathlib.Path | None = None
) -> list[dict[str, Any]]:
    """Plans of the `limit` most promising meshes and remat policies, best first.

    Which are promising the estimate says; the order is that of the compiled programs' least times,
    and what does not fit comes last.
    """
    ranked = meshes.rank(request.config, request.topology, request.work, request.remat)
    if request.mesh is not None:
        ranked = [option for option in ranked if option[0] == dict(request.mesh)]
    if not ranked:
        request.layout()
    found = []
    for number, (mesh, remat) in enumerate(ranked[:limit]):
        kept = f", remat {remat}" if request.work.trains else ""
        notify(f"{number + 1} of {min(limit, len(ranked))}: {meshes.show(mesh)}{kept}")
        try:
            found.append(compiled(request, mesh, remat, out=out)[0])
        except compiler.Failed as error:
            notify(str(error))
    return sorted(found, key=_merit)


def _merit(report: Mapping[str, Any]) -> tuple[bool, float]:
    fits = report["fits"]
    return not fits, -report["tokens_per_second"] if fits else report["hbm_gib"]["total"]


def longest(request: Request, *, notify: Notify, out: pathlib.Path | None = None) -> dict[str, Any]:
    """The plan of the longest context that fits, to within a thirty-second of it.

    Memory grows linearly with the context, so two compilations nearly say how far it goes; the
    mesh is chosen for that length.

    Raises:
        ValueError: not even the shortest fits.
    """
    config, step = request.config, _step(request.config)
    low, high = 0, config.max_context // step
    best: dict[str, Any] | None = None
    trial = min(high, max(1, 8192 // step))
    known: list[tuple[int, float]] = []
    while low < high and high - low > max(1, low) / 32:
        notify(f"context {trial * step:,}")
        report = plan(dataclasses.replace(request, length=trial * step), out=out)
        known.append((trial, report["hbm_gib"]["total"]))
        if report["fits"]:
            low, best = trial, report
        else:
            high = trial - 1
        trial = _next_trial(known, low, high, request.topology.generation.hbm_gib)
    if best is None:
        raise ValueError(
            f"not even {step:,} tokens of context fit; a larger slice or a smaller batch would do"
        )
    return best


def _step(config: TextConfig) -> int:
    """Contexts that are tried are multiples of this many tokens."""
    return min(1024, config.max_context)


def _next_trial(known: list[tuple[int, float]], low: int, high: int, capacity: float) -> int:
    """Where a line through the last two trials reaches `capacity`, between `low` and `high`."""
    trial = (low + high + 1) // 2
    if len(known) == 1 and low:
        trial = low * 16
    elif 1 < len(known) < 4:
        (one, needs), (other, needs_too) = known[-2:]
        slope = (needs_too - needs) / (other - one) if other != one else 0.0
        if slope > 0:
            trial = int(other + (capacity - needs_too) / slope)
    return min(high, max(low + 1, trial))
