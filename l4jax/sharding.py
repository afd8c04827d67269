"""Mesh axes, the one table from logical axes to them, and what a shard does with the others.

A parameter names its dimensions ("embed", "heads", …); `TRAINING` and `SERVING` say on which mesh
axes each of them lies. The decoder runs inside one `per_shard` call: its code sees one device's
part of every array, and asks for the others' by `read` (a whole weight), `gather` and `total`.
Without a mesh everything runs on one device and all of these leave their argument alone.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from l4jax.config import TextConfig

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""data: replicas; only it crosses slices. fsdp: parameters split: many tokens gather them,
few go to them (`apart`). expert: experts split, never gathered. context: the sequence split.
tensor: heads and hidden widths split. Tokens lie on the first four: rows on data, fsdp and expert,
their tokens on context."""
BATCH = ("data", "fsdp", "expert")

Rules = Mapping[str, tuple[str, ...]]

TRAINING: Rules = {
    "embed": ("fsdp", "expert", "context"),
    "expert_embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "router": (),
    "norm": (),
    "vocab": ("tensor",),
    "layers": (),
}
"""Every parameter lies on as many devices as hold different tokens, whatever those differ in."""

SERVING: Rules = {**TRAINING, "embed": ("fsdp",), "expert_embed": ("fsdp",)}
"""Only `fsdp` gathers weights, for many tokens: what a decode step reads lies where it is used."""

GATHERED = ("embed", "expert_embed")
"""Dimensions that `read` makes whole; along all others a shard computes with its own part."""
LONG_AXIS = 16
"""Shards on the longest axis along which weights are gathered in one step."""

_rules: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=TRAINING)
T = TypeVar("T")


# --- Meshes --------------------------------------------------------------------------------------
def make_mesh(devices: Sequence[Any] | None = None, **sizes: int) -> Mesh:
    """A mesh over the first devices, e.g. `make_mesh(fsdp=4, expert=2)`; other axes have size 1.

    Devices of several TPU slices are laid out so that only `data` crosses slices; its size must be
    a multiple of their number.

    Raises:
        ValueError: an axis name or size is not possible, or there are not as many devices.
    """
    for axis, n in sizes.items():
        if axis not in AXES:
            raise ValueError(f"mesh axis {axis!r} is unknown; the axes are {', '.join(AXES)}")
        if type(n) is not int or n < 1:
            raise ValueError(f"mesh axis {axis}={n!r} must be at least 1, and whole")
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = jax.devices() if devices is None else list(devices)
    if math.prod(shape) > len(devices):
        raise ValueError(
            f"a mesh of {' × '.join(f'{a}={n}' for a, n in zip(AXES, shape, strict=True))} needs "
            f"{math.prod(shape)} devices, but there are {len(devices)}"
        )
    devices = devices[: math.prod(shape)]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % slices:
        raise ValueError(f"data={shape[0]} must be a multiple of the {slices} slices it crosses")
    if slices == 1:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        places = (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1, 1)
        placed = mesh_utils.create_hybrid_device_mesh(
            *places, devices, allow_split_physical_axes=True
        )
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules = TRAINING) -> Iterator[None]:
    """Models made or loaded in this block run on `mesh`, laid out by `rules`; others cannot."""
    token = _rules.set(rules)
    try:
        with jax.set_mesh(mesh):
            yield
    finally:
        _rules.reset(token)


