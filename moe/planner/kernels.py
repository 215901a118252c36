"""One kernel of a compiled program as a `Run`: its kind, its floating-point operations, its bytes."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from moe.planner.hlo import Computation, Instruction, Module, Shape, parse_shape
from moe.planner.scopes import purpose
from moe.planner.traffic import traffic
from moe.planner.work import Run, RunKind


class CountError(ValueError):
    """A program with something in it whose work is not known: names it, and says what to do."""


class Product(NamedTuple):
    """`batch` times m x k by k x n."""

    batch: int
    m: int
    n: int
    k: int
    format: str

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.m * self.n * self.k

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.m, self.n, self.k


_MOVES = frozenset({
    "parameter", "constant", "bitcast", "tuple", "get-tuple-element", "copy", "transpose", "reshape", "slice",
    "dynamic-slice", "dynamic-update-slice", "concatenate", "pad", "gather", "scatter", "broadcast", "iota",
    "reverse",
})  # fmt: skip
_INDEXING = frozenset({
    "add", "subtract", "multiply", "compare", "select", "clamp", "minimum", "maximum", "convert", "and", "or", "not",
})  # fmt: skip
_ARITHMETIC = frozenset({
    "add", "subtract", "multiply", "divide", "negate", "exponential", "exponential-minus-one", "log", "log-plus-one",
    "sqrt", "rsqrt", "cbrt", "tanh", "sine", "cosine", "power", "logistic", "maximum", "minimum", "abs", "remainder",
    "erf", "tan", "atan2",
})  # fmt: skip
_FLOATS = ("f", "bf", "c")  # how their names begin
_UNKNOWN = ("convolution", "ragged-dot", "scaled-dot", "send", "recv", "infeed", "outfeed")
_NO_WORK = ("AllocateBuffer",)
_SORTS = ("__cub$", "__gpu$TopK", "TopK")
_GROUPED = re.compile(r"grouped_matmul_(rows|weights)\b")


@dataclass(frozen=True)
class Kernels:
    """
    routed_rows: that one grouped product works on, in the mean when the router is even; the buffers that hold them are
        longer, by the capacity factor or up to the worst case. None: as many as the buffers hold.
    """

    module: Module
    routed_rows: float | None = None

    def run(self, computation: Computation, instruction: Instruction) -> Run | None:
        """None where it does nothing on the device.

        Raises:
            CountError: a library call that is not known here.
        """
        if instruction.target in _NO_WORK:
            return None
        products = self.products(computation, instruction)
        if products:
            largest = max(products, key=lambda each: each.flops)
            flops = sum(each.flops for each in products)
            return self._made(computation, instruction, "matmul", flops, largest.format, largest.shape)
        if instruction.opcode.startswith("custom-call"):
            return self._library_call(computation, instruction)
        if any(each.opcode == "sort" for _, each in self._parts(computation, instruction)):
            return self._made(computation, instruction, "sort", 0.0)
        if self._only_moves(computation, instruction):
            return self._made(computation, instruction, "data_movement", 0.0)
        return self._made(computation, instruction, "elementwise", self._arithmetic(computation, instruction))

    def products(self, computation: Computation, instruction: Instruction) -> list[Product]:
        """Of matrices, in it or in what it is fused of."""
        found = []
        for inside, each in self._parts(computation, instruction):
            operands = [operand.shape for operand in inside.operands(each)]
            if each.opcode == "dot":
                found.append(_dot(operands[0], operands[1], each))
            elif each.opcode == "custom-call" and each.target.startswith("__cublas$"):
                found.append(_library_product(operands[0], operands[1], each))
            elif each.opcode in _UNKNOWN:
                raise CountError(f"{each.name}: how much work a {each.opcode} is is not known here")
        return found

    def _library_call(self, computation: Computation, instruction: Instruction) -> Run:
        target = instruction.target
        operands = [each.shape for each in computation.operands(instruction)]
        if target.startswith("__cudnn$fmha"):
            B, T, N, H, S = _sizes_of_attention(instruction)
            flops, shape = attention_flops(instruction), (B * N, T, S, H)
            return self._made(computation, instruction, "attention", flops, operands[0].dtype, shape)
        if target.startswith(_SORTS):
            return self._made(computation, instruction, "sort", 0.0)
        grouped = _GROUPED.search(instruction.kernel)
        if target == "__gpu$xla.gpu.triton" and grouped:
            return self._grouped(computation, instruction, operands, grouped[1])
        raise CountError(f"{instruction.name}: how much work the library call {target!r} is is not known here")

    def _grouped(self, computation: Computation, instruction: Instruction, operands: list[Shape], over: str) -> Run:
        """The kernels of moe/ops/grouped_matmul/triton.py and moe/ops/scaled/triton.py, whose operands have scales
        behind each. They leave out rows that are not there."""
        result = instruction.shape
        scales = operands[-3::2] if "scaled_" in instruction.kernel else []
        x, other = (operands[-4], operands[-2]) if scales else operands[-2:]
        experts = other.dims[0] if over == "rows" else result.dims[0]
        use = purpose(self.module, computation, instruction).use
        # The scaled kernel of matrices' gradients has the rows along its operands' last axis.
        held = x.dims[1] if scales and over == "weights" else x.dims[0]
        # Dense products with scales of blocks are that of one group.
        routed = held if self.routed_rows is None or use != "experts" else self.routed_rows
        rows = min(held, routed)
        deep, wide = (x.dims[1], result.dims[1]) if over == "rows" else (result.dims[1], result.dims[2])
        matrices, moved = (other, result) if over == "rows" else (result, other)
        size = rows * (deep * x.bits + wide * moved.bits) / 8 + matrices.bytes + sum(each.bytes for each in scales)
        flops = 2.0 * rows * deep * wide
        shape = (experts, round(rows), wide, deep)
        run = self._made(computation, instruction, "grouped_matmul", flops, x.dtype, shape, size)
        # Scales are [rows, parts] and [experts, parts, columns]; of matrices' gradients [parts, columns].
        parts = scales[0].dims[1 if over == "rows" else 0] if scales else 1
        return replace(run, block_scaled=parts > 1)

    def _made(
        self,
        computation: Computation,
        instruction: Instruction,
        kind: RunKind,
        flops: float,
        number_format: str = "",
        shape: tuple[int, int, int, int] | None = None,
        size: float | None = None,
    ) -> Run:
        """Bytes and format are those of its operands and results unless they are given."""
        operands = computation.operands(instruction)
        if size is None:
            size = traffic(self.module, computation, instruction).bytes
        if not number_format:
            leaves = [leaf for each in [*operands, instruction] for leaf in each.shape.leaves if leaf.elements > 1]
            number_format = max(leaves or instruction.shape.leaves, key=lambda leaf: leaf.bits).dtype
        use, recomputed, backward = purpose(self.module, computation, instruction)
        return Run(
            instruction.name, use, kind, flops, size, number_format, shape, recomputed, backward,
            self.module.source(instruction),
        )  # fmt: skip

    def _parts(self, computation: Computation, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """What it is fused of, each with where it stands; itself where it is no fusion."""
        if not instruction.opcode.startswith("fusion"):
            yield computation, instruction
            return
        for inside in self.module.called(instruction):
            for each in inside.instructions.values():
                yield from self._parts(inside, each)

    def _arithmetic(self, computation: Computation, instruction: Instruction) -> float:
        """Floating-point operations other than products: one for each element, and in a reduction for each that goes
        in."""
        total = 0
        for inside, each in self._parts(computation, instruction):
            if each.opcode in _ARITHMETIC and each.shape.dtype.startswith(_FLOATS):
                total += each.shape.elements
            elif each.opcode in ("reduce", "reduce-window"):
                given = inside.operands(each)
                # One initial value for each array.
                arrays = given[: len(given) // 2]
                total += sum(x.shape.elements for x in arrays if x.shape.dtype.startswith(_FLOATS))
        return float(total)

    def _only_moves(self, computation: Computation, instruction: Instruction) -> bool:
        """Arithmetic on whole numbers is taken for the computation of places."""
        return all(
            each.opcode in _MOVES or (each.opcode in _INDEXING and not each.shape.dtype.startswith(_FLOATS))
            for _, each in self._parts(computation, instruction)
        )


def attention_flops(instruction: Instruction) -> float:
    """Of cuDNN's flash attention: two products of B·N·T·S·H forward, and backward five, of which one makes the scores
    again (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2).

    With a mask (its causal kind, or an additive one: our boolean masks of documents and positions) it is taken for
    causal, the queries being the last T of S: of T·S pairs T·S - T·(T-1)/2 are let through. cuDNN skips the rest only
    where the mask is its causal kind; with an additive mask it computes all pairs.
    """
    backward = "Backward" in instruction.target
    B, T, N, H, S = _sizes_of_attention(instruction)
    masked = "Bias" in instruction.target or "CAUSAL" in instruction.attributes.get("backend_config", "")
    pairs = T * S - (T * (T - 1) / 2 if masked else 0)
    return (10 if backward else 4) * B * N * H * pairs


def _sizes_of_attention(instruction: Instruction) -> tuple[int, int, int, int, int]:
    """B, T, N, H and S."""
    q, k, *_ = parse_shape(f"({instruction.attributes['operand_layout_constraints'][1:-1]})").parts
    B, T, N, H = q.dims
    return B, T, N, H, k.dims[1]


def _dot(lhs: Shape, rhs: Shape, instruction: Instruction) -> Product:
    return _product(
        lhs,
        rhs,
        instruction.numbers("lhs_batch_dims"),
        instruction.numbers("lhs_contracting_dims"),
        "highest" in instruction.attributes.get("operand_precision", ""),
    )


def _library_product(lhs: Shape, rhs: Shape, instruction: Instruction) -> Product:
    config = instruction.attributes.get("backend_config", "")

    def dims(name: str) -> tuple[int, ...]:
        found = re.search(rf'"{name}":\[([^\]]*)\]', config)
        return tuple(map(int, re.findall(r"\d+", found[1]))) if found else ()

    exact = "HIGHEST" in config
    return _product(lhs, rhs, dims("lhs_batch_dimensions"), dims("lhs_contracting_dimensions"), exact)


def _product(lhs: Shape, rhs: Shape, batch_dims: tuple[int, ...], depth_dims: tuple[int, ...], exact: bool) -> Product:
    batch, k = (math.prod(lhs.dims[each] for each in dims) for dims in (batch_dims, depth_dims))
    number_format = "tf32" if lhs.dtype == "f32" and not exact else lhs.dtype
    return Product(batch, lhs.elements // (batch * k), rhs.elements // (batch * k), k, number_format)
