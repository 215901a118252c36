"""Stand-in until the real one is merged."""

from moe.planner.chips import Chip
from moe.planner.job import Job
from moe.planner.work import Memory


def estimate_memory(job: Job, chip: Chip, devices_per_node: int) -> Memory:
    size = 1 << 30
    return Memory({"parameters": size}, size, size, 0, (), ((0.0, size), (1.0, size)), "estimated")
