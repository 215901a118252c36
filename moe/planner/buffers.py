"""What a compiled program holds in memory, from XLA's own buffer assignment and live ranges: equal to XLA's figures to
the byte.

XLA assigns each value a place in an allocation (xla/service/buffer_assignment.h): arguments, results and constants
have one each and live throughout; all others share one preallocated block, each at its offset while it lives. Values
that XLA updates in place share their offset and count once. Tables of pointers (tuples) lie in the block as well; XLA
leaves these few hundred bytes out of its peak, and so does this.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from moe.planner.compile import Compiled
from moe.planner.hlo import Instruction, Module, parse, parse_shape
from moe.planner.work import Buffer, Memory, Part

LARGEST = 40
"""Buffers that `Memory.largest` names."""
POINTS = 400
"""Places of `Memory.over_program`."""
LOSS = "moe/train/loss.py"
HOST_COLOR = "color 5"
"""How the assignment marks an allocation in the host's memory (xla/layout.h, Layout::kHostMemorySpace)."""


@dataclass(frozen=True)
class _Value:
    """name: of the instruction. shape: as HLO writes it. begin, end: places in the schedule, both included."""

    name: str
    index: str
    shape: str
    size: int
    offset: int
    begin: int
    end: int


@dataclass(frozen=True)
class _Allocation:
    """
    kind: "argument", "block", "constant", "thread" or "result".
    number: of the argument.
    """

    kind: str
    number: int
    size: int
    host: bool
    values: tuple[_Value, ...]


def memory_of(compiled: Compiled) -> Memory:
    """Reads what XLA wrote when it compiled the program."""
    allocations = _allocations(compiled.buffers(), _lifetimes(compiled.lifetimes()))
    device = [each for each in allocations if not each.host and each.kind != "thread"]
    always = [each for each in device if each.kind != "block"]
    block = [value for each in device if each.kind == "block" for value in each.values if _is_array(value.shape)]
    timeline = _timeline(block)
    place, moving = max(timeline, key=lambda point: point[1], default=(0, 0))
    resident = sum(each.size for each in always)
    naming = _Naming.of(parse(compiled.program()), compiled.lifetimes())
    at_peak = [naming.resident(each) for each in always] + naming.moving(block, place)
    parts: dict[Part, int] = dict.fromkeys(_PARTS, 0)
    for buffer in at_peak:
        parts[buffer.part] += buffer.bytes
    return Memory(
        parts={part: size for part, size in parts.items() if size},
        peak=resident + moving,
        allocated=sum(each.size for each in device if each.kind != "constant"),
        host=sum(each.size for each in allocations if each.host),
        largest=tuple(sorted(at_peak, key=lambda buffer: -buffer.bytes)[:LARGEST]),
        over_program=_thinned(timeline, resident),
        origin="compiled",
    )


_PARTS: tuple[Part, ...] = (
    "parameters", "optimizer_states", "gradients", "activations", "temporaries", "cache", "batch",
)  # fmt: skip
_ALLOCATION = re.compile(r"allocation \d+: size (\d+)(.*):$")
_VALUE = re.compile(r" value: <\d+ (\S+?)(\{[\d,]*\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)")
_LIFETIME = re.compile(r"    (\S+?)(\{[\d,]*\}):(\d+)-(\d+)$")


def _allocations(text: str, lifetimes: dict[tuple[str, str], tuple[int, int]]) -> list[_Allocation]:
    found: list[_Allocation] = []
    head: re.Match[str] | None = None
    values: list[_Value] = []
    for line in [*text.splitlines(), "allocation 0: size 0:"]:
        if match := _ALLOCATION.match(line):
            if head is not None:
                found.append(_allocation(head, values))
            head, values = match, []
        elif match := _VALUE.match(line):
            name, index, size, offset, shape = match.groups()
            index = index or "{}"
            begin, end = lifetimes.get((name, index), (0, 0))
            values.append(_Value(name, index, shape, int(size), int(offset), begin, end))
    return found


def _allocation(head: re.Match[str], values: list[_Value]) -> _Allocation:
    size, description = int(head[1]), head[2]
    number = re.search(r", parameter (\d+),", description)
    words = {"preallocated-temp": "block", "constant": "constant", "thread-local": "thread"}
    kind = next((kind for word, kind in words.items() if word in description), "result")
    kind = "argument" if number else kind
    return _Allocation(kind, int(number[1]) if number else 0, size, HOST_COLOR in description, tuple(values))


