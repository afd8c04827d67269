"""Reads the text of a scheduled XLA module: instructions, shapes, loops, replica groups.

The text is what `compiled.as_text()` gives. Its computations stand callees first, which makes the
reversed order one in which every caller comes before what it calls.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{\s*$")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_SHAPE = re.compile(r"([a-z]+)(\d*)\w*\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|called_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')

IDLE = "further_rounds"
"""`jax.named_scope` of loops and branches that do not run while routing is balanced."""

# Reductions call computations too, but on single numbers.
_CALLS = ("fusion", "call", "fusion-start", "call-start", "async-start")

HBM, HOST = 0, 5
"""Memory spaces, as layouts name them; the others are on the chip."""


class Shape(NamedTuple):
    """One array of a type."""

    dims: tuple[int, ...]
    bytes: float
    space: int
    floating: bool


class Instruction(NamedTuple):
    """One line: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    """What stands between the parentheses, of constants and parameters."""
    attributes: str

    @property
    def op_name(self) -> str:
        """The JAX operation that it came from, with its scopes."""
        match = _OP_NAME.search(self.attributes)
        return match[1] if match else ""

    def called(self, key: str) -> str | None:
        """The computation that this attribute names."""
        return next((m[2] for m in _CALLED.finditer(self.attributes) if m[1] == key), None)

    @property
    def element(self) -> int:
        """Which element a get-tuple-element gets."""
        match = re.search(r"\bindex=(\d+)", self.attributes)
        assert match is not None, self.name
        return int(match[1])


