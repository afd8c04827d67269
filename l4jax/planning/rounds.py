"""Slices that train by themselves and meet every so many steps (DiLoCo): what the meetings cost.

Between meetings every slice makes the step that is planned for it alone, so that nothing crosses
the data centre's network. At a meeting the mean of the slices' parameters is what a Nesterov step
goes towards, from where the last meeting ended (Douillard et al. 2023); `federated.algorithms.
diloco` does the same between clients. For that a slice holds, in float32 and laid out like its
parameters, those of the last meeting and the momentum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from l4jax import sharding
from l4jax.planning import compiler, counting, timing
from l4jax.planning.chips import GIB, Topology
from l4jax.planning.programs import Program

AXIS = "slices"


class Rounds(NamedTuple):
    """How often slices meet."""

    slices: int
    steps: int
    """That each makes by itself before."""


@dataclasses.dataclass(frozen=True)
class Meeting:
    """What a meeting needs of every device.

    held_gib: between meetings, beside the training state. peak_gib: at a meeting, without the
    optimizer's state. wire: bytes sent between slices. seconds: at least.
    """

    held_gib: float
    peak_gib: float
    wire: float
    seconds: float


def meeting(params: Any, topology: Topology, sizes: Mapping[str, int], slices: int) -> Meeting:
    """Compiles a meeting.

    Args:
        params: abstract parameters, on the mesh of one slice.
        topology: of one slice.
        sizes: of its mesh.
        slices: how many there are.

    Raises:
        compiler.NoCompiler, compiler.Failed: as for plans, and where a meeting does not fit.
    """
    all_slices = dataclasses.replace(topology, slices=slices)
    devices = compiler.devices(all_slices)
    laid_out = sharding.make_mesh(devices, **{**sizes, "data": sizes["data"] * slices}).devices
    shape = tuple(sizes[axis] for axis in sharding.AXES)
    mesh = Mesh(
        laid_out.reshape(slices, *shape),
        (AXIS, *sharding.AXES),
        axis_types=(AxisType.Auto,) * (1 + len(shape)),
    )
    program = _program(params, mesh, slices)
    found = compiler.compile(program, mesh)
    if isinstance(found, compiler.TooLarge):
        raise compiler.Failed(f"slices cannot meet: that alone needs {found.needed_gib:.1f} GiB")
    counts = counting.count(found.text, {AXIS: slices, **sizes}, slices=slices)
    times = timing.seconds(counts, all_slices, list(mesh.devices.flat))
    held = program.bytes()["between meetings"] / GIB
    return Meeting(held, found.memory.peak, counts.wire("dcn"), times.total)


def together(report: Mapping[str, Any], met: Meeting, rounds: Rounds) -> dict[str, Any]:
    """What changes in the plan of one slice's step that fits, by the meetings of all."""
    hbm = dict(report["hbm_gib"])
    hbm["meetings"] = met.held_gib
    hbm["total"] = max(hbm["total"] + met.held_gib, hbm["optimizer"] + met.peak_gib)
    missing = hbm["total"] - hbm["capacity"]
    alone = report["roofline_seconds"]["total"]
    slower = alone / (alone + met.seconds / rounds.steps)
    changed = {
        "fits": missing <= 0,
        "hbm_gib": hbm | ({"missing": missing} if missing > 0 else {}),
        "meetings": {
            "steps": rounds.steps,
            "wire_gb": met.wire / 1e9,
            "wire_gb_per_step": met.wire / 1e9 / rounds.steps,
            "seconds": met.seconds,
            "seconds_per_step": met.seconds / rounds.steps,
        },
        "mfu_bound": report["mfu_bound"] * slower,
        "tokens_per_second": report["tokens_per_second"] * rounds.slices * slower,
    }
    if "cost_per_million_tokens" in report:
        changed["cost_per_million_tokens"] = report["cost_per_million_tokens"] / slower
    return changed


def _program(params: Any, mesh: Mesh, slices: int) -> Program:
    optimizer = optax.sgd(0.7, momentum=0.9, nesterov=True)

    def meet(own: Any, last: Any, momentum: Any) -> tuple[Any, Any, Any]:
        moved = jax.tree.map(lambda last, x: last - jnp.mean(x, axis=0), last, own)
        updates, momentum = optimizer.update(moved, momentum, last)
        last = optax.apply_updates(last, updates)
        own = jax.tree.map(lambda last, x: jnp.broadcast_to(last, x.shape), last, own)
        return own, last, momentum

    def placed(x: Any, *leading: Any) -> Any:
        shape = (slices, *x.shape) if leading else x.shape
        place = NamedSharding(mesh, PartitionSpec(*leading, *x.sharding.spec))
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=place)

    own = jax.tree.map(lambda x: placed(x, AXIS), params)
    last = jax.tree.map(placed, params)
    (trace, *rest) = jax.eval_shape(optimizer.init, last)
    momentum = (trace._replace(trace=last), *rest)
    arguments = own, last, momentum
    places = jax.tree.map(lambda x: x.sharding, arguments)
    function = jax.jit(meet, donate_argnums=(0, 1, 2), out_shardings=places)
    parts = {"parameters": own, "between meetings": (last, momentum)}
    return Program(mesh, sharding.TRAINING, function, arguments, {}, parts)
