"""The TPU compiler, used ahead of time on a machine without TPU.

libtpu brings XLA's TPU compiler and needs no TPU to run it: JAX describes the topology, a mesh of
its devices takes the place of real ones, and what is compiled is what the pod would run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from l4jax.planning.chips import GIB, Topology

# Set before libtpu is loaded: it then asks no metadata server, and may be loaded by several
# processes. What accelerator it believes to be on does not matter for another topology.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class NoCompiler(OSError):
    """libtpu is not installed."""


class Failed(RuntimeError):
    """The compiler refused the program; `text` is all that it said."""

    def __init__(self, text: str) -> None:
        super().__init__(f"the TPU compiler refuses this program: {reason(text)}")
        self.text = text


@runtime_checkable
class Lowers(Protocol):
    """What can be compiled."""

    def lower(self) -> Any:
        """The program, traced; with a method `compile`."""


class Memory(NamedTuple):
    """GiB of HBM of one device, as the compiler plans them."""

    arguments: float
    temporaries: float
    """Beyond the arguments, at the peak: activations, gradients, results without a place yet."""
    peak: float
    host: float
    """GiB of the host's memory that the program uses for one device."""


class Compiled(NamedTuple):
    """A program that the compiler took."""

    executable: Any
    text: str
    """The scheduled module of one device."""
    memory: Memory
    wall_seconds: float
    cpu_seconds: float
    """Of all threads of this process."""


class TooLarge(NamedTuple):
    """A program that needs more HBM than a device has."""

    needed_gib: float
    """As far as the compiler says."""
    text: str
    wall_seconds: float
    cpu_seconds: float


@dataclasses.dataclass(frozen=True)
class Versions:
    """Of what compiled."""

    jax: str
    libtpu: str


def versions() -> Versions:
    """Of JAX and libtpu.

    Raises:
        NoCompiler: libtpu is not installed.
    """
    require()
    return Versions(jax=jax.__version__, libtpu=importlib.metadata.version("libtpu"))


def require() -> None:
    """Raises NoCompiler unless libtpu is installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise NoCompiler(
            "the TPU compiler is not installed (it needs no TPU): pip install 'l4jax[tpu]'"
        )


def leave_tpu_alone() -> None:
    """Makes JAX compute on the CPU from now on, if it has computed nothing yet.

    A machine with a TPU can plan for another one while something else runs on it.
    """
    jax.config.update("jax_platforms", "cpu")


def devices(topology: Topology) -> list[Any]:
    """Devices of a topology, to make a mesh of; they can be compiled for, not run on.

    Raises:
        NoCompiler: libtpu is not installed.
    """
    require()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.chips == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=topology.name, **options
    ).devices
    assert len(found) == topology.devices, (topology.name, len(found))
    return list(found)


def compile(program: Lowers, mesh: jax.sharding.Mesh) -> Compiled | TooLarge:
    """The compiled program.

    Raises:
        Failed: the compiler refuses it, but not for want of HBM.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        with jax.set_mesh(mesh), _uncached():
            executable = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _out_of_hbm(str(error))
        if needed is None:
            raise Failed(str(error)) from None
        took = time.perf_counter() - wall, time.process_time() - cpu
        return TooLarge(needed, str(error), *took)
    took = time.perf_counter() - wall, time.process_time() - cpu
    return Compiled(executable, executable.as_text(), _memory(executable), *took)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Keeps JAX from its cache of compiled programs, which can't be read back without a device."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # or it goes by what it found at the first compilation
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def reason(text: str) -> str:
    """The first sentence or two of a compiler's message, without its codes."""
    text = re.sub(r"^[A-Z_]+: (E\d+: )?", "", " ".join(text.split()))
    return text if len(text) <= 300 else text[:300].rsplit(" ", 1)[0] + " …"


def _memory(executable: Any) -> Memory:
    found = executable.memory_analysis()
    kept = found.argument_size_in_bytes
    peak = found.peak_memory_in_bytes
    host = found.host_argument_size_in_bytes + found.host_temp_size_in_bytes
    return Memory(kept / GIB, (peak - kept) / GIB, peak / GIB, host / GIB)


_UNITS = {"": 1 / GIB, "K": 2**10 / GIB, "M": 2**20 / GIB, "G": 1.0, "T": 1024.0}
_OUT_OF_HBM = (
    r"required for [^()]*\(([\d.]+)([KMGT]?)\) exceeds available HBM",
    r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm",
    r"memory space hbm.*? ([\d.]+)([KMGT]?)",
)


def _out_of_hbm(text: str) -> float | None:
    """GiB that a program would need, if it was refused for its size."""
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    for pattern in _OUT_OF_HBM:
        match = re.search(pattern, text, re.DOTALL)
        if match:
            return float(match[1]) * _UNITS[match[2]]
    return None
