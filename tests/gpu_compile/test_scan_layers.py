"""A training step without a loop over its layers, compiled for an H100: nothing goes into and out of stacks.

Needs the CUDA plugin; skipped without. Run as tests/gpu_compile/test_gpu_compile.py is.
"""

from functools import cache

import jax
import pytest

from moe.model.config import ModelConfig
from moe.model.execution import Execution
from moe.planner.chips import H100
from moe.planner.hlo import parse
from moe.planner.job import Job
from moe.planner.lower import lower
from moe.planner.target import described_mesh
from tests.gpu_compile.target import needs_plugin

pytestmark = needs_plugin

B, T, D, L = 4, 2048, 512, 6
MODEL = ModelConfig(
    vocab_size=1024, d_model=D, num_layers=L, num_heads=4, num_kv_heads=4, head_dim=128, num_experts=8, d_expert=D
)


@cache
def compiled(*, scan_layers: bool) -> jax.stages.Compiled:
    job = Job("train", MODEL, B, T, execution=Execution(scan_layers=scan_layers))
    return lower(job, described_mesh(H100, job.mesh, 1)).compile()


@cache
def put_into_stacks(*, scan_layers: bool) -> list[str]:
    """Of activations and gradients of all layers, each layer's being written into its place."""
    module = parse(compiled(scan_layers=scan_layers).as_text())
    instructions = [each for computation in module.computations.values() for each in computation.instructions.values()]
    updates = [each for each in instructions if each.opcode == "dynamic-update-slice"]
    return [each.name for each in updates if each.shape.dims[0] == L and each.shape.elements >= L * D * D]


def test_nothing_is_put_into_stacks():
    assert put_into_stacks(scan_layers=False) == []
    assert len(put_into_stacks(scan_layers=True)) > 20


def test_it_takes_less_memory():
    of_a_loop, without = (compiled(scan_layers=scan).memory_analysis().temp_size_in_bytes for scan in (True, False))
    assert without < 0.9 * of_a_loop


@pytest.mark.parametrize("scan_layers", [True, False])
def test_layers_recomputed_are_not_kept(scan_layers):
    job = Job("train", MODEL, B, T, execution=Execution(scan_layers=scan_layers, remat="full"))
    recomputed = lower(job, described_mesh(H100, job.mesh, 1)).compile().memory_analysis().temp_size_in_bytes
    assert recomputed < 0.75 * compiled(scan_layers=scan_layers).memory_analysis().temp_size_in_bytes
