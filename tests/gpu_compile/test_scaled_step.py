"""A whole training step with products in 8 bits, compiled for H20s and A100s: each product with a weight is counted in
that format, and so charged at the chip's rate for it.

Needs the CUDA plugin; skipped without. Run as tests/gpu_compile/test_gpu_compile.py is.
"""

from collections import Counter
from dataclasses import replace

import pytest

from moe.model.execution import Execution
from moe.model.precision import Precision
from moe.planner.chips import A100, H20
from moe.planner.compile import compile_job
from moe.planner.count import count, key_blocks
from moe.planner.efficiency import peak
from moe.planner.job import Job
from moe.planner.routing import routed_rows
from parallel.mesh import MeshConfig
from parallel.network.cluster import Cluster
from tests.gpu_compile.target import needs_plugin
from tests.gpu_compile.test_count import MODEL, PER_NODE, D, F, H, K, M, N, T, V

pytestmark = needs_plugin

L = 2
FORWARD = {
    "attention": 2 * T * D * (2 * L * N * H + 2 * M * H),
    "shared_expert": L * 2 * T * 3 * D * F,
    "experts": L * 2 * T * K * 3 * D * F,
    "head": 2 * T * D * V,
}


@pytest.mark.parametrize(("chip", "precision"), [
    (H20, Precision(matmuls="fp8")),
    (H20, Precision(matmuls="fp8", scaling="delayed")),
    (A100, Precision(matmuls="int8", scaling="row")),
], ids=["H20 fp8", "H20 fp8 delayed", "A100 int8"])  # fmt: skip
def test_products_with_weights_are_in_8_bits(chip, precision, tmp_path):
    job = Job(
        "train", replace(MODEL, num_layers=L), 8, T,
        mesh=MeshConfig(data=4, expert=2), precision=precision, execution=Execution(remat="none"),
    )  # fmt: skip
    compiled = compile_job(job, chip, Cluster(nodes=1, gpus_per_node=PER_NODE), cache=tmp_path)
    given = {"routed_rows": routed_rows(job, PER_NODE), "key_blocks": key_blocks(job)}
    work = count(compiled.program(), job.mesh, PER_NODE, **given)
    narrow: Counter = Counter()
    wide = set()
    for times, run in work.runs():
        if run.kind in ("matmul", "grouped_matmul"):
            if run.format in ("f8e4m3fn", "f8e5m2", "s8"):
                narrow[run.use, run.backward] += times * run.flops
                assert peak(chip, run.format) == 2 * chip.bf16
            else:
                wide.add(run.use)
    for use, flops in FORWARD.items():
        assert narrow[use, False] == pytest.approx(flops, rel=0.01)
        assert narrow[use, True] == pytest.approx(2 * flops, rel=0.01)
    assert wide == {"router"}
