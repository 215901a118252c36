"""What an instruction is for: read from the named scopes in JAX's name of it, or in its neighbours' names."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from moe.planner.hlo import Computation, Instruction, Module
from moe.planner.work import Use

_USES: dict[str, Use] = {
    "attention": "attention", "experts": "experts", "shared_expert": "shared_expert", "dense": "dense",
    "router": "router", "dispatch": "exchange", "exchange": "exchange", "combine": "exchange", "head": "head",
    "embedding": "embedding", "norm": "norm", "final_norm": "norm", "optimizer": "optimizer",
}  # fmt: skip
_WORD = re.compile(r"\w+")
# jax.checkpoint's own name, and the scope in parallel/pipeline.py; the transpose of the latter is no recomputation.
_RECOMPUTED = re.compile(r"rematted_computation|(?<!transpose\()jvp\(recomputed\)")
# Also the scope in moe/train/loss.py, whose gradients are computed together with the loss.
_BACKWARD = re.compile(r"transpose\(|\bbackward\b")
_BELONG_TO_THEIR_SOURCE = ("all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_BRANCHING = ("while", "conditional")
_REACH = 24
"""Neighbours that are asked."""


class Purpose(NamedTuple):
    """recomputed: in the forward pass's repetition; that is run in the backward pass, and `backward` holds as well."""

    use: Use
    recomputed: bool
    backward: bool


def purpose(module: Module, computation: Computation, instruction: Instruction) -> Purpose:
    """By its own name; else by most of what it is fused of; else by the nearest of those that take its result, as the
    gather of a weight is for what uses the weight, and then of those from which it takes; for sums and exchanges
    between devices the other way round."""
    names = [instruction.op_name]
    if use_of(instruction.op_name) is None:
        names = _inside(module, instruction) or names
        if use_of(names[0]) is None:
            first = not instruction.opcode.startswith(_BELONG_TO_THEIR_SOURCE)
            near = (_nearest(computation, instruction, forward=way) for way in (first, not first))
            names = [next(filter(None, near), names[0])]
    name = names[0]
    recomputed = bool(_RECOMPUTED.search(name)) or ".remat" in instruction.name
    return Purpose(use_of(name) or "other", recomputed, recomputed or bool(_BACKWARD.search(name)))


def use_of(op_name: str) -> Use | None:
    """That of the innermost scope with one."""
    return next((_USES[word] for word in reversed(_WORD.findall(op_name)) if word in _USES), None)


def _inside(module: Module, instruction: Instruction) -> list[str]:
    """Names with a use, most frequent first."""
    if instruction.opcode != "fusion":
        return []
    found = Counter(
        each.op_name
        for part in module.called(instruction)
        for each in part.instructions.values()
        if use_of(each.op_name) is not None
    )
    return [name for name, _ in found.most_common(1)]


def _nearest(computation: Computation, instruction: Instruction, *, forward: bool) -> str | None:
    """The name of the first neighbour with a use, breadth first."""
    for each in _neighbours(computation, instruction, forward):
        if use_of(each.op_name) is not None:
            return each.op_name
    return None


def _neighbours(computation: Computation, instruction: Instruction, forward: bool) -> Iterator[Instruction]:
    waiting, seen = [instruction], {instruction.name}
    while waiting and len(seen) < _REACH:
        here = waiting.pop(0)
        for each in _takers(computation, here) if forward else _givers(computation, here):
            if each.name not in seen:
                seen.add(each.name)
                waiting.append(each)
                yield each


def _takers(computation: Computation, here: Instruction) -> Iterator[Instruction]:
    """Of a tuple those that take its part out again; what goes round a loop with others is no neighbour of theirs."""
    for each in computation.users[here.name]:
        if each.opcode == "tuple":
            place = each.operands.index(here.name)
            yield from (taker for taker in computation.users[each.name] if taker.numbers("index") == (place,))
        elif each.opcode not in _BRANCHING:
            yield each


def _givers(computation: Computation, here: Instruction) -> Iterator[Instruction]:
    for each in computation.operands(here):
        if each.opcode == "tuple" and here.opcode == "get-tuple-element":
            yield computation.instructions[each.operands[here.numbers("index")[0]]]
        elif each.opcode not in ("tuple", *_BRANCHING):
            yield each