def _lifetimes(text: str) -> dict[tuple[str, str], tuple[int, int]]:
    ranges = text[text.index("BufferLiveRange:") :].split("Live ranges at")[0]
    matches = filter(None, map(_LIFETIME.match, ranges.splitlines()))
    return {(match[1], match[2]): (int(match[3]), int(match[4])) for match in matches}


def _is_array(shape: str) -> bool:
    return not shape.startswith("(")


def _timeline(values: Iterable[_Value]) -> list[tuple[int, int]]:
    """(place in the schedule, bytes alive), wherever values begin. A place in the block counts once, however many
    values share it."""
    values = list(values)
    begin: dict[int, list[_Value]] = {}
    end: dict[int, list[_Value]] = {}
    for value in values:
        begin.setdefault(value.begin, []).append(value)
        end.setdefault(value.end, []).append(value)
    alive: dict[tuple[int, int], int] = {}
    total, points = 0, []
    for place in sorted({*begin, *end}):
        for value in begin.get(place, ()):
            slot = (value.offset, value.size)
            alive[slot] = alive.get(slot, 0) + 1
            total += value.size if alive[slot] == 1 else 0
        points.append((place, total))
        for value in end.get(place, ()):
            slot = (value.offset, value.size)
            alive[slot] -= 1
            total -= value.size if alive[slot] == 0 else 0
    return points


def _thinned(timeline: list[tuple[int, int]], resident: int) -> tuple[tuple[float, int], ...]:
    """At most `POINTS` of it, each the largest of those that it stands for."""
    last = max(1, timeline[-1][0]) if timeline else 1
    highest: dict[int, tuple[float, int]] = {}
    for place, size in timeline:
        share = place / last
        number = min(int(share * POINTS), POINTS - 1)
        if number not in highest or size + resident > highest[number][1]:
            highest[number] = (share, size + resident)
    return tuple(highest.values())