def platform() -> str:
    """What the code being traced will run on: "cpu", "gpu" or "tpu".

    A mesh of devices that nobody holds counts: compiling for it is like running on it.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.platform if device is not None else jax.default_backend()


def check(config: TextConfig, sizes: Mapping[str, int], rules: Rules | None = None) -> None:
    """Whether a mesh of these sizes can hold the model.

    Raises:
        ValueError: a dimension is not divided by the axes it lies on; names the nearest sizes that
            would do.
    """
    dims = {"embed": config.embed_dim, "vocab": config.vocab_size}
    dims |= {"heads": config.attention.num_heads, "kv_heads": config.attention.num_kv_heads}
    used = {layer.ffn for layer in config.layers}
    widths = {config.mlp_dim} if "dense" in used else set()
    if config.moe is not None and "moe" in used:
        dims["experts"] = config.moe.num_experts
        widths |= {config.moe.mlp_dim, config.moe.shared_mlp_dim}
    for name, n in [*dims.items(), *(("mlp", width) for width in sorted(widths))]:
        axes = (rules or _rules.get())[name]
        parts = math.prod(sizes.get(axis, 1) for axis in axes)
        if n % parts:
            legal = [k for k in range(1, 2 * parts + 1) if n % k == 0]
            near = sorted(sorted(legal, key=lambda k: abs(k - parts))[:3])
            raise ValueError(
                f"{' · '.join(f'{a}={sizes.get(a, 1)}' for a in axes)} does not divide the model's "
                f"{n} {name.replace('_', ' ')}; near {parts}, {near} would"
            )


# --- Layouts -------------------------------------------------------------------------------------
def spec(*axes: str | None) -> PartitionSpec:
    """The mesh layout of an array whose dimensions have these logical names.

    Raises:
        ValueError: a name has no rule, or two dimensions would lie on the same mesh axis.
    """
    rules = _rules.get()
    unknown = [axis for axis in axes if axis is not None and axis not in rules]
    if unknown:
        raise ValueError(f"no rule for logical axes {unknown}; known: {', '.join(rules)}")
    placed = [rules[axis] if axis is not None else () for axis in axes]
    used = [mesh_axis for axes in placed for mesh_axis in axes]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {axes} would use a mesh axis twice: {placed}")
    return PartitionSpec(*(p[0] if len(p) == 1 else p or None for p in placed))


def token_axes(rows: int, length: int = 1) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes that `rows` rows, and their `length` tokens, are split over.

    Axes that do not divide a number hold copies instead, which is right but wasteful.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    batch: tuple[str, ...] = ()
    for axis in BATCH:
        if sizes.get(axis, 1) > 1 and rows % math.prod(sizes[a] for a in (*batch, axis)) == 0:
            batch = (*batch, axis)
    context = sizes.get("context", 1)
    return batch, ("context",) if context > 1 and length % context == 0 else ()


def param_axes(param: nnx.Variable) -> tuple[str, ...]:
    """The logical axes of a parameter; dimensions added by stacking layers come first."""
    declared: tuple[str, ...] = param.get_metadata("axes")
    return ("layers",) * (param.get_raw_value().ndim - len(declared)) + declared


def param_mesh_axes(param: nnx.Variable) -> list[tuple[str, ...]]:
    """The mesh axes that each dimension of a parameter lies on."""
    return [_rules.get()[name] for name in param_axes(param)]


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, laid out by its logical axes on the current mesh."""
    empty = jax.sharding.get_abstract_mesh().empty
    return x if empty else jax.lax.with_sharding_constraint(x, spec(*axes))


def specs(state: T) -> T:
    """The layout of every array in `state`, in the same tree."""

    def place(param: nnx.Variable) -> nnx.Variable:
        value, whole = param.get_raw_value(), spec(*param_axes(param))
        # What stands beside a weight, such as scales, never comes first.
        (_, *rest), tree = jax.tree.flatten(value)
        places = (beside(whole, value.shape, x) for x in rest)
        return param.replace(jax.tree.unflatten(tree, (whole, *places)))

    return jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def shardings(abstract: nnx.State) -> nnx.State:
    """The sharding of every parameter of `abstract` on the current mesh, in the same tree."""
    mesh = jax.sharding.get_mesh()
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda spec: here if mesh.empty else NamedSharding(mesh, spec),
        specs(abstract),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def beside(whole: PartitionSpec, shape: tuple[int, ...], scale: Any) -> PartitionSpec:
    """The layout of a weight's scales or factors: cut where they have an entry for each of it.

    Along gathered dimensions they are whole, as the weight will be.

    Raises:
        ValueError: groups of the weight's rows are as large as there are shards.
    """
    sizes, kept = jax.sharding.get_abstract_mesh().shape, []
    for axis, n, size in zip(whole, scale.shape, shape, strict=False):
        cut = axis in ("tensor", "expert")
        if cut and n * sizes.get(axis, 1) == size > n > 1:
            # `_part` could not tell such scales from those of each row.
            raise ValueError(f"{axis}={sizes[axis]} is the size of a quantized weight's groups")
        kept.append(axis if cut and n == size else None)
    return PartitionSpec(*kept)


def create(make: Callable[[], T]) -> T:
    """The module that `make` builds, each parameter made in place on the current mesh."""
    graph, abstract = nnx.split(nnx.eval_shape(make))
    state = jax.jit(lambda: nnx.state(make()), out_shardings=shardings(abstract))()
    return nnx.merge(graph, state)


