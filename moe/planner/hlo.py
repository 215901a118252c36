"""Reads the text of an HLO module: computations, instructions, shapes, attributes, and where in the source they began.

The grammar is that which XLA prints (openxla/xla, xla/hlo/ir/hlo_instruction.cc and xla/hlo/parser/hlo_parser.cc).
"""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

HOST_MEMORY = 5
"""XLA's number of the host's memory (xla/layout.h, Layout::kHostMemorySpace)."""

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_REPOSITORY = re.compile(r"(?:^|/)((?:moe|parallel|experiments|benchmarks|tests)/[\w./]+\.py)$")


class HloError(ValueError):
    """A text that is no HLO module, or one of a form that is not known here: quotes the line."""


@dataclass(frozen=True)
class Shape:
    """An array's, or a tuple's of `parts`.

    dtype: as HLO writes it, "tuple" for a tuple.
    layout: dimensions from the one that varies fastest. space: of memory, 0 the device's own.
    bits: of one element.
    """

    dtype: str
    dims: tuple[int, ...] = ()
    layout: tuple[int, ...] = ()
    space: int = 0
    bits: int = 0
    parts: "tuple[Shape, ...]" = ()

    @property
    def elements(self) -> int:
        """Of an array; of a tuple the sum."""
        return sum(part.elements for part in self.parts) if self.dtype == "tuple" else math.prod(self.dims)

    @property
    def bytes(self) -> int:
        if self.dtype == "tuple":
            return sum(part.bytes for part in self.parts)
        return -(-self.elements * self.bits // 8)

    @property
    def leaves(self) -> "list[Shape]":
        """The arrays of a tuple, whatever its depth; of an array itself."""
        return [leaf for part in self.parts for leaf in part.leaves] if self.dtype == "tuple" else [self]

    def __str__(self) -> str:
        if self.dtype == "tuple":
            return f"({', '.join(map(str, self.parts))})"
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """
    name: without its "%".
    operands: names of instructions in the same computation.
    literal: what stands between the parentheses of a parameter (its number) or a constant.
    tail: the text behind the operands, from which `attributes` are read when they are asked for.
    """

    name: str
    shape: Shape
    opcode: str
    operands: tuple[str, ...]
    literal: str
    tail: str = field(repr=False)
    root: bool = False

    @cached_property
    def attributes(self) -> dict[str, str]:
        """By name, as text: {"dimensions": "{0}", "kind": "kLoop", …}."""
        return dict(_attributes(self.tail))

    @cached_property
    def op_name(self) -> str:
        """JAX's name of what was asked for, with the named scopes around it; "" where XLA has lost it."""
        found = _OP_NAME.search(self.tail)
        return found[1].replace("\\'", "'") if found else ""

    @cached_property
    def frame(self) -> int:
        """The number in the module's table of stack frames; 0 where there is none."""
        found = _FRAME.search(self.tail)
        return int(found[1]) if found else 0

    @cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls, as a fusion, a loop, a branch or a reduction does."""
        given = self.attributes
        named = (given.get(key, "") for key in _CALLS)
        return tuple(name for text in named for name in re.findall(r"%?([\w.-]+)", text))

    def numbers(self, key: str) -> tuple[int, ...]:
        """An attribute that is a list: dimensions={0,1} → (0, 1); () where there is none."""
        return tuple(map(int, re.findall(r"-?\d+", self.attributes.get(key, ""))))

    @property
    def target(self) -> str:
        """Of a custom call."""
        return self.attributes.get("custom_call_target", "").strip('"')

    @property
    def kernel(self) -> str:
        """Of a call of a Triton kernel, the name that it was written under; where a partitioner has split the call over
        a mesh, `op_name` has it no more."""
        found = re.search(r'", name = "(\w+)"', self.attributes.get("backend_config", ""))
        return found[1] if found else ""

    @property
    def trip_count(self) -> int | None:
        """Of a loop, where XLA knows it."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.attributes.get("backend_config", ""))
        return int(found[1]) if found else None


@dataclass(frozen=True)
class Computation:
    """instructions: in the order of the text, which in a scheduled module is that of their execution."""

    name: str
    instructions: dict[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        return next(each for each in self.instructions.values() if each.root)

    @cached_property
    def parameters(self) -> list[Instruction]:
        """By their number."""
        found = [each for each in self.instructions.values() if each.opcode == "parameter"]
        return sorted(found, key=lambda each: int(each.literal))

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """By the name of what they use."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for each in self.instructions.values():
            for operand in dict.fromkeys(each.operands):
                found[operand].append(each)
        return found

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands]


@dataclass(frozen=True)
class Module:
    """computations: by name. frames: (file:line, number of the calling frame, 0 for none) by number."""

    name: str
    entry: Computation
    computations: dict[str, Computation]
    frames: dict[int, tuple[str, int]]

    def called(self, instruction: Instruction) -> list[Computation]:
        return [self.computations[name] for name in instruction.called]

    def source(self, instruction: Instruction) -> str:
        """file:line of the innermost frame in this repository, relative to its root; "" where there is none."""
        frame = instruction.frame
        while frame in self.frames:
            place, frame = self.frames[frame]
            file, _, line = place.rpartition(":")
            found = _REPOSITORY.search(file)
            if found and "site-packages" not in file:
                return f"{found[1]}:{line}"
        return ""


_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .* )?\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.-]+) = ")
_OPCODE = re.compile(r" ?([\w-]+)\(")
_ARRAY = re.compile(r"(\w+)\[([^\]]*)\](?:\{([^{}]*)\})?")
_OP_NAME = re.compile(r'\bop_name="((?:[^"\\]|\\.)*)"')
_FRAME = re.compile(r"\bstack_frame_id=(\d+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_OPERAND = re.compile(r"%([\w.-]+)")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}()\[\],]')
_CALLS = ("calls", "to_apply", "condition", "body", "branch_computations", "true_computation", "false_computation")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


def parse(text: str) -> Module:
    """
    Raises:
        HloError: it is no HLO module, or a line cannot be read.
    """
    lines = text.splitlines()
    if not lines or not lines[0].startswith("HloModule "):
        raise HloError(f"this is no HLO module: it begins with {text[:60]!r}")
    name = re.split(r"[ ,]", lines[0], maxsplit=2)[1]
    tables: dict[str, list[str]] = {table: [] for table in _TABLES}
    computations: dict[str, Computation] = {}
    entry = ""
    table: list[str] | None = None
    inside: Computation | None = None
    for line in lines[1:]:
        if inside is not None:
            if line.startswith("}"):
                inside = None
            elif line:
                each = parse_instruction(line)
                inside.instructions[each.name] = each
        elif line in tables:
            table = tables[line]
        elif table is not None and line[:1].isdigit():
            table.append(line)
        elif line:
            head = _HEAD.match(line)
            if head is None:
                raise HloError(f"this heads no computation: {line[:200]!r}")
            table, inside = None, Computation(head[2], {})
            computations[head[2]] = inside
            entry = head[2] if head[1] else entry
    if not entry or inside is not None:
        raise HloError(f"the module {name} has no ENTRY computation, or breaks off")
    return Module(name, computations[entry], computations, _frames(*tables.values()))


def parse_instruction(line: str) -> Instruction:
    """One line of a computation.

    Raises:
        HloError: it cannot be read.
    """
    begin = _LINE.match(line)
    if begin is None:
        raise HloError(f"this is no instruction: {line[:200]!r}")
    shape, at = _shape(line, begin.end())
    opcode = _OPCODE.match(line, at)
    if opcode is None:
        raise HloError(f"this instruction has no opcode: {line[:200]!r}")
    end = _closing(line, opcode.end())
    inner = line[opcode.end() : end]
    literal = inner if opcode[1] in ("parameter", "constant") else ""
    operands = () if literal else tuple(_OPERAND.findall(inner))
    return Instruction(begin[2], shape, opcode[1], operands, literal, line[end + 1 :], root=begin[1] is not None)


def parse_shape(text: str) -> Shape:
    """ "f32[2,3]{1,0:S(5)}", or a tuple of such.

    Raises:
        HloError: it is none.
    """
    return _shape(_COMMENT.sub("", text), 0)[0]


def _shape(line: str, at: int) -> tuple[Shape, int]:
    """The shape that begins there, and where it ends."""
    if line[at] == "(":
        end = _closing(line, at + 1)
        return _tuple(_COMMENT.sub("", line[at + 1 : end])), end + 1
    found = _ARRAY.match(line, at)
    if found is None:
        raise HloError(f"this is no shape: {line[at : at + 200]!r}")
    return _array(found), found.end()


def _tuple(text: str) -> Shape:
    parts, at = [], 0
    while at < len(text):
        if text[at] in ", ":
            at += 1
            continue
        part, at = _shape(text, at)
        parts.append(part)
    return Shape("tuple", parts=tuple(parts))


def _array(found: re.Match[str]) -> Shape:
    """Of dims a bound "<=4" counts as its bound. In the layout, S(n) is the memory space, and E(n) the bits of an
    element that is packed."""
    dtype, dims, layout = found[1], found[2], found[3] or ""
    sizes = tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size)
    order, _, tiling = layout.partition(":")
    space, packed = re.search(r"S\((\d+)\)", tiling), re.search(r"E\((\d+)\)", tiling)
    return Shape(
        dtype,
        sizes,
        tuple(int(place) for place in order.split(",") if place),
        int(space[1]) if space else 0,
        int(packed[1]) if packed else _bits(dtype),
    )


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z](\d+)", dtype)
    if found is None:
        raise HloError(f"the number format {dtype!r} is not known: add its bits to moe/planner/hlo.py")
    # Narrower ones take a whole byte unless the layout says that they are packed.
    return max(8, int(found[1]))


def _closing(line: str, at: int) -> int:
    """Where the parenthesis closes that was opened just before `at`."""
    depth = 1
    for token in _TOKEN.finditer(line, at):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if depth == 0:
            return token.start()
    raise HloError(f"a parenthesis is not closed: {line[:200]!r}")


def _attributes(tail: str) -> list[tuple[str, str]]:
    """ ", a={1,2}, b=c" as pairs."""
    parts, depth, begin = [], 0, 0
    for token in _TOKEN.finditer(tail):
        mark = token[0]
        if mark in "{([":
            depth += 1
        elif mark in "})]":
            depth -= 1
        elif mark == "," and depth == 0:
            parts.append(tail[begin : token.start()])
            begin = token.end()
    parts.append(tail[begin:])
    pairs = (part.strip().partition("=") for part in parts if "=" in part)
    return [(key, value) for key, _, value in pairs]


def _frames(files: list[str], functions: list[str], locations: list[str], frames: list[str]) -> dict:
    """XLA writes the number of a calling frame with 1 added, so that 1 says that there is none."""

    def numbers(line: str) -> dict[str, int]:
        return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", line)}

    names = {int(number): name.strip('"') for number, _, name in (line.partition(" ") for line in files)}
    places = {}
    for line in locations:
        given = numbers(line)
        places[int(line.partition(" ")[0])] = f"{names[given['file_name_id']]}:{given['line']}"
    found = {}
    for line in frames:
        given = numbers(line)
        found[int(line.partition(" ")[0])] = (places[given["file_location_id"]], given.get("parent_frame_id", 1) - 1)
    return found
