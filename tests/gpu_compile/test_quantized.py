"""Decoding with 8-bit weights compiled for four H20s: what is gathered, and what is wide at a time."""

import math
import re

import pytest

from moe.model.config import ModelConfig
from moe.model.precision import Precision
from moe.planner.chips import A100, H20
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
LAYER = 3 * (E + 1) * D * F
"""Values of one layer's experts, the shared one with them."""


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


def operands(program: str) -> dict[str, set[str]]:
    """By the product's place in the model, the formats of what is multiplied there: by XLA, or by a kernel of ours, of
    whose operands these are the two largest."""
    formats = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", program))
    products = [
        (place, {formats[left], formats[right]})
        for left, right, place in re.findall(r" dot\((%[\w.-]+), (%[\w.-]+)\).*op_name=\"([^\"]+)\"", program)
    ]
    kernels = r"gpu\.triton\", operand_layout_constraints=\{(.*?)\}, api_version.*op_name=\"([^\"]+)\""
    for given, place in re.findall(kernels, program):
        arrays = re.findall(r"(\w+)\[([\d,]+)", given)
        sizes = sorted((math.prod(map(int, sizes.split(","))), format) for format, sizes in arrays)
        products.append((place, {format for _, format in sizes[-2:]}))
    found: dict[str, set[str]] = {}
    for place, each in products:
        kind = next(kind for kind in ("router", "attention", "shared_expert", "experts", "head") if kind in place)
        found.setdefault(kind, set()).update(each)
    return found


@pytest.mark.parametrize(("chip", "format", "number"), [(A100, "int8", "s8"), (H20, "fp8", "f8e4m3fn")])
def test_a_prefill_multiplies_in_8_bits_and_widens_no_matrix(chip, format, number):
    def compiled(activations):
        precision = Precision(parameters="bfloat16", frozen=format, activations=activations, cache="int8")
        mesh = MeshConfig(data=4)
        job = Job("prefill", MODEL, batch_size=4, sequence_length=256, precision=precision, mesh=mesh)
        return lower(job, described_mesh(chip, mesh, 4)).compile().as_text()

    program, widened = compiled(format), compiled(None)
    assert operands(program)["attention"] == operands(program)["shared_expert"] == {number}
    a_matrix = rf"bf16\[({E},)?({D},{F}|{F},{D})\]"
    assert not re.search(a_matrix, program)
    assert re.search(a_matrix, widened)
