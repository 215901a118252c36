from dataclasses import replace

import pytest

from moe.model.config import RouterConfig
from moe.model.presets import TINY
from moe.planner.job import Job
from moe.planner.routing import routed_rows, skew_of
from parallel.mesh import MeshConfig

JOB = Job("train", TINY, batch_size=32, sequence_length=256, mesh=MeshConfig(data=2, expert=4))


def job(**router) -> Job:
    return replace(JOB, model=replace(TINY, router=RouterConfig(**router)))


def thrown_over(load: float, devices: int, factor: float, rows: int = 10_000) -> tuple[float, float]:
    """(rows of the worst device in means, share over capacity), counted row by row."""
    mean = rows // devices
    first = int(load * mean)
    counts = [first, *[(rows - first) // (devices - 1)] * (devices - 1)]
    kept = [min(count, int(factor * mean)) for count in counts]
    return kept[0] / mean, (sum(counts) - sum(kept)) / rows


@pytest.mark.parametrize("load", [1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25, 2.0])
def test_capacity_holds_the_worst_device_down(load, factor):
    skew = skew_of(job(capacity_factor=factor), load)
    kept, over = thrown_over(load, 4, factor)
    assert skew.kept == pytest.approx(kept, abs=2e-3)
    assert skew.over == pytest.approx(over, abs=2e-3)
    assert skew.fate == "dropped"


def test_dropless_routing_takes_all():
    skew = skew_of(JOB, 4.0)
    assert (skew.kept, skew.over) == (4.0, 0.0)


def test_recycled_rows_are_told_apart_from_dropped_ones():
    assert skew_of(job(capacity_factor=1.25, overflow="recycle"), 2.0).fate == "recycled"


def test_a_device_cannot_have_more_than_all_rows():
    assert skew_of(replace(JOB, mesh=MeshConfig(data=4, expert=2)), 4.0) is None
    assert skew_of(replace(JOB, model=replace(TINY, num_experts=0, num_shared_experts=0, d_dense=64)), 1.0) is None


def test_rows_of_a_device():
    assert routed_rows(JOB, 8) == 4 * 256  # 32 sequences over 8 devices
    assert routed_rows(replace(job(top_k=2), microbatches=2), 8) == 2 * 256 * 2
    assert routed_rows(job(capacity_factor=0.5), 8) == 4 * 256 / 2
    assert routed_rows(replace(JOB, execution=replace(JOB.execution, exchange_chunks=4)), 8) == 256
    assert routed_rows(replace(JOB, kind="decode"), 8) == 4
