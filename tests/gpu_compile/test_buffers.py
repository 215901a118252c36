"""Memory read from XLA's buffer assignment against what XLA itself says of the program, to the byte.

Needs the CUDA plugin; skipped without. Run as tests/gpu_compile/test_gpu_compile.py is.
"""

from dataclasses import replace

import pytest

from moe.model.config import ModelConfig, RouterConfig
from moe.model.execution import Execution
from moe.planner.buffers import memory_of
from moe.planner.chips import H20
from moe.planner.compile import compile_job
from moe.planner.estimate_memory import estimate_memory
from moe.planner.job import Job
from moe.planner.target import can_compile
from parallel.layout import LayoutConfig
from parallel.mesh import MeshConfig
from parallel.network.cluster import Cluster

pytestmark = pytest.mark.skipif(not can_compile(), reason="the CUDA plugin is not installed: `make plan-setup`")

MODEL = ModelConfig(
    vocab_size=8192, d_model=512, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=64, num_experts=8, d_expert=1024,
    cla_factor=2, router=RouterConfig(top_k=2),
)  # fmt: skip
JOBS = {
    "train": Job("train", MODEL, 16, 1024, mesh=MeshConfig(data=2, expert=4), execution=Execution(remat="full")),
    "stages": Job(
        "train", MODEL, 16, 1024, mesh=MeshConfig(stage=2, expert=2, tensor=2), microbatches=4,
        layout=LayoutConfig(zero=2), execution=Execution(attention="chunked"),
    ),
    "on the host": Job(
        "train", MODEL, 16, 1024, mesh=MeshConfig(data=2, expert=4), layout=LayoutConfig(optimizer_states="host"),
        execution=Execution(remat="matmuls"),
    ),
    "decode": Job("decode", MODEL, 32, 4096, mesh=MeshConfig(data=2, expert=4)),
}  # fmt: skip


@pytest.fixture(scope="module", params=JOBS)
def compiled(request, tmp_path_factory):
    return compile_job(JOBS[request.param], H20, Cluster(), cache=tmp_path_factory.mktemp("plan"))


def test_peak_and_allocation_are_xlas_own(compiled):
    memory = memory_of(compiled)
    facts = compiled.facts
    # XLA's own peak takes in what waits in the hosts' memory.
    assert (memory.peak + memory.host, memory.allocated, memory.host) == (facts.peak, facts.allocated, facts.host)
    assert sum(memory.parts.values()) == memory.peak
    assert max(size for _, size in memory.over_program) == memory.peak


def test_states_are_what_the_arguments_take(compiled, request):
    """Adam keeps two numbers for each parameter, on the device or on the host, and counts the steps. In ZeRO's stage 2
    devices share out more of the states than of the parameters."""
    memory = memory_of(compiled)
    job = JOBS[request.node.callspec.params["compiled"]]
    parts = memory.parts
    if compiled.facts.host:
        assert parts["optimizer_states"] < 64
        assert memory.host == pytest.approx(2 * parts["parameters"], rel=1e-3)
    elif "optimizer_states" in parts:
        assert parts["optimizer_states"] == pytest.approx(
            estimate_memory(job, H20, 8).parts["optimizer_states"], rel=1e-3
        )
        if job.layout.zero == 3:
            assert parts["optimizer_states"] == pytest.approx(2 * parts["parameters"], rel=1e-2)
    else:
        assert parts["cache"] > 0
        assert {"gradients", "activations"}.isdisjoint(parts)
    kept = sum(parts.get(part, 0) for part in ("parameters", "optimizer_states", "cache", "batch"))
    assert kept == compiled.facts.arguments


def test_largest_buffers_say_where_they_began(tmp_path):
    job = replace(JOBS["train"], execution=Execution(remat="none"))
    memory = memory_of(compile_job(job, H20, Cluster(), cache=tmp_path))
    assert [each.bytes for each in memory.largest] == sorted((each.bytes for each in memory.largest), reverse=True)
    saved = [each for each in memory.largest if each.part == "activations"]
    assert any(each.source.startswith("moe/model/experts.py") for each in saved)
