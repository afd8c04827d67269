"""A function of every client, and sums over clients: in blocks on a device, on many by a mesh axis.

Results do not depend on blocks, meshes or the clients' order, but for the rounding of sums.

A block of clients runs at once by `vmap`; blocks follow each other. With one client a block, no
client waits for another with more steps and nothing is batched; with more, small products become
larger ones. On two CPU cores a client's 14 steps took, in blocks of 1, 4, 16 and 64 clients, 0.69,
0.54, 0.62 and 0.57 ms with two dense layers, and 3.2, 3.8, 3.9 and 4.1 ms with two convolutions
(`experiments.benchmarks.federated` measures again); `block_size` goes by that. Elsewhere (GPU, TPU)
large blocks fill the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from l4jax import sharding

AXIS = "clients"
"""Mesh axis that clients lie on."""
One = Callable[[Any, Any, jax.Array], tuple[Any, Any]]
"""(what all clients get, a client, most steps in its block) → (to be summed, to be kept)."""


def make_mesh(devices: Sequence[Any] | None = None, *, clients: int, **axes: int) -> Mesh:
    """A mesh of `clients` and the model's own axes, e.g. `make_mesh(clients=4, tensor=2)`.

    Raises:
        ValueError: there are not enough devices.
    """
    shape = (clients, *axes.values())
    devices = jax.devices() if devices is None else list(devices)
    if min(shape) < 1 or np.prod(shape) > len(devices):
        raise ValueError(f"a mesh of {shape} needs as many devices; there are {len(devices)}")
    placed = np.array(devices[: np.prod(shape)]).reshape(shape)
    return Mesh(placed, (AXIS, *axes), axis_types=(AxisType.Auto,) * len(shape))


def place(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays with a leading axis of clients, laid out over the mesh if its axis divides them.

    Dimensions behind it stay as they lie on the mesh's other axes.
    """
    if mesh is None:
        return tree
    parts = mesh.shape[AXIS]

    def put(x: Any) -> jax.Array:
        first = AXIS if x.shape[0] % parts == 0 else None
        now, others = getattr(x, "sharding", None), PartitionSpec()
        if isinstance(now, NamedSharding) and now.mesh == mesh:
            others = now.spec[1:]
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(first, *others)))

    return jax.tree.map(put, tree)


def place_rest(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays that do not lie on the mesh yet, a copy on each of its devices."""
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())

    def put(x: Any) -> jax.Array:
        now = getattr(x, "sharding", None)
        there = isinstance(now, NamedSharding) and now.mesh == mesh
        return x if there else jax.device_put(x, everywhere)

    return jax.tree.map(put, tree)


def over_clients(
    one: One, common: Any, clients: Any, *, block: int | None, mesh: Mesh | None = None
) -> tuple[Any, Any]:
    """What `one` gives, summed over clients; and, stacked by client, what each keeps.

    On a mesh every device takes its part of the clients, and one collective adds up the sums. Axes
    other than `clients` are left to the compiler, as the model lays itself out.

    Args:
        one: see `One`.
        common: the same for all clients.
        clients: arrays with a leading axis of clients; `clients.steps` are the steps of each, and
            one without steps must contribute zeros.
        block: clients that run at once on a device; None for all.
        mesh: with an axis `clients`; None for one device.
    """
    if mesh is None:
        return _blocks(one, common, clients, block)
    if AXIS not in mesh.shape:
        raise ValueError(f"the mesh has axes {', '.join(mesh.axis_names)}, but no {AXIS!r}")
    count, parts = clients.steps.shape[0], mesh.shape[AXIS]

    def shard(common: Any, clients: Any) -> tuple[Any, Any]:
        sums, kept = _blocks(one, common, clients, block)
        return jax.lax.psum(sums, AXIS), kept

    spec = PartitionSpec(AXIS)
    sums, kept = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(PartitionSpec(), spec),
        out_specs=(PartitionSpec(), spec),
        axis_names={AXIS},
        check_vma=False,
    )(common, _pad(clients, -count % parts))
    return sums, _cut(kept, count)


def block_size(params: Any, *, batched: bool) -> int | None:
    """How many clients run at once on a device: one on CPUs, unless products gain by batching.

    Args:
        params: a client's.
        batched: whether the network consists of dense layers alone.
    """
    size = sum(x.size for x in jax.tree.leaves(params))
    if sharding.platform() == "cpu":
        return 4 if batched and size < 1 << 18 else 1
    # Parameters, gradients and optimizer state of a block within about 4 GiB.
    return max(1, min(256, (1 << 28) // max(size, 1)))


def _blocks(one: One, common: Any, clients: Any, block: int | None) -> tuple[Any, Any]:
    """`over_clients` on a device."""
    count = clients.steps.shape[0]
    size = count if block is None else min(block, count)

    def run(part: Any) -> tuple[Any, Any]:
        bound = jnp.max(part.steps)
        if size == 1:
            sums, kept = one(common, jax.tree.map(lambda x: x[0], part), bound)
            return sums, jax.tree.map(lambda x: x[None], kept)
        sums, kept = jax.vmap(lambda client: one(common, client, bound))(part)
        return jax.tree.map(lambda x: jnp.sum(x, 0), sums), kept

    if size == count:
        return run(clients)
    padded = _pad(clients, -count % size)
    blocks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), padded)

    def step(total: Any, part: Any) -> tuple[Any, Any]:
        sums, kept = run(part)
        return jax.tree.map(jnp.add, total, sums), kept

    shapes = jax.eval_shape(run, jax.tree.map(lambda x: x[0], blocks))[0]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, kept = jax.lax.scan(step, zeros, blocks)
    return total, _cut(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), kept), count)


def _pad(clients: Any, more: int) -> Any:
    """Adds clients that do nothing."""
    if not more:
        return clients
    return jax.tree.map(lambda x: jnp.pad(x, ((0, more), *[(0, 0)] * (x.ndim - 1))), clients)


def _cut(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda x: x if x.shape[0] == count else x[:count], tree)
