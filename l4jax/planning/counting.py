"""What a compiled program does in one step on one device: traffic, operations, memory traffic.

Bytes on the wire are those that one device sends, by a ring model with groups of n devices and b
bytes that a device puts in: all-gather (n-1)·b, reduce-scatter and all-to-all (n-1)/n·b, all-reduce
2(n-1)/n·b, collective-permute b. XLA:TPU writes a reduce-scatter as a fusion around an all-reduce;
it counts as the former. Between slices the compiler leaves an all-reduce to the runtime, which
`send` starts: it counts as `dcn-all-reduce`.

FLOPs are two for each multiplication in a matrix product. A Pallas kernel counts what its own cost
estimate says, or what the shapes of a kernel known here do. Kernels that multiply by groups, which
experts are, have buffers with room to spare; they count the rows that balanced routing fills.

Bytes of HBM are the operands and results of what runs outside of fusions, as far as they lie there;
slices of and updates in larger arrays count as large as they are themselves, kernels as they say
less what they find on the chip.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from l4jax.planning import hlo
from l4jax.planning.hlo import HBM, HOST, Computation, Instruction, Module, shapes

Network = Literal["ici", "dcn"]

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Collective(NamedTuple):
    """A collective in the program."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes along which it joins devices."""
    group: tuple[int, ...]
    """Places in the mesh of the first group's devices, or of one sender and its receiver."""
    network: Network
    times: float
    """How often it runs in a step."""
    wire: float
    """Bytes that a device sends each time."""


class Kernel(NamedTuple):
    """A Pallas kernel in the program."""

    name: str
    times: float
    flops: float | None
    """Each time; None if nothing says how many."""


@dataclasses.dataclass
class Counts:
    """Of one device and step."""

    collectives: list[Collective] = dataclasses.field(default_factory=list)
    kernels: list[Kernel] = dataclasses.field(default_factory=list)
    product_flops: float = 0.0
    """Of matrix products that XLA itself compiles."""
    hbm_bytes: float = 0.0
    to_host_bytes: float = 0.0
    from_host_bytes: float = 0.0
    idle_loops: int = 0
    """Loops and branches for unbalanced routing, which count as not running."""
    open_loops: tuple[str, ...] = ()
    """Loops whose trip count is not in the text; each counts as running once."""

    @property
    def kernel_flops(self) -> float:
        """Of all Pallas kernels that say or show how many they have."""
        return math.fsum(k.times * (k.flops or 0.0) for k in self.kernels)

    @property
    def flops(self) -> float:
        """Of everything."""
        return self.product_flops + self.kernel_flops

    @property
    def uncounted_kernels(self) -> tuple[str, ...]:
        """Names of kernels whose operations nobody knows."""
        return tuple(sorted({k.name for k in self.kernels if k.flops is None and k.times}))

    def wire(self, network: Network | None = None) -> float:
        """Bytes on the wire, of one network or of both."""
        return math.fsum(c.times * c.wire for c in self.collectives if network in (None, c.network))

    def wire_by_kind(self) -> dict[str, float]:
        """Bytes on the wire of each kind of collective, most first."""
        return _most_first((c.kind, c.times * c.wire) for c in self.collectives)

    def wire_by_axes(self) -> dict[str, float]:
        """Bytes on the wire along each mesh axis, or axes at once ("fsdp+expert"), most first."""
        return _most_first(("+".join(c.axes), c.times * c.wire) for c in self.collectives)


