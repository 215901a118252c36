"""What is counted in programs compiled for H20s, against counts by hand.

Needs the CUDA plugin; skipped without. Run as tests/gpu_compile/test_gpu_compile.py is.
"""

import math
from collections import Counter

import pytest

from moe.model.config import ModelConfig, RouterConfig
from moe.model.execution import Execution
from moe.planner.chips import H20
from moe.planner.compile import compile_job
from moe.planner.count import count, key_blocks
from moe.planner.job import Job
from moe.planner.routing import routed_rows
from moe.planner.work import Work
from parallel.mesh import MeshConfig
from parallel.network.cluster import Cluster
from tests.gpu_compile.target import needs_plugin

pytestmark = needs_plugin

V, D, L, N, M, H, E, F, K = 4096, 512, 4, 8, 2, 64, 8, 1024, 2
T, GROUP, CAPACITY = 1024, 2, 1.25
MODEL = ModelConfig(
    vocab_size=V, d_model=D, num_layers=L, num_heads=N, num_kv_heads=M, head_dim=H, num_experts=E, d_expert=F,
    num_shared_experts=1, cla_factor=GROUP, router=RouterConfig(top_k=K, capacity_factor=CAPACITY),
    tie_embeddings=True,
)  # fmt: skip
PER_NODE = 8
JOBS = {
    "none": Job("train", MODEL, 8, T, mesh=MeshConfig(data=4, expert=2), execution=Execution(remat="none")),
    "full": Job("train", MODEL, 16, T, mesh=MeshConfig(data=4, expert=4), execution=Execution(remat="full")),
}  # fmt: skip


@pytest.fixture(scope="module", params=JOBS)
def counted(request, tmp_path_factory) -> tuple[Job, Work]:
    job = JOBS[request.param]
    cluster = Cluster(nodes=job.mesh.num_devices // PER_NODE, gpus_per_node=PER_NODE)
    compiled = compile_job(job, H20, cluster, cache=tmp_path_factory.mktemp("plan"))
    given = {"routed_rows": routed_rows(job, PER_NODE), "key_blocks": key_blocks(job)}
    return job, count(compiled.program(), job.mesh, PER_NODE, **given)


def forward_flops() -> dict[str, float]:
    """Of the products of one device, which has one sequence."""
    groups = L // GROUP
    return {
        "attention": 2 * T * D * (2 * L * N * H + 2 * groups * M * H) + L * 4 * N * H * T * (T + 1) / 2,
        "shared_expert": L * 2 * T * 3 * D * F,
        "experts": L * 2 * T * K * 3 * D * F,
        "router": L * 2 * T * D * E,
        "head": 2 * T * D * V,
    }


def test_products_by_use(counted):
    job, work = counted
    found: dict[str, Counter] = {"forward": Counter(), "backward": Counter(), "recomputed": Counter()}
    for times, run in work.runs():
        if run.kind in ("matmul", "grouped_matmul", "attention"):
            way = "recomputed" if run.recomputed else "backward" if run.backward else "forward"
            found[way][run.use] += times * run.flops
    forward = forward_flops()
    backward = {use: 2 * flops for use, flops in forward.items()}
    # cuDNN makes the scores once more.
    backward["attention"] += L * 2 * N * H * T * (T + 1) / 2
    assert found["forward"] == pytest.approx(forward, rel=0.01)
    assert found["backward"] == pytest.approx(backward, rel=0.01)
    if job.execution.remat == "none":
        assert not found["recomputed"]
        return
    again = {use: flops for use, flops in forward.items() if use != "head"}
    # The last thing that a group of layers computes is not needed again.
    again["shared_expert"] -= L / GROUP * 2 * T * D * F
    assert found["recomputed"] == pytest.approx(again, rel=0.01)


def test_bytes_of_collectives(counted):
    """All weights come once for the forward pass and once for the backward pass, in bfloat16, the router's and the
    embedding in float32; the embedding comes once, and as the head as well, in bfloat16. The gradients leave once in
    bfloat16, those of the router, the embedding and the head in float32."""
    job, work = counted
    devices, experts = job.mesh.num_devices, job.mesh.expert
    matrices = 2 * (L * (2 * D * N * H + 3 * D * F) + L // GROUP * 2 * D * M * H)
    router, embedding = 4 * L * D * E, 4 * V * D
    expert_weights = 2 * L * E // experts * 3 * D * F
    slots = math.ceil(CAPACITY * K * T / E)
    rows = 2 * experts * min(T * K, E // experts * slots) * D
    # There and back in each pass, and the gradients.
    journeys = L * (2 * (2 if job.execution.remat == "full" else 1) + 2)

    def shares(size: float, among: int) -> float:
        return size * (among - 1) / among

    expected = {
        ("all-gather", ("data", "expert")): shares(2 * (matrices + router) + embedding + embedding / 2, devices),
        ("reduce-scatter", ("data", "expert")): shares(matrices + router + 2 * embedding, devices),
        ("all-gather", ("data",)): shares(2 * expert_weights, job.mesh.data),
        ("reduce-scatter", ("data",)): shares(expert_weights, job.mesh.data),
        ("all-to-all", ("expert",)): shares(journeys * rows, experts),
    }
    found: Counter = Counter()
    for times, transfer in work.transfers():
        # Of n devices, p of each node, a ring sends inside what it would on one node, and across once more a share.
        if transfer.inside:
            found[transfer.kind, transfer.axes] += times * transfer.inside
        else:
            found[transfer.kind, transfer.axes] += times * transfer.across
    for which, size in expected.items():
        assert found[which] == pytest.approx(size, rel=0.01), which
    # What else is summed are numbers, vectors and counts.
    assert sum(size for which, size in found.items() if which not in expected) < 0.01 * sum(found.values())


def test_transfers_to_and_from_the_host(tmp_path):
    job = Job(
        "train", MODEL, 8, T, mesh=MeshConfig(data=4, expert=2), execution=Execution(remat="matmuls_on_host")
    )  # fmt: skip
    compiled = compile_job(job, H20, Cluster(), cache=tmp_path)
    work = count(compiled.program(), job.mesh, PER_NODE, routed_rows=routed_rows(job, PER_NODE))
    there, back = (
        sum(times * each.inside for times, each in work.transfers() if each.kind == kind)
        for kind in ("to-host", "to-device")
    )
    # In bfloat16 q, o, the shared expert's gate and up, and k and v of each group; its output, but for the last that
    # a group computes; in float32 the router's logits.
    kept = 2 * T * (L * (N * H + D + 2 * F) + (L - L // GROUP) * D + L // GROUP * 2 * M * H) + 4 * T * L * E
    assert there == pytest.approx(kept, rel=0.01)
    assert back == pytest.approx(kept, rel=0.01)