class Computation:
    """Instructions in the order in which they run; the last one, or the marked one, is the root."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.instructions: dict[str, Instruction] = {}
        self._root: str | None = None

    def add(self, instruction: Instruction, *, root: bool) -> None:
        """Appends an instruction."""
        self.instructions[instruction.name] = instruction
        if root or self._root is None:
            self._root = instruction.name

    @property
    def root(self) -> Instruction:
        """Whose value the computation has."""
        assert self._root is not None, self.name
        return self.instructions[self._root]

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """By number."""
        found = (x for x in self.instructions.values() if x.opcode == "parameter")
        return {int(x.literal): x for x in found}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each instruction."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                if operand in found:
                    found[operand].append(instruction)
        return found


class Runs(NamedTuple):
    """How often a computation runs in one step, and where."""

    times: float
    fused: bool
    """Inside a fusion: what it reads and writes stays on the chip."""


class Module:
    """A whole program.

    Args:
        text: the module's text.

    Raises:
        ValueError: it has no entry computation, so it is no module's text.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        entry = None
        for is_entry, computation in _computations(text):
            self.computations[computation.name] = computation
            entry = computation.name if is_entry else entry
        if entry is None:
            raise ValueError("the text has no ENTRY computation: it is not that of an HLO module")
        self.entry = entry
        self.idle_loops = 0
        """Loops and branches in the scope IDLE, which count as not running."""
        self._open_trips: int | None = None
        self.open_loops: list[str] = []
        """Other loops whose trip count cannot be read; each counts as running once."""

    def runs(self, open_trips: int | None = None) -> dict[str, Runs]:
        """How often each computation runs.

        A loop runs as often as its condition says: `i < n` with constants, or XLA's own note. One
        that ends by data has no such number. It counts as running once, or `open_trips` times if it
        is in the entry computation, or, in the scope IDLE (`jax.named_scope`), not at all. Of a
        conditional every branch counts, so that a program's cost is never understated by it; in
        the scope IDLE none does.
        """
        self.idle_loops, self.open_loops, self._open_trips = 0, [], open_trips
        runs = {self.entry: Runs(1.0, False)}
        for name in reversed(self.computations):
            if name not in runs:
                continue
            times, fused = runs[name]
            for instruction in self.computations[name].instructions.values():
                for callee, factor in self._calls(name, instruction) if times else ():
                    before = runs.get(callee, Runs(0.0, True))
                    inside = fused or instruction.opcode == "fusion"
                    runs[callee] = Runs(before.times + times * factor, before.fused and inside)
        return runs

    def _calls(self, computation: str, instruction: Instruction) -> Iterator[tuple[str, float]]:
        """What an instruction runs, and how often for each time that it runs itself."""
        opcode = instruction.opcode
        if opcode == "while":
            body = instruction.called("body")
            assert body is not None, instruction.name
            yield body, self._trips(computation, instruction)
        elif opcode == "conditional":
            if IDLE in instruction.op_name:
                self.idle_loops += 1
                return
            for several, one in _BRANCHES.findall(instruction.attributes):
                for name in _NAME.findall(several or one):
                    yield name, 1.0
        elif opcode in _CALLS:
            for key in ("calls", "to_apply", "called_computation"):
                name = instruction.called(key)
                if name is not None:
                    yield name, 1.0

    def _trips(self, computation: str, loop: Instruction) -> float:
        if IDLE in loop.op_name:
            self.idle_loops += 1
            return 0.0
        known = _TRIPS.search(loop.attributes)
        trips = int(known[1]) if known else self._counted(computation, loop)
        if trips is None and computation == self.entry:
            trips = self._open_trips
        if trips is None:
            self.open_loops.append(loop.op_name or loop.name)
            return 1.0
        return float(trips)

    def _counted(self, computation: str, loop: Instruction) -> int | None:
        """Trips of a loop that counts up to a constant; None if it is no such loop."""
        condition, body = loop.called("condition") or "", loop.called("body") or ""
        test = self._test(self.computations[condition], None)
        if test is None:
            return None
        direction, left, right = test
        if direction == "GT":
            direction, left, right = "LT", right, left
        first = self.computations[computation].instructions[loop.operands[0]]
        if isinstance(right, _Element):
            right = self._initial(computation, first, right)
        if direction not in ("LT", "NE") or not isinstance(left, _Element) or right is None:
            return None
        start = self._initial(computation, first, left)
        step = self._step(self.computations[body], left)
        return max(0, math.ceil((right - (start or 0)) / step)) if isinstance(right, int) else None

    def _initial(self, computation: str, first: Instruction, element: _Element) -> int | None:
        if first.opcode != "tuple":
            return None
        value = self._value(self.computations[computation], first.operands[element.number], None)
        return value if isinstance(value, int) else None

    def _step(self, body: Computation, element: _Element) -> int:
        """What a loop adds to its counter: 1, unless a constant can be read."""
        if body.root.opcode != "tuple":
            return 1
        update = body.instructions.get(body.root.operands[element.number])
        if update is None or update.opcode != "add":
            return 1
        values = [self._value(body, name, None) for name in update.operands]
        return next((abs(v) for v in values if isinstance(v, int) and v), 1)

    def _test(self, computation: Computation, arguments: list[_Value] | None) -> _Test | None:
        """The comparison that a condition is, if it is nothing else."""
        root = computation.root
        while root.opcode in ("bitcast", "copy", "convert"):
            root = computation.instructions[root.operands[0]]
        values = [self._value(computation, name, arguments) for name in root.operands]
        if root.opcode == "compare":
            direction = re.search(r"direction=(\w+)", root.attributes)
            return (direction[1], values[0], values[1]) if direction else None
        called = root.called("calls") or root.called("to_apply")
        if root.opcode in ("fusion", "call") and called is not None:
            return self._test(self.computations[called], values)
        return None

    def _value(self, computation: Computation, name: str, arguments: list[_Value] | None) -> _Value:
        """A constant, an element of a loop's state, or None for anything else."""
        found = computation.instructions[name]
        if found.opcode == "constant":
            return int(found.literal) if re.fullmatch(r"-?\d+", found.literal) else None
        if found.opcode == "parameter" and arguments is not None:
            return arguments[int(found.literal)]
        if found.opcode == "get-tuple-element":
            source = computation.instructions[found.operands[0]]
            return _Element(found.element) if source.opcode == "parameter" else None
        if found.opcode in ("bitcast", "copy", "convert"):
            return self._value(computation, found.operands[0], arguments)
        return None


class _Element(NamedTuple):
    """An element of a loop's state."""

    number: int


_Value = int | _Element | None
_Test = tuple[str, _Value, _Value]


