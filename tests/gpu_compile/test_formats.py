"""Which number formats are left in the optimized program of a train step for an H20, and what each setting saves."""

import functools
from dataclasses import replace

import pytest

from moe.model.config import ModelConfig, RouterConfig
from moe.model.execution import Execution
from moe.model.precision import Precision
from moe.planner.backends import backends
from moe.planner.chips import H20
from moe.planner.hlo import Module, parse
from moe.planner.job import Job
from moe.planner.lower import lower
from moe.planner.target import described_mesh
from parallel.mesh import MeshConfig
from tests.gpu_compile.program import stored
from tests.gpu_compile.target import needs_plugin

pytestmark = needs_plugin

B, T, D, V = 6, 320, 256, 512
MODEL = ModelConfig(
    vocab_size=V, d_model=D, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=64, num_experts=4, d_expert=384,
    cla_factor=2, router=RouterConfig(top_k=1),
)  # fmt: skip


@functools.cache
def compiled(precision: Precision, execution: Execution):
    """A train step for one H20. Its lengths divide by T, and no weight's do."""
    mesh = MeshConfig()
    job = Job("train", MODEL, B, T, precision=precision, execution=backends(H20, execution), mesh=mesh, loss_chunk=64)
    return lower(job, described_mesh(H20, mesh, 1)).compile()


def memory(**execution) -> int:
    """Bytes of its temporaries."""
    return compiled(Precision(), Execution(**execution)).memory_analysis().temp_size_in_bytes


def wide_activations(module: Module) -> list[str]:
    """float32 arrays over the tokens, of D numbers or more for each, that the program stores."""
    return [
        f"{shape} {each.instruction.op_name}"
        for each in stored(module)
        for shape in each.shapes
        if shape.dtype == "f32" and shape.elements >= B * T * D and any(size % T == 0 for size in shape.dims)
    ]


@pytest.mark.parametrize("gate", ["after", "before"])
def test_no_float32_activation_is_stored_where_compute_is_bfloat16(gate):
    module = parse(compiled(Precision(), Execution(gate=gate)).as_text())
    assert wide_activations(module) == []


def test_float32_compute_would_be_found():
    found = wide_activations(
        parse(compiled(replace(Precision(), compute="float32"), Execution(attention="chunked")).as_text())
    )
    assert len(found) > 20


def test_settings_save_memory():
    """By at least what the layers' arrays say, in bfloat16 but for those in 8 bits."""
    rows, layers = B * T, MODEL.num_layers
    # An expert's output rows, of the layers whose backward pass is still to come.
    assert memory() - memory(gate="before") > 0.8 * 2 * rows * D * layers
    products = rows * (3 * D + 2 * 384)
    assert memory(remat="matmuls") - memory(remat="matmuls_fp8") > 0.8 * products * layers
    assert memory(remat="matmuls") < memory()
