import pytest

from moe.planner.totals import flops_by_format, spent_by_use
from tests.moe.planner.handmade import WORK
from tests.moe.planner.handmade_plan import handmade_plan


def test_arithmetic_by_use():
    uses = {each.use: each for each in spent_by_use(WORK)}
    assert list(uses) == ["experts", "attention", "head", "optimizer"]
    experts = uses["experts"]
    assert (experts.forward, experts.backward, experts.recomputed, experts.bytes) == (32e12, 0, 32e12, 16e9)
    assert experts.flops == 64e12
    assert sum(each.flops for each in uses.values()) == WORK.flops == 76.001e12
    assert sum(each.bytes for each in uses.values()) == WORK.bytes == 31e9


def test_products_by_format():
    assert flops_by_format(WORK) == {"bf16": 76e12}


def test_exchanges_are_told_by_kind_and_axes():
    exchanges = {(each.kind, each.axes): each for each in handmade_plan().exchanges}
    assert set(exchanges) == {
        ("all-gather", ("data",)),
        ("all-to-all", ("expert",)),
        ("ragged-all-to-all", ("expert",)),
    }
    gather = exchanges["all-gather", ("data",)]
    assert (gather.count, gather.inside, gather.across, gather.uses) == (4, 0, 120e6, ("dense",))
    assert (gather.devices, gather.nodes) == (16, 16)
    assert gather.exposed == 0  # 2 TFLOP go on beside it
    assert gather.hidden > 0
    dispatch = exchanges["all-to-all", ("expert",)]
    assert dispatch.hidden == pytest.approx(0)  # waited for at once
    assert dispatch.exposed > 4 * 60e6 / 450e9