@functools.lru_cache(maxsize=4096)
def shapes(type_text: str) -> tuple[Shape, ...]:
    """The arrays of a type, in order; tokens and opaque values have none."""
    found = []
    for kind, digits, sizes, layout in _SHAPE.findall(type_text):
        bits = int(digits) if digits else 8 if kind == "pred" else None
        if bits is None:
            continue
        dims = tuple(int(n.lstrip("<=")) for n in sizes.split(",") if n)
        space = _SPACE.search(layout)
        floating = kind in ("f", "bf")
        found.append(
            Shape(dims, math.prod(dims) * bits / 8, int(space[1]) if space else HBM, floating)
        )
    return tuple(found)


def _computations(text: str) -> Iterator[tuple[bool, Computation]]:
    """Every computation, and whether it is the entry; an instruction may go over several lines."""
    computation, is_entry, pending = None, False, ""
    for line in text.splitlines():
        if computation is None:
            match = _COMPUTATION.match(line) if line.endswith("{") else None
            if match:
                computation, is_entry = Computation(match[2]), match[1] is not None
        elif line == "}" or line.startswith(("  ", "}, ")):
            if pending:
                _read(computation, pending)
            pending = line
            if line.startswith("}"):
                yield is_entry, computation
                computation, pending = None, ""
        else:
            pending += line


def _read(computation: Computation, line: str) -> None:
    name, _, rest = line.strip().partition(" = ")
    match = _OPCODE.search(" " + rest)
    if match is None:
        return
    start, end = match.end() - 1, _closing(rest, match.end() - 1)
    inside = rest[start:end]
    instruction = Instruction(
        name=name.removeprefix("ROOT ").lstrip("%"),
        type=rest[: max(0, match.start() - 1)],
        opcode=match[1],
        operands=tuple(_NAME.findall(inside)) if "%" in inside else (),
        literal=inside if match[1] in ("constant", "parameter") else "",
        attributes=rest[end + 1 :],
    )
    computation.add(instruction, root=line.lstrip().startswith("ROOT "))


def _closing(text: str, start: int) -> int:
    """Where the parenthesis closes that opened before `start`."""
    depth = 1
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(text)


_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))? \{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{(.*?\})\}")


def first_group(attributes: str, devices: int) -> tuple[int, ...]:
    """The devices, by their place in the mesh, that the first group of a collective joins.

    Without groups, or with an unknown way of writing them, those are all devices.
    """
    if match := _LISTED.search(attributes):
        return _ints(match[1])
    if match := _IOTA.search(attributes):
        ids = _iota(_ints(match[2]), match[3]).reshape(_ints(match[1]))
        return tuple(ids.reshape(-1, ids.shape[-1])[0].tolist())
    if match := _MESH.search(attributes):
        return _mesh_group(match)
    return tuple(range(devices))


def pairs(attributes: str) -> list[tuple[int, int]]:
    """Source and target of each message of a collective-permute."""
    match = _PAIRS.search(attributes)
    if match is None:
        return []
    return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", match[1])]


def axes_of(groups: Sequence[Sequence[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ, in any of the groups."""
    varying: set[str] = set()
    for group in groups:
        places = np.unravel_index(np.asarray(group) % math.prod(mesh.values()), [*mesh.values()])
        varying |= {a for a, place in zip(mesh, places, strict=True) if len(set(place)) > 1}
    return tuple(axis for axis in mesh if axis in varying)


def _mesh_group(match: re.Match[str]) -> tuple[int, ...]:
    """Of e.g. mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a':(2)2}: part of an axis."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
    chosen = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[5])
    }
    if match[4]:
        ids = np.array(_ints(match[4]))
    else:
        ids = _iota(_ints(match[2]) if match[2] else tuple(sizes.values()), match[3])
    split: list[int] = []
    member: list[int | slice] = []
    for name, size in sizes.items():
        before, inside = chosen.get(name, (size, 1))
        split += [before, inside, size // (before * inside)]
        member += [0, slice(None), 0]
    return tuple(ids.reshape(split)[tuple(member)].ravel().tolist())


def _iota(dims: tuple[int, ...], order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(_ints(order)) if order else ids


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)
