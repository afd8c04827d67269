"""The least time that a counted program can take on a slice: compute, memory, links, network.

Collectives along a mesh axis use the links of the torus dimensions in which its devices differ. A
closed ring sends both ways, a line is as slow as its ends, which have one link. An all-to-all is
bound by what crosses the middle of its longest dimension: half of all bytes of a line in each
direction, over one link, or over two if it closes (https://jax-ml.github.io/scaling-book/sharding).
Collectives are taken to run one after another, and to overlap with everything else: the total is
the largest of the four. What overlaps less takes longer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from l4jax.planning.chips import Topology
from l4jax.planning.counting import Collective, Counts

_DIE_TO_DIE = 6
"""Links that the connection between the halves of a TPU7x chip is worth:
https://cloud.google.com/tpu/docs/tpu7x."""


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Of one step."""

    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def total(self) -> float:
        """If everything overlaps."""
        return max(self.compute, self.hbm, self.ici, self.dcn)

    @property
    def serial(self) -> float:
        """If nothing overlaps."""
        return self.compute + self.hbm + self.ici + self.dcn

    @property
    def bound(self) -> str:
        """What the total is due to."""
        return max(("compute", "hbm", "ici", "dcn"), key=lambda name: getattr(self, name))


def seconds(counts: Counts, topology: Topology, devices: Sequence[Any]) -> Seconds:
    """The least time of each kind.

    Args:
        counts: of one device and step.
        topology: the slices.
        devices: in the order of the mesh, with `coords` and, if a chip is several, `core_on_chip`.
    """
    generation = topology.generation
    per_device_dcn = generation.dcn_bandwidth / generation.devices_per_chip
    return Seconds(
        compute=counts.flops / generation.flops,
        hbm=counts.hbm_bytes / generation.hbm_bandwidth,
        ici=math.fsum(
            c.times * _ici_seconds(c, topology, devices)
            for c in counts.collectives
            if c.network == "ici"
        ),
        dcn=counts.wire("dcn") / per_device_dcn,
    )


def _ici_seconds(collective: Collective, topology: Topology, devices: Sequence[Any]) -> float:
    """Seconds that a collective takes at least."""
    generation, n = topology.generation, len(collective.group)
    members = [devices[i] for i in collective.group]
    places = np.array([[*device.coords][: len(topology.shape)] for device in members])
    sizes = [len(set(places[:, dim])) for dim in range(places.shape[1])]
    cores = len({getattr(device, "core_on_chip", 0) for device in members})
    if n < 2 or not collective.wire:
        return 0.0
    if max(sizes) == 1:
        return collective.wire / (generation.link_bandwidth * _DIE_TO_DIE)
    # The halves of a chip share its links, unless one half passes on what the other needs.
    link = generation.link_bandwidth * cores / generation.devices_per_chip
    closed = [
        wraps and size == whole
        for wraps, size, whole in zip(topology.wraps, sizes, topology.shape, strict=True)
    ]
    if "all-to-all" in collective.kind:
        whole = collective.wire * n / (n - 1)
        across = (size / (8 if ring else 4) for size, ring in zip(sizes, closed, strict=True))
        return whole * max(a for a, size in zip(across, sizes, strict=True) if size > 1) / link
    if collective.kind == "collective-permute":
        return collective.wire * _hops(places, topology) / link
    links = sum(2 if ring else 1 for size, ring in zip(sizes, closed, strict=True) if size > 1)
    return collective.wire / (links * link)


def _hops(places: np.ndarray, topology: Topology) -> int:
    """Links between a sender and its receiver."""
    apart = np.abs(places[0] - places[1])
    around = np.where(topology.wraps, np.array(topology.shape) - apart, apart)
    return int(np.minimum(apart, around).sum())
