"""How many rows the router sends to a device: in the mean, and to the worst one, for which all others wait."""

import math
from dataclasses import dataclass
from typing import Literal

from moe.planner.job import Job
from moe.planner.sizes import Sizes

LOADS = (1.0, 1.5, 2.0, 4.0)
"""Rows that choose the worst device's experts, times the mean over devices."""


def routed_rows(job: Job, devices_per_node: int) -> float:
    """That a device's experts work on at a time, where the router is even: of one layer, microbatch and chunk."""
    factor = job.model.router.capacity_factor
    rows = Sizes(job, devices_per_node).rows / job.execution.exchange_chunks
    return rows * min(1.0, math.inf if factor is None else factor)


@dataclass(frozen=True)
class Skew:
    """A router that sends one device `load` times the mean, and shares the rest evenly over the others.

    devices: that share out the experts. kept: rows that the worst device takes, times the mean: capacity may hold it
        below `load`. over: share of all rows that are over capacity. fate: what becomes of them.
    """

    load: float
    devices: int
    kept: float
    over: float
    fate: Literal["dropped", "recycled"]


def skew_of(job: Job, load: float) -> Skew | None:
    """None where no router does that: a device cannot have more than all rows, nor a model without experts have any.

    An expert takes at most its capacity of the rows of each sequence, here of each sequence alike (RouterConfig).
    """
    sizes = job.mesh.sizes
    devices = math.prod(sizes[axis] for axis in job.layout.experts)
    if not job.model.has_moe or load > devices:
        return None
    router = job.model.router
    factor = math.inf if router.capacity_factor is None else router.capacity_factor
    others = (devices - load) / (devices - 1) if devices > 1 else load
    over = max(0.0, load - factor) + (devices - 1) * max(0.0, others - factor)
    fate: Literal["dropped", "recycled"] = "recycled" if router.overflow == "recycle" else "dropped"
    return Skew(load, devices, min(load, factor), over / devices, fate)