# --- Inside a shard ------------------------------------------------------------------------------
def per_shard(f: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`f` on each device's parts of its arguments; `f` itself without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return f
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def live(*axes: str) -> tuple[str, ...]:
    """Of these mesh axes, those of more than one device, inside `per_shard`; else none."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in axes if axis in mesh.manual_axes and mesh.shape[axis] > 1)


def size(*axes: str) -> int:
    """How many shards the live ones of these axes make."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in live(*axes))


def index(*axes: str) -> jax.Array | int:
    """This shard's number along these axes, the first one changing slowest."""
    return jax.lax.axis_index(live(*axes)) if live(*axes) else 0


def gather(x: jax.Array, dim: int, *axes: str) -> jax.Array:
    """All shards' `x` along these axes, joined at `dim`; its gradient goes back summed and cut.

    One axis after the other, and along the first of two dimensions: it costs as many bytes, and the
    TPU compiler makes a true reduce-scatter of the gradient's sum, where it would send it twice.
    """
    here = live(*axes)
    if not here:
        return x
    before, behind = math.prod(x.shape[:dim]), x.shape[dim + 1 :]
    rows = x.reshape(before, *x.shape[dim:]).swapaxes(0, 1).reshape(x.shape[dim], -1)
    for axis in reversed(here):
        rows = _gather_rows(rows, axis)
    # An array of its own, of one shape: XLA would compile products anew for every view of it.
    whole = jax.lax.optimization_barrier(rows).reshape(-1, before, *behind).swapaxes(0, 1)
    return whole.reshape(*x.shape[:dim], -1, *behind)


def _gather_rows(x: jax.Array, axis: str) -> jax.Array:
    """All shards' rows along an axis; of a long one first the neighbours', then the groups'.

    In one step the TPU compiler makes an all-reduce of zeros and rows where 128 shards gather, and
    sends twice as much.
    """
    n = jax.sharding.get_abstract_mesh().shape[axis]
    inner = max(k for k in range(1, math.isqrt(n) + 1) if n % k == 0)
    if n <= LONG_AXIS or inner == 1:
        return jax.lax.all_gather(x, axis, axis=0, tiled=True)
    near = np.arange(n).reshape(-1, inner)
    for groups in (near.tolist(), near.T.tolist()):
        x = jax.lax.all_gather(x, axis, axis=0, tiled=True, axis_index_groups=groups)
    return x


def total(x: T, *axes: str) -> T:
    """The sum over the shards along these axes."""
    return jax.lax.psum(x, live(*axes)) if live(*axes) else x


def scatter(x: jax.Array, dim: int, *axes: str) -> jax.Array:
    """This shard's part, at `dim`, of the sum over the shards along these axes."""
    here = live(*axes)
    return jax.lax.psum_scatter(x, here, scatter_dimension=dim, tiled=True) if here else x


def exchange(x: jax.Array, split: int, join: int, *axes: str) -> jax.Array:
    """Cuts `x` at dimension `split`, a piece for each shard, and joins what comes at `join`."""
    here = live(*axes)
    return jax.lax.all_to_all(x, here, split, join, tiled=True) if here else x


def apart(param: nnx.Variable, x: jax.Array, *also: str) -> tuple[str, ...]:
    """The axes along which a weight is left cut, if tokens `x` [… d] are less to send than it.

    Then each shard multiplies its columns of all shards' tokens, also of those along `also`, and
    decoding waits for no weight (Pope et al. 2022, section 3.2.2). A sum over shards sends twice
    each token's width of a product; gathering the weight, d times that of every expert.
    """
    places = dict(zip(param_axes(param), param_mesh_axes(param), strict=True))
    axes = live(*next(axes for name, axes in places.items() if name in GATHERED))
    weight, d = jax.tree.leaves(param[...])[0], x.shape[-1]
    rows = x.size // d * size(*axes, *also)
    experts = weight.shape[0] if "experts" in places else 1
    narrow = min(weight.dtype.itemsize, x.dtype.itemsize)
    return axes if 0 < 2 * rows * x.dtype.itemsize <= d * experts * narrow else ()


def read(param: nnx.Variable, dtype: Any, *, whole: bool = True) -> Any:
    """A parameter to compute with: whole along its gathered dimensions or not, in this type.

    An array travels in the narrower of its own type and `dtype`, and so does its gradient.
    """
    value = param[...]
    narrow = isinstance(value, jax.Array) and np.dtype(dtype).itemsize < value.dtype.itemsize
    if narrow:
        value = value.astype(dtype)
    (weight, *rest), tree = jax.tree.flatten(value)
    for dim, (name, axes) in enumerate(zip(param_axes(param), param_mesh_axes(param), strict=True)):
        gathered = name in GATHERED
        if gathered and whole:
            weight = gather(weight, dim, *axes)
        elif live(*axes):
            here = weight.shape[dim]
            rest = [_part(x, dim, axes, here, whole=gathered) for x in rest]
    value = jax.tree.unflatten(tree, (weight, *rest))
    return value if narrow else value.astype(dtype)


def _part(x: jax.Array, dim: int, axes: tuple[str, ...], here: int, *, whole: bool) -> jax.Array:
    """Of `x`, beside a weight that has `here` rows in a shard, the part for these; see `beside`.

    Along `dim` it has an entry for each row of this shard, or if `whole` of all, or fewer.
    """
    if x.shape[dim] == 1 or (x.shape[dim] == here and not whole):
        return x
    rows = jnp.repeat(x, here * size(*axes) // x.shape[dim], axis=dim)
    return jax.lax.dynamic_slice_in_dim(rows, index(*axes) * here, here, dim)