def count(
    text: str,
    mesh: Mapping[str, int],
    *,
    slices: int = 1,
    grouped_rows: int | None = None,
    in_order: bool = False,
    steps: int | None = None,
) -> Counts:
    """Counts a program.

    Args:
        text: a scheduled module's, of one device.
        mesh: sizes of the mesh axes, in the order of the program's devices.
        slices: slices that the first axis crosses.
        grouped_rows: rows of a device that balanced routing sends through the kernels that multiply
            by groups; by default all that their buffers have.
        in_order: whether the shards of a sequence follow each other, so that the last one's queries
            see nearly all keys, for which the others wait: that device is counted.
        steps: if the program is a loop that ends by data, how often that runs; counted is one step,
            with its part of what is done before and after them all.
    """
    module = Module(text)
    counts = Counts()
    counter = _Counter(module, dict(mesh), slices, grouped_rows, in_order, counts)
    for name, (times, fused) in module.runs(steps).items():
        if times:
            for instruction in module.computations[name].instructions.values():
                counter.add(module.computations[name], instruction, times / (steps or 1), fused)
    counts.idle_loops, counts.open_loops = module.idle_loops, tuple(module.open_loops)
    return counts


class _Counter:
    def __init__(
        self,
        module: Module,
        mesh: dict[str, int],
        slices: int,
        grouped_rows: int | None,
        in_order: bool,
        counts: Counts,
    ) -> None:
        self.module, self.mesh, self.slices, self.counts = module, mesh, slices, counts
        self.grouped_rows, self.in_order = grouped_rows, in_order
        self.devices = math.prod(mesh.values()) // slices

    def add(self, where: Computation, what: Instruction, times: float, fused: bool) -> None:
        """Counts one instruction."""
        kind = what.opcode.removesuffix("-start")
        if what.opcode.endswith(("-done", "-update")):
            return
        if kind in _COLLECTIVES:
            self._collective(where, what, kind, times)
        elif kind == "send" and "_xla_megascale_transfer_type" in what.attributes:
            self._between_slices(where, what, times)
        elif kind in ("dot", "convolution"):
            self.counts.product_flops += times * _product_flops(where, what)
        elif kind == "custom-call" and '"tpu_custom_call"' in what.attributes:
            self._kernel(where, what, times)
        if not fused:
            self.counts.hbm_bytes += times * _hbm_bytes(self.module, where, what)
            self._host(where, what, times)

    def _collective(self, where: Computation, what: Instruction, kind: str, times: float) -> None:
        if kind == "all-reduce" and where.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        operands = [_operand_bytes(where, name) for name in what.operands]
        groups: list[tuple[int, ...]]
        if kind == "collective-permute":
            groups = [pair for pair in hlo.pairs(what.attributes) if pair[0] != pair[1]]
            wire = math.fsum(operands) if groups else 0.0
        else:
            groups = [hlo.first_group(what.attributes, self.devices)]
            wire = _wire(kind, what, operands, len(groups[0]))
        axes = hlo.axes_of(groups, self.mesh)
        group = groups[0] if groups else (0,)
        self.counts.collectives.append(Collective(kind, axes, group, "ici", times, wire))

    def _between_slices(self, where: Computation, what: Instruction, times: float) -> None:
        match = re.search(r'_xla_megascale_transfer_type="(\w+)"', what.attributes)
        kind = match[1].lower().replace("_", "-") if match else "send"
        size, n = _operand_bytes(where, what.operands[0]), self.slices
        wire = size * (2 * (n - 1) / n if kind == "all-reduce" else 1)
        first = next(iter(self.mesh))
        self.counts.collectives.append(
            Collective(f"dcn-{kind}", (first,), (0,), "dcn", times, wire)
        )

    def _kernel(self, where: Computation, what: Instruction, times: float) -> None:
        name = what.name.partition(".")[0]
        flops = _kernel_flops(name, where, what, self.grouped_rows, self.in_order)
        self.counts.kernels.append(Kernel(name, times, flops))

    def _host(self, where: Computation, what: Instruction, times: float) -> None:
        kind = what.opcode.removesuffix("-start")
        if kind not in ("copy", "dynamic-slice", "dynamic-update-slice", "slice"):
            return
        result = shapes(what.type)[0]
        source = shapes(where.instructions[what.operands[0]].type)[0]
        moved = source
        if kind == "dynamic-update-slice":
            moved = shapes(where.instructions[what.operands[1]].type)[0]
            source = moved
        elif "slice" in kind:
            moved = result
        if result.space == HOST and source.space != HOST:
            self.counts.to_host_bytes += times * moved.bytes
        elif source.space == HOST and result.space != HOST:
            self.counts.from_host_bytes += times * moved.bytes


