"""What depends on what in a compiled program's main computation, read from its text."""

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line: its opcode, the text of the line, and the names of its operands."""

    opcode: str
    line: str
    operands: tuple[str, ...]


def main_computation(text: str) -> dict[str, Instruction]:
    """Instructions by name, in the order in which they are scheduled."""
    lines = iter(text.splitlines())
    next(line for line in lines if line.startswith("ENTRY "))
    found = {}
    for line in lines:
        if line.startswith("}"):
            return found
        name, rest = re.match(r"\s*(?:ROOT )?(%[\w.-]+) = (.*)", line).groups()
        opcode, operands = re.search(r" ([\w-]+)\((.*?)\)(?:,|$)", " " + rest).groups()
        found[name] = Instruction(opcode, line, tuple(re.findall(r"%[\w.-]+", operands)))
    raise AssertionError("the main computation has no end")


def ancestors(program: dict[str, Instruction], name: str) -> set[str]:
    """Everything that `name` waits for."""
    seen, waiting = set(), list(program[name].operands)
    while waiting:
        each = waiting.pop()
        if each not in seen:
            seen.add(each)
            waiting += program[each].operands
    return seen
