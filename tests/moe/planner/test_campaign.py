from types import SimpleNamespace
from typing import Any

import pytest

from moe.planner.campaign import Campaign


def plan_of(seconds: float, tokens: int, devices: int, watts: float) -> Any:
    """A plan as far as a campaign reads it."""
    return SimpleNamespace(
        job=SimpleNamespace(tokens=tokens),
        prediction=SimpleNamespace(seconds=seconds, low=0.9 * seconds, high=1.2 * seconds),
        devices=devices,
        chip=SimpleNamespace(watts=watts),
        cluster=SimpleNamespace(gpus_per_node=8),
    )


def test_days_and_energy():
    # 1e6 steps of 8.64 s are 100 days.
    campaign = Campaign(plan_of(8.64, 1000, 16, 500.0), 1e9)
    assert campaign.steps == 1e6
    assert campaign.days == pytest.approx(100)
    assert campaign.days_range == pytest.approx((90, 120))
    assert campaign.gpu_days == pytest.approx(1600)
    assert campaign.megawatt_hours == pytest.approx(1600 * 24 * 500 / 1e6)


@pytest.mark.parametrize(("days", "gpus"), [(100, 16), (50, 32), (99, 24), (200, 8), (1e9, 8)])
def test_gpus_for_a_deadline_are_whole_nodes(days, gpus):
    assert Campaign(plan_of(8.64, 1000, 16, 500.0), 1e9).gpus_for(days) == gpus