def _wire(kind: str, what: Instruction, operands: list[float], n: int) -> float:
    """Bytes that a device sends, by the ring model."""
    if kind == "ragged-all-to-all":
        # Buffers are for the worst case; balanced routing fills the smaller one.
        result = shapes(what.type)
        return min(operands[0], result[0].bytes if result else math.inf) * (n - 1) / n
    factor = {
        "all-gather": n - 1.0,
        "all-reduce": 2 * (n - 1) / n,
        "reduce-scatter": (n - 1) / n,
        "all-to-all": (n - 1) / n,
        "collective-broadcast": 1.0,
    }[kind]
    return math.fsum(operands) * factor


# --- Operations ----------------------------------------------------------------------------------
def _product_flops(where: Computation, what: Instruction) -> float:
    result = math.prod(shapes(what.type)[0].dims)
    left, right = (shapes(where.instructions[name].type)[0].dims for name in what.operands[:2])
    if what.opcode == "dot":
        match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", what.attributes)
        contracted = [int(d) for d in match[1].split(",") if d] if match else []
        return 2.0 * result * math.prod(left[d] for d in contracted)
    match = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", what.attributes)
    if match is None:
        return 0.0
    dims = (left, right, shapes(what.type)[0].dims)
    inputs, kernel, outputs = (
        dict(zip(labels, sizes, strict=True))
        for labels, sizes in zip(match.groups(), dims, strict=True)
    )
    terms = math.prod(n for label, n in kernel.items() if label != "o")
    return 2.0 * result * terms * _filled(what.attributes, inputs, kernel, outputs)


def _filled(
    attributes: str, inputs: dict[str, int], kernel: dict[str, int], outputs: dict[str, int]
) -> float:
    """The part of a convolution's window positions that lie on data, not on padding or holes.

    XLA writes batched products as convolutions whose batch is a dimension of the window, in which
    all positions but one for each output lie on padding.
    """
    match = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in match[1].split()) if match else {}
    if "size" not in fields:
        return 1.0
    sizes = [int(n) for n in fields["size"].split("x")]

    def numbers(key: str) -> list[int]:
        return [int(n) for n in fields[key].split("x")] if key in fields else [1] * len(sizes)

    before = [int(pad.split("_")[0]) for pad in fields["pad"].split("x")] if "pad" in fields else []
    part = 1.0
    for axis, size in enumerate(sizes):
        length, out = inputs.get(str(axis), 1), outputs.get(str(axis), 1)
        start = np.arange(size) * numbers("rhs_dilate")[axis] - (before[axis] if before else 0)
        stride, holes = numbers("stride")[axis], numbers("lhs_dilate")[axis]
        part *= _on_data(start, stride, out, length, holes) / (size * out)
    return part


