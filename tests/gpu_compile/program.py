"""What a compiled program must not do, each as a small function over its parsed HLO that lists what does it."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from moe.planner.hlo import Computation, Instruction, Module, Shape
from moe.planner.kernels import Kernels
from moe.planner.transfers import COLLECTIVES
from moe.planner.work import Event, Loop, Run, Start, Transfer, Wait

ELSEWHERE = ("while", "call", "conditional")
"""Instructions whose computations store what their instructions make; those that others name are fused or applied."""
NOTHING_STORED = ("tuple", "get-tuple-element", "parameter", "bitcast", *ELSEWHERE)
MOVES = frozenset({
    "bitcast", "copy", "transpose", "reshape", "convert", "slice", "dynamic-slice", "dynamic-update-slice", "pad",
    "concatenate", "broadcast", "all-gather", "opt-barrier", "copy-start", "copy-done", "all-gather-start",
    "all-gather-done", "async-start", "async-done",
})  # fmt: skip
"""Opcodes whose result has the numbers of their operands, whatever its format and their places."""
PRODUCTS = ("matmul", "grouped_matmul", "attention")

Held = dict[str, frozenset[int]]
"""By instruction of a computation: which parts of its tuple hold what is traced, part 0 being an array itself."""
NOTHING: frozenset[int] = frozenset()


class Stored(NamedTuple):
    """An instruction that stores arrays in the device's memory."""

    computation: Computation
    instruction: Instruction

    @property
    def shapes(self) -> list[Shape]:
        """Of what it makes: of an asynchronous one without its operands."""
        shape, started = self.instruction.shape, self.instruction.opcode == "all-gather-start"
        return (shape.parts[1] if started else shape).leaves


def stored(module: Module) -> Iterator[Stored]:
    """All but what is computed inside a fusion, or applied by a reduction."""
    inside = {
        called.name
        for computation in module.computations.values()
        for each in computation.instructions.values()
        if each.opcode not in ELSEWHERE
        for called in module.called(each)
    }
    for computation in module.computations.values():
        if computation.name not in inside:
            for each in computation.instructions.values():
                if each.opcode not in NOTHING_STORED:
                    yield Stored(computation, each)


def products_of(module: Module, flops: float) -> list[str]:
    """Products of at least so many floating-point operations that XLA makes itself, one by one."""
    kernels = Kernels(module)
    found = ((each, product) for each in stored(module) for product in kernels.products(*each))
    return [f"{each.instruction.name} {product}" for each, product in found if product.flops >= flops]


def arrays_of(module: Module, sizes: set[int]) -> list[str]:
    """Stored arrays of exactly so many numbers."""
    found = ((each.instruction.name, shape) for each in stored(module) for shape in each.shapes)
    return [f"{name} {shape}" for name, shape in found if shape.elements in sizes]


def kernel_calls(module: Module, target: str) -> list[str]:
    """JAX's names of what calls a kernel whose target begins so."""
    return [each.instruction.op_name for each in stored(module) if each.instruction.target.startswith(target)]


def synchronous(module: Module, least: int) -> list[str]:
    """Collectives of at least so many bytes that are one instruction, so that nothing can run beside them."""
    return [
        each.instruction.name
        for each in stored(module)
        if each.instruction.opcode in COLLECTIVES
        if sum(operand.shape.bytes for operand in each.computation.operands(each.instruction)) >= least
    ]


def unhidden(events: tuple[Event, ...]) -> Iterator[Transfer]:
    """Transfers between whose start and end no product runs."""
    begun: dict[str, tuple[Transfer, bool]] = {}
    for event in events:
        if isinstance(event, Loop):
            yield from unhidden(event.body)
        if isinstance(event, Start):
            begun[event.transfer.name] = (event.transfer, False)
        elif isinstance(event, Wait):
            transfer, hidden = begun.pop(event.name)
            if not hidden:
                yield transfer
        elif _multiplies(event):
            begun = {name: (transfer, True) for name, (transfer, _) in begun.items()}


def _multiplies(event: Event) -> bool:
    if isinstance(event, Loop):
        return any(map(_multiplies, event.body))
    return isinstance(event, Run) and event.kind in PRODUCTS


def copies(module: Module, is_traced: Callable[[str], bool]) -> list[tuple[Stored, Shape]]:
    """Stored arrays whose numbers are those of an argument whose JAX name `is_traced`, moved or converted.

    What is computed from them holds them no longer, such as a product or an optimizer's update.
    """
    tracer = _Tracer(module)
    given = [frozenset({0}) if is_traced(each.op_name) else NOTHING for each in module.entry.parameters]
    tracer.flow(module.entry, given)
    return [
        (each, shape)
        for each in stored(module)
        if each.computation.name in tracer.found
        for place, shape in enumerate(each.shapes)
        if place in tracer.found[each.computation.name].get(each.instruction.name, NOTHING)
    ]


class _Tracer:
    """Follows arrays through computations. found: by computation that stores."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.found: dict[str, Held] = {}

    def flow(self, computation: Computation, given: list[frozenset[int]]) -> frozenset[int]:
        """What of the root holds it, given what of the parameters does."""
        held: Held = {}
        for each in computation.instructions.values():
            held[each.name] = self._held(computation, each, given, held)
        self.found[computation.name] = held
        return held[computation.root.name]

    def _held(
        self, computation: Computation, each: Instruction, given: list[frozenset[int]], held: Held
    ) -> frozenset[int]:
        of_operands = [held[name] for name in each.operands]
        if each.opcode == "parameter":
            return given[int(each.literal)]
        if each.opcode == "get-tuple-element":
            return frozenset({0}) if each.numbers("index")[0] in of_operands[0] else NOTHING
        if each.opcode == "while":
            return self._looped(each, of_operands[0])
        if each.opcode in ("fusion", "call"):
            return self.flow(self.module.called(each)[0], of_operands)
        if each.opcode.endswith("-done") or each.opcode == "opt-barrier":
            return of_operands[0]
        if each.opcode == "tuple" or each.opcode.startswith("all-gather"):
            return frozenset(place for place, parts in enumerate(of_operands) if parts)
        return frozenset({0}) if each.opcode in MOVES and any(of_operands) else NOTHING

    def _looped(self, each: Instruction, given: frozenset[int]) -> frozenset[int]:
        """Until another turn adds nothing."""
        body = self.module.computations[each.attributes["body"].lstrip("%")]
        while (made := given | self.flow(body, [given])) != given:
            given = made
        return given
