"""The analytic estimate of memory against what XLA allocates, on the first layouts that the benchmark draws.

Needs the CUDA plugin; skipped without. Run as tests/gpu_compile/test_gpu_compile.py is.
"""

import random

import pytest

from benchmarks.plan_memory import random_job
from moe.planner.chips import H20
from moe.planner.compile import compile_job
from moe.planner.estimate_memory import estimate_memory
from moe.planner.target import can_compile
from parallel.network.cluster import Cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_compile(), reason="the CUDA plugin is not installed: `make plan-setup`"),
]


def test_estimate_is_within_a_tenth_of_what_xla_allocates(tmp_path):
    draw = random.Random(104)
    for job in [random_job(draw) for _ in range(4)]:
        compiled = compile_job(job, H20, Cluster(nodes=job.mesh.num_devices // 8), cache=tmp_path)
        assert estimate_memory(job, H20, 8).allocated == pytest.approx(compiled.facts.allocated, rel=0.1)
