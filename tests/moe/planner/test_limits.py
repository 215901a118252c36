from dataclasses import replace

import pytest

from moe.model.presets import HUNYUAN_LARGE
from moe.planner.chips import H20, H100
from moe.planner.job import Job
from moe.planner.limits import step_seconds, sweep, with_bandwidth, with_link, with_tpp
from moe.planner.plan import Plan, make_plan
from parallel.mesh import MeshConfig
from parallel.network.cluster import Cluster

CLUSTER = Cluster(nodes=4)


@pytest.fixture(scope="module")
def plan() -> Plan:
    job = Job("train", replace(HUNYUAN_LARGE, num_layers=4), 64, 4096, mesh=MeshConfig(data=2, expert=16))
    return make_plan(job, H20, CLUSTER, estimated=True)


def test_a_chip_of_its_own_figures_is_the_chip():
    assert with_tpp(H20, H20.tpp).bf16 == pytest.approx(H20.bf16)
    assert with_tpp(H20, 2 * H20.tpp).tpp == pytest.approx(2 * H20.tpp)
    assert with_tpp(H100, H20.tpp).bandwidth == H100.bandwidth, "nothing but arithmetic"


def test_less_of_anything_is_never_faster(plan):
    machines = {
        "tpp": lambda share: (with_tpp(H20, share * H20.tpp), CLUSTER),
        "bandwidth": lambda share: (with_bandwidth(H20, share * H20.bandwidth), CLUSTER),
        "link": lambda share: (with_link(H20, share * H20.link_rate), CLUSTER),
        "cards": lambda share: (H20, replace(CLUSTER, nic_rate=share * CLUSTER.nic_rate)),
    }
    for name, machine in machines.items():
        slower = [each.slower for each in sweep(plan, machine, [4, 1, 0.5, 0.1, 0.01], plan.prediction.seconds)]
        assert slower == sorted(slower), name
        assert slower[1] == pytest.approx(1)
        assert slower[-1] > 1, name


def test_arithmetic_of_a_tenth_takes_ten_times_as_long_where_nothing_else_binds(plan):
    tenth = step_seconds(plan, with_tpp(H20, 1e-2 * H20.tpp), CLUSTER)
    hundredth = step_seconds(plan, with_tpp(H20, 1e-3 * H20.tpp), CLUSTER)
    assert hundredth / tenth == pytest.approx(10, rel=0.02)
