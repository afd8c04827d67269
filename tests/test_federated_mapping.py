"""Blocks, devices and meshes change nothing; a compiled round has one collective over clients."""

import contextlib
import functools
import math

import federated_toys as toys
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from l4jax.federated import algorithms, clients, mapping
from l4jax.federated.algorithms import Options
from l4jax.federated.compression import Compression
from l4jax.federated.local import Local
from l4jax.planning import hlo

LOCAL = Local(loss=toys.loss, rate=0.2, batch=4, epochs=2)
SIZES = (4, 11, 7, 13, 1, 3, 9, 5, 2, 6, 8)
MAKERS = {
    "fedadam": algorithms.fedadam,
    "scaffold": algorithms.scaffold,
    "compressed": lambda local, options: algorithms.fedavg(
        local,
        options=Options(
            block=options.block, mesh=options.mesh, compression=Compression(keep=0.5, bits=8)
        ),
    ),
}


def mesh_of(shards, tensor=1):
    return None if shards == 0 else mapping.make_mesh(clients=shards, tensor=tensor)


@functools.cache
def after(name, block, shards):
    """States after five rounds of eleven clients, on one device or a mesh."""
    pool = toys.pool(sum(SIZES))
    data = clients.gather(pool, toys.parts(SIZES))
    algorithm = MAKERS[name](LOCAL, options=Options(block=block, mesh=mesh_of(shards)))
    state, step = algorithm.init(toys.linear(), data.clients), jax.jit(algorithm.round)
    for number in range(5):
        cohort = clients.Participation(dropout=0.2).draw(len(SIZES), number, seed=0)
        state, _ = step(state, data, cohort, key=jax.random.key(1), number=number)
    return state


@pytest.mark.parametrize(
    ("name", "block", "shards"),
    [
        *(("scaffold", *where) for where in ((3, 0), (2, 2))),
        *(
            pytest.param("scaffold", *where, marks=pytest.mark.slow)
            for where in ((1, 0), (None, 8), (1, 4))
        ),
        *(
            pytest.param(name, *where, marks=pytest.mark.slow)
            for name in ("fedadam", "compressed")
            for where in ((3, 0), (2, 2))
        ),
    ],
)
def test_any_block_and_mesh_gives_the_same(name, block, shards):
    one, other = after(name, None, 0), after(name, block, shards)
    assert toys.far(one, other) < 1e-5
    assert toys.far(other.params, toys.linear()) > 1e-2


def compiled(tensor=1):
    """A round of eight clients on four shards, the hidden width split over `tensor`."""
    mesh = mapping.make_mesh(clients=4, tensor=tensor)
    rng = np.random.default_rng(0)
    params = {
        "fc1": {"kernel": rng.standard_normal((7, 6)), "bias": np.zeros(6)},
        "output": {"kernel": rng.standard_normal((6, 3)), "bias": np.zeros(3)},
    }
    specs = {
        "fc1": {"kernel": PartitionSpec(None, "tensor"), "bias": PartitionSpec("tensor")},
        "output": {"kernel": PartitionSpec("tensor", None), "bias": PartitionSpec()},
    }
    params = jax.tree.map(
        lambda x, s: jax.device_put(jnp.asarray(x, jnp.float32), NamedSharding(mesh, s)),
        params,
        specs,
    )
    data = clients.gather(toys.pool(40), toys.parts((5,) * 8))
    data = data._replace(
        rows=mapping.place(data.rows, mesh),
        sizes=mapping.place(data.sizes, mesh),
    )
    algorithm = algorithms.diloco(LOCAL, options=Options(weights="clients", mesh=mesh))
    state = algorithm.init(params, 8)
    state = state._replace(clients=mapping.place(state.clients, mesh))
    arguments = (state, data, clients.everybody(8))
    step = jax.jit(algorithm.round)
    traced = step.lower(*arguments, key=jax.random.key(0), number=0)
    plain = algorithms.diloco(LOCAL)
    expected = jax.jit(plain.round)(
        plain.init(jax.device_get(params), 8), *arguments[1:], key=jax.random.key(0), number=0
    )
    return traced, step(*arguments, key=jax.random.key(0), number=0), expected


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_round_has_one_collective_over_clients_and_none_in_the_local_loop(tensor):
    traced, found, expected = compiled(tensor)
    assert toys.far(found[0].params, expected[0].params) < 1e-5
    with optimized():
        module = hlo.Module(traced.compile().as_text())
    across, within = [], []
    for name, computation in module.computations.items():
        for x in computation.instructions.values():
            kind = x.opcode.removesuffix("-start")
            if kind == "collective-permute":
                groups = hlo.pairs(x.attributes)
            elif kind in ("all-gather", "all-reduce", "reduce-scatter", "all-to-all"):
                groups = [hlo.first_group(x.attributes, 4 * tensor)]
            else:
                continue
            axes = hlo.axes_of(groups, {"clients": 4, "tensor": tensor})
            (across if "clients" in axes else within).append((kind, name))
    assert across == [("all-reduce", module.entry)]
    assert (module.entry not in {name for _, name in within}) or tensor > 1
    assert bool(within) == (tensor > 1)


@contextlib.contextmanager
def optimized():
    """As it is compiled outside of tests."""
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


def test_thousands_of_clients_fit_in_blocks():
    """Memory does not grow with the clients: the sums alone are carried on."""
    count = 2000
    parts = [np.array([k % 60, (7 * k + 1) % 60]) for k in range(count)]
    data = clients.gather(toys.pool(60), parts)
    algorithm = algorithms.fedavg(LOCAL, options=Options(block=50))
    state = algorithm.init(toys.linear(), count)
    step = jax.jit(algorithm.round)
    arguments = (state, data, clients.everybody(count))
    memory = (
        step.lower(*arguments, key=jax.random.key(0), number=0)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )
    params = sum(x.nbytes for x in jax.tree.leaves(state.params))
    assert memory < count * params / 4
    _, found = step(*arguments, key=jax.random.key(0), number=0)
    assert found["clients"] == count


def test_refusals():
    with pytest.raises(ValueError, match="needs as many devices; there are 8"):
        mapping.make_mesh(clients=9)
    other = jax.make_mesh((2,), ("data",))
    with pytest.raises(ValueError, match="no 'clients'"):
        mapping.over_clients(lambda *_: None, (), (), block=None, mesh=other)


def test_default_blocks():
    small = jnp.zeros(1000)
    assert mapping.block_size(small, batched=True) > 1
    assert mapping.block_size(small, batched=False) == 1
    assert math.isfinite(mapping.block_size(jnp.zeros(1 << 20), batched=True))
