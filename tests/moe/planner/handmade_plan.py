"""A plan of the step in handmade.py: eight H20s, one node, experts over four of them."""

from moe.model.presets import TINY
from moe.planner.chips import CHIPS
from moe.planner.compile import Facts
from moe.planner.job import Job
from moe.planner.plan import Plan, planned
from parallel.mesh import MeshConfig
from parallel.network.cluster import Cluster
from tests.moe.planner.handmade import MEMORY, WORK

JOB = Job("train", TINY, batch_size=16, sequence_length=256, mesh=MeshConfig(data=2, expert=4))
FACTS = Facts(
    arguments=1, outputs=1, aliased=1, temporaries=1, peak=1, host=0, seconds=30.2, resident=int(1.75 * 2**30),
    jax="0.10.2",
)  # fmt: skip


def handmade_plan() -> Plan:
    return planned(JOB, CHIPS["h20"], Cluster(), WORK, MEMORY, FACTS)
