"""The TPU generations in numbers, and the slices that can be had of each.

A device is what JAX sees: a chip, or on TPU7x one of the two halves of a chip. Rates are peaks that
the vendor publishes, in decimal units per second; memory is in GiB.
"""

from __future__ import annotations

import dataclasses
import math

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """One generation of TPU.

    Sources: the system architecture tables of https://cloud.google.com/tpu/docs/v5e, …/v5p, …/v6e
    and …/tpu7x for compute, HBM bandwidth, ICI, DCN and slice shapes (read 2026-11);
    https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus for GKE's names. Usable HBM
    is what the TPU compiler allows a program, a little less than what the chip has.
    """

    name: str
    """As topologies begin, and as the compiler calls it."""
    flops: float
    """Peak bfloat16 operations per second of a device."""
    hbm_gib: float
    """GiB that one program may use on a device."""
    hbm_bandwidth: float
    """Bytes per second between a device and its memory."""
    link_bandwidth: float
    """Bytes per second, one way, of one of a chip's links. The published figure counts all links
    of a chip and both directions."""
    torus_dims: int
    """Dimensions of the interconnect; a chip has two links in each."""
    dcn_bandwidth: float
    """Bytes per second between a chip and the data centre's network. v5e: the pod's, divided."""
    devices_per_chip: int = 1
    chips_per_host: int = 4
    """In slices of several hosts."""
    single_host_chips: int = 4
    """Most chips of a slice that is one host."""
    gke_accelerator: str
    """Node label cloud.google.com/gke-tpu-accelerator."""
    machine_types: tuple[tuple[int, str], ...]
    """GKE's machine types, by chips of a host."""
    accelerator_prefix: str
    """What `gcloud compute tpus` calls a slice begins so: v5p-128."""
    counted_per_chip: int = 1
    """What the number in that name counts for each chip: TensorCores on v5p and TPU7x."""
    shapes: tuple[str, ...]
    """Slices that can be had."""
    max_chips: int
    """Of one slice."""


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    *("8x8x16", "8x16x16", "16x16x16"),
)