def _on_data(start: np.ndarray, stride: int, out: int, length: int, holes: int) -> int:
    """How many of start + i·stride, i < out, lie on one of `length` points spaced by `holes`."""
    last = (length - 1) * holes
    if holes == 1:
        first = np.maximum(0, -(start // stride))
        return int(np.maximum(0, np.minimum(out - 1, (last - start) // stride) - first + 1).sum())
    place = start[:, None] + np.arange(out) * stride
    return int(((place >= 0) & (place <= last) & (place % holes == 0)).sum())


_GROUPED = re.compile(r"gmm|ragged-dot|grouped")
"""Kernels that multiply by groups: megablox, and what `jax.lax.ragged_dot` becomes."""


def _kernel_flops(
    name: str, where: Computation, what: Instruction, grouped_rows: int | None, in_order: bool
) -> float | None:
    """A Pallas kernel's operations each time that it runs; None if they cannot be told."""
    told = _told(what, "flops")
    arrays = _operands(where, what)
    results = shapes(what.type)
    if _GROUPED.search(name):
        matrices = [s.dims for s in arrays if s.floating and len(s.dims) == 2 and s.dims[0] > 1]
        outcome = next((s.dims for s in results if s.floating), ())
        if not matrices or not outcome:
            return told if told is not None else 0.0
        rows, terms = _grouped_rows(matrices, outcome)
        flops = told if told is not None else 2.0 * rows * terms
        return flops * min(1.0, grouped_rows / rows) if grouped_rows is not None else flops
    if told is None and "splash" in name:
        return _splash_flops(name, what.attributes, arrays, in_order)
    return told


def _told(what: Instruction, key: Literal["flops", "bytes_accessed"]) -> float | None:
    """What a Pallas kernel's own cost estimate says, if it has one."""
    match = re.search(rf'"cost_estimate":\{{[^}}]*"{key}":"?(\d+)', what.attributes)
    return float(match[1]) if match else None


def _grouped_rows(matrices: Sequence[tuple[int, ...]], outcome: tuple[int, ...]) -> tuple[int, int]:
    """Rows of a grouped product and multiplications for each: [m k]·[g k n] or [m k]ᵀ·[m n]."""
    if len(outcome) == 2:
        return outcome[0], matrices[0][1] * outcome[1]
    shared = [n for n in matrices[0] if n not in outcome[-2:]] or [max(matrices[0])]
    return shared[0], outcome[-1] * outcome[-2]


def _splash_flops(
    name: str, attributes: str, arrays: Sequence[hlo.Shape], in_order: bool
) -> float | None:
    """JAX's splash attention: 2·d for each pair of query and key in its causal blocks, and product.

    Its first operand, a table of blocks of queries by blocks of keys, is as short along one of them
    (queries where it computes the gradients of keys) as the most that any of the others needs. On
    average a causal row of blocks needs half of these and half its own. So do queries that are a
    balanced part of the keys' sequence; those of its last part need all but half their own.
    """
    grid = next((s.dims for s in arrays if len(s.dims) == 3), None)
    tensors = [s.dims for s in arrays if s.floating and len(s.dims) >= 3]
    if grid is None or len(tensors) < 2:
        return None
    queries, keys = tensors[:2]
    backward = "dkv" in name
    width = grid[-2] if backward else grid[-1]
    lines = grid[-1] if backward else grid[-2]
    length = keys[-2] if backward else queries[-2]
    suffix = "_dkv" if backward else "_dq" if "dq" in name else ""
    told = re.search(rf'block_{"q" if backward else "kv"}{suffix}\\": (\d+)', attributes)
    block = int(told[1]) if told else length / lines
    most = width * block
    other = queries[-2] if backward else keys[-2]
    seen = (most + block) / 2
    if in_order and keys[-2] > queries[-2] and most >= other:
        seen = most * (1 - queries[-2] / keys[-2] / 2)
    products = 2 if "fwd" in name else 3 if "dq" in name else 5 if "fused" in name else 4
    return 2.0 * length * seen * math.prod(queries[:-2]) * queries[-1] * products


# --- Memory traffic ------------------------------------------------------------------------------
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"),
    *("conditional", "call", "call-start", "async-start", "partition-id", "replica-id"),
    *("send", "recv", "opt-barrier", "add-dependency"),
}
_VIEWS = ("bitcast", "reshape", "copy", "convert", "transpose")
"""Inside a fusion these make no more of their operand than is asked of them."""
_PARTS = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Which operand holds what is written."""


def _hbm_bytes(module: Module, where: Computation, what: Instruction) -> float:
    """Bytes that an instruction outside of fusions reads from and writes to HBM."""
    opcode = what.opcode.removesuffix("-start")
    if what.opcode in _FREE or (opcode == "custom-call" and not what.operands):
        return 0.0
    if opcode in _PARTS:
        if what.opcode != opcode:
            # A start has source and destination in its type, and may bring a part to VMEM.
            part = shapes(what.type)[1]
            return part.bytes + _in_hbm((part,))
        return 2 * _in_hbm(shapes(what.type)[:1])
    if opcode in _UPDATES:
        return 2 * _operand_bytes(where, what.operands[_UPDATES[opcode]], hbm=True)
    if opcode == "custom-call" and (told := _told(what, "bytes_accessed")) is not None:
        # A kernel may be given a whole stack, or a whole cache, and read its own part. What XLA has
        # brought to VMEM before was counted then.
        arrays = [*shapes(what.type), *_operands(where, what)]
        return max(0.0, told - math.fsum(s.bytes for s in arrays if s.space != HBM))
    called = what.called("calls") if opcode == "fusion" else None
    if called is None:
        # A copy-start has source and destination in its type.
        results = shapes(what.type)[:1] if opcode == "copy" else shapes(what.type)
        if opcode in _COLLECTIVES and what.opcode.endswith("-start"):
            results = ()
        return _in_hbm(results) + math.fsum(
            _operand_bytes(where, name, hbm=True) for name in what.operands
        )
    inside = module.computations[called]
    read = 0.0
    for number, name in enumerate(what.operands):
        whole = _operand_bytes(where, name, hbm=True)
        if whole and number in inside.parameters:
            read += min(whole, _read(module, inside, inside.parameters[number]))
    return read + _written(module, inside, inside.root, shapes(what.type))


def _read(module: Module, inside: Computation, value: Instruction) -> float:
    """Bytes of `value` that a fusion reads: of what it only slices, the slices."""
    whole = math.fsum(s.bytes for s in shapes(value.type))
    total = 0.0
    for user in inside.users[value.name]:
        is_first = bool(user.operands) and user.operands[0] == value.name
        called = user.called("calls") if user.opcode == "fusion" else None
        if user.opcode in _PARTS and is_first:
            total += math.fsum(s.bytes for s in shapes(user.type))
        elif user.opcode in _UPDATES and is_first:
            continue
        elif user.opcode in _VIEWS or (called and _is_view(module.computations[called])):
            result = math.fsum(s.bytes for s in shapes(user.type))
            total += _read(module, inside, user) * (whole / result if result else 0.0)
        elif called:
            nested = module.computations[called]
            number = user.operands.index(value.name)
            total += _read(module, nested, nested.parameters[number])
        else:
            return whole
    return min(whole, total)


def _is_view(nested: Computation) -> bool:
    """Whether a fusion only shows its one operand in another layout."""
    return all(x.opcode in ("parameter", *_VIEWS) for x in nested.instructions.values())


def _written(
    module: Module, inside: Computation, root: Instruction, results: tuple[hlo.Shape, ...]
) -> float:
    """Bytes that a fusion writes: of an array that it only updates, the update."""
    if root.opcode == "tuple" and len(root.operands) == len(results):
        return math.fsum(
            _written(module, inside, inside.instructions[name], (result,))
            for name, result in zip(root.operands, results, strict=True)
        )
    if root.opcode in ("bitcast", "reshape"):
        return _written(module, inside, inside.instructions[root.operands[0]], results)
    if root.opcode == "fusion" and (called := root.called("calls")):
        nested = module.computations[called]
        return _written(module, nested, nested.root, results)
    written = _in_hbm(results)
    if root.opcode in _UPDATES:
        return min(written, _operand_bytes(inside, root.operands[_UPDATES[root.opcode]]))
    return written


def _operands(where: Computation, what: Instruction) -> list[hlo.Shape]:
    return [s for name in what.operands for s in shapes(where.instructions[name].type)]


def _operand_bytes(where: Computation, name: str, *, hbm: bool = False) -> float:
    found = where.instructions.get(name)
    if found is None:
        return 0.0
    return _in_hbm(shapes(found.type)) if hbm else math.fsum(s.bytes for s in shapes(found.type))


def _in_hbm(arrays: tuple[hlo.Shape, ...]) -> float:
    return math.fsum(s.bytes for s in arrays if s.space == HBM)


def _most_first(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for key, value in pairs:
        total[key] = total.get(key, 0.0) + value
    return {key: n for key, n in sorted(total.items(), key=lambda item: -item[1]) if n}
