"""Compiles for TPUs that are not there, with the compiler that libtpu brings."""

from __future__ import annotations

import importlib.util
import os

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TOPOLOGIES = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def each_generation(names) -> list:
    """For parametrize: every generation with every name; only one pair is in the default run."""
    pairs = [(generation, name) for name in names for generation in TOPOLOGIES]
    return [pairs[0], *(pytest.param(*pair, marks=pytest.mark.slow) for pair in pairs[1:])]


def compile_for(generation: str, function, *shapes: jax.ShapeDtypeStruct, donate=()):
    """`function` compiled for one device of the generation, which need not exist."""
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu, the compiler for TPUs: pip install 'jax[tpu]'")
    # No metadata server to ask, nor a second process that holds the chips.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    mesh = Mesh(np.array(topology.devices[:1]), ("one",))
    whole = NamedSharding(mesh, PartitionSpec())
    arguments = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in shapes)
    with jax.set_mesh(mesh):  # Pallas kernels ask it for the generation
        return jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
