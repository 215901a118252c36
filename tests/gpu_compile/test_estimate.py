"""Estimates against what XLA compiles: FLOPs within 3%, bytes over each class of links within 15%."""

import re
from dataclasses import replace

import pytest

from moe.model.config import ModelConfig, RouterConfig
from moe.model.execution import Execution
from moe.model.precision import Precision
from moe.planner.chips import H20
from moe.planner.compile import compile_job
from moe.planner.count import count
from moe.planner.estimate import estimate_work
from moe.planner.job import Job
from moe.planner.routing import routed_rows
from parallel.layout import LayoutConfig
from parallel.mesh import MeshConfig
from parallel.network.cluster import Cluster
from tests.gpu_compile.target import needs_plugin

pytestmark = needs_plugin

MODEL = ModelConfig(16384, 2048, 8, 16, 8, 128, 16, 4096, num_shared_experts=1, router=RouterConfig(top_k=2))
CAPPED = replace(MODEL, cla_factor=2, router=RouterConfig(top_k=1, capacity_factor=1.25))
RAGGED = Execution(exchange="ragged", remat="full")

JOBS = {
    "sharded over data and experts": Job(
        "train", MODEL, 64, 2048, execution=RAGGED, mesh=MeshConfig(data=16, expert=4)
    ),
    "copies, capacity, shared keys": Job(
        "train", CAPPED, 64, 2048, execution=Execution(remat="full"), mesh=MeshConfig(replica=2, data=4, expert=8)
    ),
    "tensor, nothing recomputed": Job(
        "train", MODEL, 32, 2048, execution=Execution(exchange="ragged"), mesh=MeshConfig(data=4, expert=2, tensor=4)
    ),
    "optimizer states alone": Job(
        "train", MODEL, 64, 2048, execution=RAGGED, mesh=MeshConfig(data=4, expert=8), layout=LayoutConfig(zero=1),
        microbatches=2,
    ),
    "decoding": Job("decode", MODEL, 64, 8192, mesh=MeshConfig(expert=8, tensor=2)),
}  # fmt: skip


def over_links(work):
    """Bytes of one device inside its node, and across."""
    transfers = list(work.transfers())
    return sum(t * x.inside for t, x in transfers), sum(t * x.across for t, x in transfers)


@pytest.mark.parametrize("name", JOBS)
def test_an_estimate_is_close_to_the_compiled_program(name, tmp_path):
    job = JOBS[name]
    compiled = compile_job(job, H20, Cluster(nodes=job.mesh.num_devices // 8), cache=tmp_path)
    counted = count(compiled.program(), job.mesh, 8, routed_rows=routed_rows(job, 8))
    estimated = estimate_work(job, 8)
    assert estimated.flops == pytest.approx(counted.flops, rel=0.03)
    inside, across = over_links(estimated)
    assert (inside, across) == pytest.approx(over_links(counted), rel=0.15)


def test_8_bits_on_the_wire_are_estimated_as_compiled(tmp_path):
    precision = Precision(exchange="fp8", gathered="fp8")
    job = Job("train", CAPPED, 64, 2048, precision, Execution(remat="full"), mesh=MeshConfig(data=8, expert=8))
    compiled = compile_job(job, H20, Cluster(nodes=8), cache=tmp_path)
    counted = count(compiled.program(), job.mesh, 8, routed_rows=routed_rows(job, 8))
    for kind in ("all-to-all", "all-gather"):
        told, found = (
            sum(t * (x.inside + x.across) for t, x in work.transfers() if x.kind == kind)
            for work in (estimate_work(job, 8), counted)
        )
        assert told == pytest.approx(found, rel=0.01), kind
    gathers = re.findall(r" = (\(.*?) all-gather-start\(", compiled.program())
    # Of wider numbers only the router's are gathered in a layer, and once the embedding and the head.
    wide = {f"{kind}[{sizes}]" for each in gathers for kind, sizes in re.findall(r"\b((?:bf|f)\d+)\[([\d,]*)\]", each)}
    assert wide == {
        "f32[32,16]",
        "f32[2048,16]",
        "f32[1,16384,32]",
        "f32[64,16384,32]",
        "bf16[1,16384,32]",
        "bf16[64,16384,32]",
    }