GENERATIONS: dict[str, Generation] = {
    generation.name: generation
    for generation in (
        Generation(
            name="v5e",
            flops=197e12,
            hbm_gib=15.75,
            hbm_bandwidth=819e9,
            link_bandwidth=400e9 / 4 / 2,
            torus_dims=2,
            dcn_bandwidth=6.4e12 / 8 / 256,
            single_host_chips=8,
            gke_accelerator="tpu-v5-lite-podslice",
            machine_types=(
                (1, "ct5lp-hightpu-1t"),
                (4, "ct5lp-hightpu-4t"),
                (8, "ct5lp-hightpu-8t"),
            ),
            accelerator_prefix="v5litepod",
            shapes=_FLAT,
            max_chips=256,
        ),
        Generation(
            name="v5p",
            flops=459e12,
            hbm_gib=95.74,
            hbm_bandwidth=2765e9,
            link_bandwidth=1200e9 / 6 / 2,
            torus_dims=3,
            dcn_bandwidth=50e9 / 8,
            gke_accelerator="tpu-v5p-slice",
            machine_types=((4, "ct5p-hightpu-4t"),),
            accelerator_prefix="v5p",
            counted_per_chip=2,
            shapes=(*_CUBES, "16x16x24"),
            max_chips=6144,
        ),
        Generation(
            name="v6e",
            flops=918e12,
            hbm_gib=31.25,
            hbm_bandwidth=1638e9,
            link_bandwidth=800e9 / 4 / 2,
            torus_dims=2,
            dcn_bandwidth=100e9 / 8,
            single_host_chips=8,
            gke_accelerator="tpu-v6e-slice",
            machine_types=(
                (1, "ct6e-standard-1t"),
                (4, "ct6e-standard-4t"),
                (8, "ct6e-standard-8t"),
            ),
            accelerator_prefix="v6e",
            shapes=_FLAT,
            max_chips=256,
        ),
        Generation(
            name="tpu7x",
            flops=2307e12 / 2,
            hbm_gib=94.75,
            hbm_bandwidth=7380e9 / 2,
            link_bandwidth=1200e9 / 6 / 2,
            torus_dims=3,
            dcn_bandwidth=100e9 / 8,
            devices_per_chip=2,
            gke_accelerator="tpu7x",
            machine_types=((4, "tpu7x-standard-4t"),),
            accelerator_prefix="tpu7x",
            counted_per_chip=2,
            shapes=(*_CUBES, "16x16x24", "16x24x24"),
            max_chips=9216,
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several equal slices; several are joined by the data centre's network (DCN)."""

    generation: Generation
    shape: tuple[int, ...]
    """Chips along each dimension of one slice."""
    slices: int = 1

    @property
    def shape_name(self) -> str:
        """Such as "4x4x4": GKE's label gke-tpu-topology."""
        return "x".join(map(str, self.shape))

    @property
    def name(self) -> str:
        """Such as "v5p:4x4x4", of one slice: what `parse` reads."""
        return f"{self.generation.name}:{self.shape_name}"

    @property
    def chips_per_slice(self) -> int:
        """Chips of one slice."""
        return math.prod(self.shape)

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.chips_per_slice * self.slices

    @property
    def devices_per_slice(self) -> int:
        """JAX devices of one slice."""
        return self.chips_per_slice * self.generation.devices_per_chip

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.devices_per_slice * self.slices

    @property
    def chips_per_host(self) -> int:
        """Chips of each host."""
        alone = self.chips_per_slice <= self.generation.single_host_chips
        return self.chips_per_slice if alone else self.generation.chips_per_host

    @property
    def hosts_per_slice(self) -> int:
        """Hosts of one slice."""
        return self.chips_per_slice // self.chips_per_host

    @property
    def hosts(self) -> int:
        """Hosts of all slices."""
        return self.hosts_per_slice * self.slices

    @property
    def machine_type(self) -> str:
        """GKE's machine type of a host."""
        return dict(self.generation.machine_types)[self.chips_per_host]

    @property
    def accelerator_type(self) -> str:
        """What `gcloud compute tpus` calls one slice: v5p-128 has 64 chips, v6e-256 has 256."""
        generation = self.generation
        count = self.chips_per_slice * generation.counted_per_chip
        return f"{generation.accelerator_prefix}-{count}"

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether the links of each dimension close to a ring.

        Three-dimensional slices are wired as rings when made of whole cubes of 4x4x4; of
        two-dimensional ones only a side of 16 closes (https://jax-ml.github.io/scaling-book/tpus).
        """
        if self.generation.torus_dims == 2:
            return tuple(n == 16 for n in self.shape)
        return (all(n % 4 == 0 for n in self.shape),) * len(self.shape)


def parse(text: str, *, slices: int = 1) -> Topology:
    """The topology called e.g. "v5p:4x4x4" or "v6e:16x16", `slices` times.

    Raises:
        ValueError: there is no such generation or no such slice of it.
    """
    name, _, shape_name = text.strip().lower().partition(":")
    if name not in GENERATIONS:
        raise ValueError(
            f"topology {text!r}: the TPU generations are {', '.join(GENERATIONS)}; "
            "write one with its slice, such as v5p:4x4x4"
        )
    generation = GENERATIONS[name]
    known = shape_name in generation.shapes
    if not known and not _whole_cubes(generation, shape_name):
        raise ValueError(
            f"topology {text!r} does not exist; slices of {name} are "
            + ", ".join(f"{name}:{shape}" for shape in generation.shapes)
            + (" and other whole cubes of 4x4x4" if generation.torus_dims == 3 else "")
        )
    if slices < 1:
        raise ValueError(f"slices {slices} must be at least 1")
    return Topology(generation, tuple(int(n) for n in shape_name.split("x")), slices)


def _whole_cubes(generation: Generation, shape_name: str) -> bool:
    """Whether this is a slice of whole cubes, sides ascending, not larger than can be had."""
    sides = shape_name.split("x")
    if generation.torus_dims != 3 or len(sides) != 3 or not all(s.isdecimal() for s in sides):
        return False
    shape = [int(side) for side in sides]
    return (
        all(n > 0 and n % 4 == 0 for n in shape)
        and shape == sorted(shape)
        and math.prod(shape) <= generation.max_chips
    )
