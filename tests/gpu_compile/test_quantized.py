"""Decoding with 8-bit weights compiled for four H20s: what is gathered, and what is wide at a time."""

import re

from moe.model.config import ModelConfig
from moe.model.precision import Precision
from moe.planner.chips import H20
from moe.planner.job import Job
from moe.planner.lower import lower
from moe.planner.target import described_mesh
from parallel.mesh import MeshConfig
from tests.gpu_compile.target import needs_plugin

pytestmark = needs_plugin

L, D, F, E = 8, 1024, 2048, 4
MODEL = ModelConfig(
    vocab_size=1024, d_model=D, num_layers=L, num_heads=8, num_kv_heads=4, head_dim=64, num_experts=E, d_expert=F,
    cla_factor=2,
)  # fmt: skip
LAYER = 3 * E * D * F
"""Values of one layer's experts."""


def test_a_layers_weights_travel_in_8_bits_and_are_widened_one_matrix_after_the_other():
    precision = Precision(parameters="bfloat16", frozen="int8")
    mesh = MeshConfig(data=4)
    job = Job("decode", MODEL, batch_size=4, sequence_length=256, precision=precision, mesh=mesh)
    compiled = lower(job, described_mesh(H20, mesh, 4)).compile()
    program = compiled.as_text()
    assert re.search(rf"s8\[4,{E},{D // 4},{F}\]\S* all-gather-done", program)
    assert not re.search(rf"bf16\[[\d,]*{F}[\d,]*\]\S* all-gather", program)
    # Less than one layer in 8 bits and in bfloat16; the stack of all layers would be 8 times as much.
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * LAYER
