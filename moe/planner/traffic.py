"""Bytes that a kernel reads and writes: of its operands only what it touches, of a result updated in place only the
update."""

from dataclasses import replace
from typing import NamedTuple

from moe.planner.hlo import Computation, Instruction, Module

FREE = frozenset({
    "parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all", "partition-id", "replica-id",
    "add-dependency", "opt-barrier",
})  # fmt: skip
"""Opcodes that cost nothing."""

_READS_A_PART = ("dynamic-slice", "slice", "gather")
_READS_WHOLE = ("dot", "sort", "custom-call", "reduce-window", "scatter", "select-and-scatter", "convolution")


class Traffic(NamedTuple):
    """Bytes. read: of each operand."""

    read: tuple[float, ...]
    written: float

    @property
    def bytes(self) -> float:
        return sum(self.read) + self.written


def traffic(module: Module, computation: Computation, instruction: Instruction) -> Traffic:
    """Of one execution, each byte counted once however often a kernel comes back to it."""
    if instruction.opcode.startswith("fusion"):
        return _of_computation(module, module.called(instruction)[0])
    # What stands alone is as a fusion of nothing else.
    operands = {each.name: each for each in computation.operands(instruction)}
    inside = {each.name: _as_parameter(each, place) for place, each in enumerate(operands.values())}
    return _of_computation(module, Computation("", inside | {instruction.name: replace(instruction, root=True)}))


def _as_parameter(instruction: Instruction, place: int) -> Instruction:
    return Instruction(instruction.name, instruction.shape, "parameter", (), str(place), "")


def _of_computation(module: Module, inside: Computation) -> Traffic:
    root = inside.root
    written = 0.0
    needed = dict.fromkeys(inside.instructions, 0.0)
    in_place: set[str] = set()
    for result in inside.operands(root) if root.opcode == "tuple" else [root]:
        writer = _behind_bitcasts(inside, result)
        update = _update(inside, writer)
        if update is None:
            written += result.shape.bytes
            needed[result.name] = float(result.shape.elements)
        else:
            in_place.add(writer.name)
            written += update.shape.bytes
            needed[writer.name] = float(update.shape.elements)
    for each in reversed(inside.instructions.values()):
        if each.opcode not in ("parameter", "constant", "iota") and needed[each.name] > 0:
            for name, elements in _needs(module, inside, each, needed[each.name], each.name in in_place):
                whole = inside.instructions[name].shape.elements
                needed[name] = min(float(whole), needed[name] + elements)
    read = (needed[each.name] / max(1, each.shape.elements) * each.shape.bytes for each in inside.parameters)
    return Traffic(tuple(read), written)


def _behind_bitcasts(inside: Computation, instruction: Instruction) -> Instruction:
    while instruction.opcode == "bitcast":
        instruction = inside.operands(instruction)[0]
    return instruction


def _update(inside: Computation, writer: Instruction) -> Instruction | None:
    """What is written into a buffer that came from outside, and of which the rest stays as it is."""
    if writer.opcode not in ("dynamic-update-slice", "scatter"):
        return None
    given = inside.operands(writer)
    if _behind_bitcasts(inside, given[0]).opcode != "parameter":
        return None
    return given[1] if writer.opcode == "dynamic-update-slice" else given[-1]


def _needs(
    module: Module, inside: Computation, each: Instruction, needed: float, in_place: bool
) -> list[tuple[str, float]]:
    """Elements of its operands that are read for `needed` elements of its result."""
    given = inside.operands(each)
    share = needed / max(1, each.shape.elements)
    if each.opcode in _READS_A_PART:
        return [(given[0].name, needed), *((other.name, share * other.shape.elements) for other in given[1:])]
    if each.opcode == "dynamic-update-slice":
        return [(given[0].name, 0.0 if in_place else needed), *((o.name, float(o.shape.elements)) for o in given[1:])]
    if each.opcode == "scatter" and in_place:
        # Read, added to, and written back.
        return [(given[0].name, needed), *((other.name, float(other.shape.elements)) for other in given[1:])]
    if each.opcode in _READS_WHOLE:
        return [(other.name, float(other.shape.elements)) for other in given]
    if each.opcode == "broadcast":
        return [(given[0].name, needed)]
    if each.opcode == "fusion":
        read = _of_computation(module, module.called(each)[0]).read
        parts = (size / max(1, other.shape.bytes) for other, size in zip(given, read, strict=True))
        return [(o.name, share * part * o.shape.elements) for o, part in zip(given, parts, strict=True)]
    return [(other.name, share * other.shape.elements) for other in given]
