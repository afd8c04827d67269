"""Mesh axes, the one table from logical axes to them, and arrays that are born sharded.

A parameter names its dimensions ("embed", "heads", …); `RULES` says on which mesh axes each of them
lies. Without a mesh everything runs on one device and nothing here does anything.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""data: replicas. fsdp: parameters split, gathered for use. expert: experts split, never gathered.
context: the sequence split. tensor: heads and hidden widths split."""

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp", "expert"),
    "sequence": "context",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "experts": "expert",
    "router": None,
    "vocab": "tensor",
    "layers": None,
}

T = TypeVar("T")


def make_mesh(**sizes: int) -> Mesh:
    """A mesh over the first devices, e.g. `make_mesh(fsdp=4, expert=2)`; other axes have size 1.

    Raises:
        ValueError: an axis name is unknown, or the sizes need more devices than there are.
    """
    for axis in sizes:
        if axis not in AXES:
            raise ValueError(f"mesh axis {axis!r} is unknown; the axes are {', '.join(AXES)}")
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = jax.devices()
    if math.prod(shape) > len(devices):
        raise ValueError(
            f"a mesh of {' × '.join(f'{a}={n}' for a, n in zip(AXES, shape, strict=True))} needs "
            f"{math.prod(shape)} devices, but there are {len(devices)}"
        )
    return jax.make_mesh(
        shape, AXES, axis_types=(AxisType.Auto,) * 5, devices=devices[: math.prod(shape)]
    )


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
    """Inside this block models are created, loaded and run on `mesh`."""
    with jax.set_mesh(mesh):
        yield


def spec(*axes: str | None) -> PartitionSpec:
    """The mesh layout of an array whose dimensions have these logical names.

    Raises:
        ValueError: a name has no rule, or two dimensions would lie on the same mesh axis.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in RULES]
    if unknown:
        raise ValueError(f"no rule for logical axes {unknown}; known: {', '.join(RULES)}")
    placed = [RULES[axis] if axis is not None else None for axis in axes]
    used = [m for p in placed for m in ((p,) if isinstance(p, str) else p or ())]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {axes} would use a mesh axis twice: {placed}")
    return PartitionSpec(*placed)


def param_axes(param: nnx.Variable) -> tuple[str, ...]:
    """The logical axes of a parameter; dimensions added by stacking layers come first."""
    declared: tuple[str, ...] = param.get_metadata("axes")
    return ("layers",) * (param.get_raw_value().ndim - len(declared)) + declared


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, laid out by its logical axes on the current mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))


def shardings(abstract: nnx.State) -> nnx.State:
    """The sharding of every parameter of `abstract` on the current mesh, in the same tree."""
    mesh = jax.sharding.get_mesh()

    def place(param: nnx.Variable) -> nnx.Variable:
        sharding = (
            jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            if mesh.empty
            else NamedSharding(mesh, spec(*param_axes(param)))
        )
        return param.replace(sharding)

    return jax.tree.map(place, abstract, is_leaf=lambda x: isinstance(x, nnx.Variable))


def divisible(place: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """`place` for an array of this shape: dimensions that it does not divide stay whole.

    For the scales of quantized weights, which have one entry where the weight has many.
    """

    def parts(axes: str | tuple[str, ...] | None) -> int:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return math.prod(place.mesh.shape[name] for name in names)

    entries = (*place.spec, *(None,) * (len(shape) - len(place.spec)))
    kept = (axes if n % parts(axes) == 0 else None for axes, n in zip(entries, shape, strict=True))
    return NamedSharding(place.mesh, PartitionSpec(*kept))


def create(make: Callable[[], T]) -> T:
    """The module that `make` builds, each parameter made in place on the current mesh."""
    graph, abstract = nnx.split(nnx.eval_shape(make))
    state = jax.jit(lambda: nnx.state(make()), out_shardings=shardings(abstract))()
    return nnx.merge(graph, state)