@dataclass(frozen=True)
class _Naming:
    """Which part of a step's memory a value is, and where in the source it began.

    weights: dimensions of the parameters, whole and of one device, of all layers and of one; sizes of 1 left out, in
        ascending order, for XLA permutes them.
    turn: place in the schedule where the backward pass begins: amid the loss's instructions, of which XLA moves a few
        to earlier or later places.
    """

    module: Module
    instructions: dict[str, Instruction]
    weights: frozenset[tuple[int, ...]]
    turn: int

    @classmethod
    def of(cls, module: Module, lifetimes: str) -> "_Naming":
        instructions = {name: each for all_ in module.computations.values() for name, each in all_.instructions.items()}
        weights = set()
        for each in module.entry.parameters:
            if _argument_part(each.op_name) in ("parameters", "optimizer_states"):
                for dims in (each.shape.dims, _whole(each)):
                    weights |= {_unordered(dims), _unordered(dims[1:])}
        schedule = re.findall(r"^    (\d+):(\S+)$", lifetimes, re.MULTILINE)
        of_loss = [
            int(place)
            for place, name in schedule
            if name in instructions and module.source(instructions[name]).startswith(LOSS)
        ]
        turn = of_loss[len(of_loss) // 2] if of_loss else len(schedule)
        return cls(module, instructions, frozenset(filter(None, weights)), turn)

    def resident(self, allocation: _Allocation) -> Buffer:
        """Of an argument, a result or a constant."""
        if allocation.kind == "argument":
            given = self.module.entry.parameters[allocation.number]
            return Buffer(allocation.size, _argument_part(given.op_name), str(given.shape), given.op_name, "")
        (shape, name), *_ = [(each.shape, each.name) for each in allocation.values] or [("", allocation.kind)]
        return Buffer(allocation.size, "temporaries", shape, name, "")

    def moving(self, block: list[_Value], place: int) -> list[Buffer]:
        """What lives in the block at a place of the schedule; values that are updated in place as one."""
        sharing: dict[tuple[int, int], list[_Value]] = {}
        for value in block:
            sharing.setdefault((value.offset, value.size), []).append(value)
        slots = [values for values in sharing.values() if any(v.begin <= place <= v.end for v in values)]
        return [self._buffer(_joined(values, place)) for values in slots]

    def _buffer(self, values: list[_Value]) -> Buffer:
        """Of values that follow each other in one place. The one that says most names it: not a loop, a copy or the
        zeros that it begins with."""
        named = [each for each in values if each.name in self.instructions]
        if not named:
            # Inside an asynchronous operation, which the program's text writes as one instruction.
            return Buffer(values[0].size, "temporaries", values[0].shape, values[0].name, "")
        value = max(named, key=lambda each: _telling(self.instructions[each.name]))
        instruction = self.instructions[value.name]
        part = self._part(values, value, instruction)
        return Buffer(value.size, part, value.shape, self._title(instruction), self._source(instruction))

    def _title(self, instruction: Instruction) -> str:
        """The instruction's name; of what XLA makes of an argument by itself, with the argument's."""
        moved = [self.instructions[name] for name in instruction.operands[:1] if not self._source(instruction)]
        arguments = [each.op_name for each in moved if each.opcode == "parameter" and each.op_name]
        return " of ".join([instruction.name, *arguments])

    def _part(self, values: list[_Value], value: _Value, instruction: Instruction) -> Part:
        path = instruction.op_name
        source = self._source(instruction)
        if _unordered(parse_shape(value.shape).dims) in self.weights:
            is_gradient = _is_backward(path) or (source.startswith(LOSS) and value.shape.startswith("f32"))
            return "gradients" if is_gradient else "temporaries"
        begin, end = min(each.begin for each in values), max(each.end for each in values)
        return "activations" if begin < self.turn <= end and not _is_backward(path) else "temporaries"

    def _source(self, instruction: Instruction) -> str:
        """file:line; of a value that a scan writes into its stack, where the value was computed."""
        return self.module.source(self._origin(instruction)) or self.module.source(instruction)

    def _origin(self, instruction: Instruction, caller: Instruction | None = None) -> Instruction:
        """The instruction that computed what this one moves. caller: the fusion in which this one stands."""
        if instruction.opcode == "parameter" and caller is not None:
            return self._origin(self.instructions[caller.operands[int(instruction.literal)]])
        if instruction.opcode in ("bitcast", "copy", "dynamic-update-slice"):
            moved = instruction.operands[1 if instruction.opcode == "dynamic-update-slice" else 0]
            return self._origin(self.instructions[moved], caller)
        if instruction.opcode == "get-tuple-element":
            tuple_ = self.instructions[instruction.operands[0]]
            if tuple_.opcode == "fusion":
                root = self.module.called(tuple_)[0].root
                return self._origin(self.instructions[root.operands[instruction.numbers("index")[0]]], tuple_)
        if instruction.opcode == "fusion":
            root = self.module.called(instruction)[0].root
            if root.opcode in ("bitcast", "dynamic-update-slice"):
                return self._origin(root, instruction)
        return instruction


def _joined(values: list[_Value], place: int) -> list[_Value]:
    """Those of one place in the block that follow each other without a gap, up to and from a place in the schedule."""
    run: list[_Value] = []
    reach = -1
    for value in sorted(values, key=lambda each: (each.begin, each.end)):
        if value.begin > reach:
            if run and run[0].begin <= place <= reach:
                return run
            run = []
        run.append(value)
        reach = max(reach, value.end)
    return run


def _telling(instruction: Instruction) -> int:
    if instruction.opcode in ("parameter", "while", "tuple", "get-tuple-element", "constant"):
        return 0
    if instruction.opcode in ("copy", "broadcast", "bitcast") or "broadcast" in instruction.name:
        return 1
    return 3 if instruction.op_name else 2


def _argument_part(path: str) -> Part:
    """By JAX's name of the argument: state.params['…'], state.opt_state[1].mu['…'], cache.stacks[0].keys, batch.…"""
    path = path.removeprefix("state.")
    if path.startswith("opt_state"):
        return "optimizer_states"
    if path.startswith(("params", "balance", "frozen")):
        return "parameters"
    return "cache" if path.startswith("cache") else "batch"


def _is_backward(path: str) -> bool:
    return "transpose(" in path and "rematted_computation" not in path


def _whole(argument: Instruction) -> tuple[int, ...]:
    """Dimensions of an argument over all devices, by its sharding={devices=[1,16,2]<=[…] …}."""
    found = re.search(r"devices=\[([\d,]+)\]", argument.attributes.get("sharding", ""))
    if not found:
        return argument.shape.dims
    parts = map(int, found[1].split(","))
    return tuple(size * count for size, count in zip(argument.shape.dims, parts, strict=False))


def _unordered(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in dims if size > 1))
