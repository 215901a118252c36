"""What a limit on a chip, or on what joins chips, does to a step: hypothetical machines, and the same work on each.

Nothing is compiled anew: the work of a step is that of a real plan, and only what it is timed on differs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moe.planner.chips import Chip
from moe.planner.estimate import idle_share
from moe.planner.plan import Plan
from moe.planner.predict import predict
from parallel.network.cluster import Cluster

Machine = tuple[Chip, Cluster]


@dataclass(frozen=True)
class Point:
    """value: of the limited figure. slower: how many times as long a step takes as the one compared with."""

    value: float
    slower: float


def with_tpp(chip: Chip, tpp: float) -> Chip:
    """`chip` with all arithmetic scaled to this total processing performance, and its watts with it."""
    factor = tpp / chip.tpp
    rates = {name: factor * getattr(chip, name) for name in ("bf16", "fp16", "fp8", "int8", "tf32", "fp32", "watts")}
    return replace(chip, name=f"{chip.name} of TPP {tpp:,.0f}", **rates)


def with_bandwidth(chip: Chip, bandwidth: float) -> Chip:
    """`chip` with memory of this bandwidth, bytes/s."""
    return replace(chip, name=f"{chip.name} of {bandwidth / 1e12:g} TB/s", bandwidth=bandwidth)


def with_link(chip: Chip, rate: float) -> Chip:
    """`chip` with links inside the node of this rate, bytes/s per direction."""
    return replace(chip, name=f"{chip.name} of {rate / 1e9:g} GB/s", link_rate=rate)


def with_memory(chip: Chip, memory: int) -> Chip:
    """`chip` with so many bytes of memory."""
    return replace(chip, name=f"{chip.name} of {memory / 2**30:.0f} GiB", memory=memory)


def sweep(plan: Plan, machines: Callable[[float], Machine], values: Sequence[float], base: float) -> list[Point]:
    """The plan's work on the machine of each value, in units of `base` seconds."""
    return [Point(value, step_seconds(plan, *machines(value)) / base) for value in values]


def step_seconds(plan: Plan, chip: Chip, cluster: Cluster) -> float:
    """A step of the plan's work on another machine of as many GPUs."""
    return predict(
        plan.work, chip, cluster, tokens=plan.job.tokens, model_flops=plan.model_flops, idle=idle_share(plan.job)
    ).seconds
