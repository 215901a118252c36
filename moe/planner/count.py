"""From the optimized and scheduled HLO of a program to its `Work`: what runs, what is transferred, how often.

What XLA's passes have done is counted as it stands: a loop unrolled for double buffering has half as many turns, each
with two bodies, and a turn peeled off stands before it.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from moe.ops.attention.chunked import BLOCK
from moe.planner.hlo import HOST_MEMORY, Computation, Instruction, Module, Shape, parse
from moe.planner.job import Job
from moe.planner.kernels import CountError, Kernels
from moe.planner.scopes import purpose
from moe.planner.traffic import FREE, traffic
from moe.planner.transfers import COLLECTIVES, Fabric, Journey, collective, to_host
from moe.planner.work import Event, Loop, Start, Transfer, TransferKind, Wait, Work
from parallel.loops import TURNS
from parallel.mesh import MeshConfig


def count(
    text: str,
    mesh: MeshConfig,
    devices_per_node: int,
    *,
    routed_rows: float | None = None,
    key_blocks: float | None = None,
) -> Work:
    """
    Of a conditional the branch with most work is counted, as on the device that all others wait for.

    Args:
        text: HLO, after optimization and scheduling.
        routed_rows: that one grouped product works on, and one ragged exchange sends, in the mean when the router is
            even (`moe.planner.routing.routed_rows`); None: as many as the buffers hold.
        key_blocks: turns, in the mean, of loops in the attention whose number XLA does not know: those of chunked
            attention over keys (`key_blocks`).

    Raises:
        HloError: the text cannot be read.
        CountError: it holds a loop, or a library call, of which the work is not known.
    """
    module = parse(text)
    counter = _Counter(module, Kernels(module, routed_rows), Fabric(mesh, devices_per_node), routed_rows, key_blocks)
    return Work(tuple(counter.events(module.entry)), "compiled")


def key_blocks(job: Job) -> float:
    """Blocks of keys that chunked attention meets for a block of queries, in the mean, where a document fills the
    sequence: half of them for causality, and all that a cache holds in decoding. Where a ring goes round, in each of
    its chunks."""
    if job.kind == "decode":
        return math.ceil(job.sequence_length / BLOCK)
    # moe/ops/attention/ring.py cuts the sequence into two chunks for each device.
    chunks = 2 * job.mesh.sequence if job.layout.sequence == "ring" and job.mesh.sequence > 1 else 1
    blocks = chunks * math.ceil(job.sequence_length / chunks / BLOCK)
    return (blocks + 1) / 2 / chunks


@dataclass(frozen=True)
class _Counter:
    module: Module
    kernels: Kernels
    fabric: Fabric
    routed_rows: float | None
    key_blocks: float | None

    def events(self, computation: Computation) -> Iterator[Event]:
        """In the order in which they are scheduled."""
        begun: set[str] = set()
        for each in computation.instructions.values():
            if each.opcode == "while":
                yield self._loop(computation, each)
            elif each.opcode == "conditional":
                yield from self._heaviest([tuple(self.events(branch)) for branch in self.module.called(each)])
            elif each.opcode == "call":
                yield from self.events(self.module.called(each)[0])
            elif each.opcode.endswith("-done"):
                if each.operands[0] in begun:
                    yield Wait(each.operands[0])
            elif each.opcode not in FREE:
                for event in self._work(computation, each):
                    if isinstance(event, Start) and not _is_synchronous(each):
                        begun.add(each.name)
                    yield event

    def _work(self, computation: Computation, each: Instruction) -> Iterator[Event]:
        journey = self._journey(computation, each)
        if journey is not None:
            yield Start(self._transfer(computation, each, journey))
            if _is_synchronous(each):
                yield Wait(each.name)
        elif each.opcode == "async-start":
            yield from self.events(self.module.called(each)[0])
        else:
            run = self.kernels.run(computation, each)
            if run is not None:
                yield run

    def _loop(self, computation: Computation, each: Instruction) -> Loop:
        times: float | None = each.trip_count or _told(each) or self._limit(each)
        if times is None and purpose(self.module, computation, each).use == "attention":
            times = self.key_blocks
        if times is None:
            raise CountError(
                f"{each.name} ({each.op_name or 'without a name'}): how often this loop runs is not known to XLA; "
                "use a computation whose loops have a fixed length, or for chunked attention give key_blocks"
            )
        body = self.module.computations[each.attributes["body"].lstrip("%")]
        return Loop(times, tuple(self.events(body)))

    def _limit(self, each: Instruction) -> int | None:
        """Of a loop that counts from 0 up to a constant, which XLA does not always tell: the constant, where the loop's
        condition has but one."""
        condition = self.module.computations[each.attributes["condition"].lstrip("%")]
        inside = [condition, *(part for use in condition.instructions.values() for part in self.module.called(use))]
        found = [use for part in inside for use in part.instructions.values()]
        compared = [use for use in found if use.opcode == "compare" and use.attributes.get("direction") == "LT"]
        limits = {use.literal for use in found if use.opcode == "constant" and use.shape.dtype == "s32"}
        return int(limits.pop()) if len(compared) == 1 and len(limits) == 1 else None

    def _heaviest(self, branches: list[tuple[Event, ...]]) -> tuple[Event, ...]:
        def weight(branch: tuple[Event, ...]) -> tuple[float, float]:
            work = Work(branch, "compiled")
            return work.flops, work.bytes

        return max(branches, key=weight, default=())

    def _journey(self, computation: Computation, each: Instruction) -> Journey | None:
        """None where nothing leaves the device."""
        kind = next((kind for kind in COLLECTIVES if each.opcode in (kind, f"{kind}-start")), None)
        if kind is not None:
            return collective(each, kind, self._size(computation, each, kind), self.fabric)
        if each.opcode == "async-start":
            inside = self.module.called(each)[0]
            return self._journey(inside, inside.root)
        return self._to_host(computation, each)

    def _size(self, computation: Computation, each: Instruction, kind: TransferKind) -> float:
        operands = [operand.shape for operand in computation.operands(each)]
        if kind == "all-gather":
            return (each.shape.parts[1] if each.opcode.endswith("-start") else each.shape).bytes
        if kind == "ragged-all-to-all":
            rows = operands[0].dims[0]
            return operands[0].bytes * min(1.0, (rows if self.routed_rows is None else self.routed_rows) / rows)
        return sum(shape.bytes for shape in operands)

    def _to_host(self, computation: Computation, each: Instruction) -> Journey | None:
        """Of what the host's memory is written or read by it, whichever it is."""
        if each.opcode in FREE or each.target == "AllocateBuffer":
            return None
        operands = [operand.shape.space == HOST_MEMORY for operand in computation.operands(each)]
        result = any(leaf.space == HOST_MEMORY for leaf in _result(each).leaves)
        if not result and not any(operands):
            return None
        moved = traffic(self.module, computation, each)
        if result:
            return to_host("to-host", _result(each).bytes if each.opcode == "copy-start" else moved.written)
        return to_host("to-device", sum(size for size, host in zip(moved.read, operands, strict=True) if host))

    def _transfer(self, computation: Computation, each: Instruction, journey: Journey) -> Transfer:
        use, recomputed, backward = purpose(self.module, computation, each)
        return Transfer(
            each.name, use, journey.kind, journey.axes, journey.devices, journey.nodes, journey.inside, journey.across,
            recomputed, backward, self.module.source(each),
        )  # fmt: skip


def _result(each: Instruction) -> Shape:
    """The shape of what it makes: of an asynchronous one the second part of (operands, results, …)."""
    if each.opcode.endswith("-start") and len(each.shape.parts) > 1:
        return each.shape.parts[0] if each.opcode == "copy-start" else each.shape.parts[1]
    return each.shape


def _told(each: Instruction) -> int | None:
    """Of a loop of `parallel.loops`, whose scope says it."""
    found = re.search(rf"\b{TURNS}(\d+)/while$", each.op_name)
    return int(found[1]) if found else None


def _is_synchronous(each: Instruction) -> bool:
    """Whether nothing runs beside it."""
    return not each.opcode.endswith("-start") or '"is_sync":true' in each.attributes.get("backend_config", "")
