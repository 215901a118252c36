"""Decoding compiled for an H20: it reads each weight, and each layer's keys and values, where they stand, and nothing
makes pieces of its launch.

Needs the CUDA plugin; skipped without. Run as tests/gpu_compile/test_gpu_compile.py is.
"""

from dataclasses import replace

import jax
import pytest

from moe.model.config import ModelConfig
from moe.model.precision import Precision
from moe.planner.chips import H20
from moe.planner.hlo import Module, parse
from moe.planner.job import Job
from moe.planner.lower import lower
from moe.planner.target import described_mesh
from tests.gpu_compile.program import copies, stored
from tests.gpu_compile.target import needs_plugin

pytestmark = needs_plugin

D, F, M, H, B, S = 1024, 2048, 4, 64, 4, 512
MODEL = ModelConfig(
    vocab_size=1024, d_model=D, num_layers=4, num_heads=16, num_kv_heads=M, head_dim=H, num_experts=4, d_expert=F,
)  # fmt: skip
DECODE = Job("decode", MODEL, batch_size=B, sequence_length=S, precision=Precision(parameters="bfloat16"))


def compiled(job: Job) -> jax.stages.Compiled:
    return lower(job, described_mesh(H20, job.mesh, 1)).compile()


def copied(module: Module, argument: str, least: int) -> list[str]:
    """What the program stores, in arrays of at least so many numbers, of an argument as it was given."""
    found = copies(module, lambda name: name.startswith(argument))
    return [f"{each.instruction.name} {shape}" for each, shape in found if shape.elements >= least]


@pytest.fixture(scope="module")
def decoding():
    return compiled(DECODE)


@pytest.fixture(scope="module")
def training():
    """A step with a loop over layers, where there is what a step of decoding must not have."""
    return compiled(replace(DECODE, kind="train", precision=Precision()))


def test_no_matrix_is_copied(decoding, training):
    assert copied(parse(decoding.as_text()), "params", D * M * H) == []
    # A loop over layers takes each turn's matrices out of their stacks.
    assert copied(parse(training.as_text()), "state.params", D * F)


def test_of_keys_and_values_the_new_ones_are_written_and_none_is_moved(decoding):
    module, a_layers = parse(decoding.as_text()), B * S * M * H
    written = [each.instruction.op_name for each in stored(module) if a_layers in {s.elements for s in each.shapes}]
    assert len(written) == 2 * MODEL.num_layers
    assert all(name.endswith("scatter") for name in written)
    # And in place: there is no room for another.
    assert decoding.memory_analysis().temp_size_in_bytes < 2 * a_layers


def test_no_loop_and_no_branch_makes_pieces_of_a_step(decoding, training):
    def controls(module: Module) -> set[str]:
        opcodes = {
            each.opcode for computation in module.computations.values() for each in computation.instructions.values()
        }
        return opcodes & {"while", "conditional"}

    assert controls(parse(decoding.as_text())) == set()
    assert controls(parse(training.as_text())) == {"while"}


def test_two_rows_are_multiplied_and_one_would_be_written_down_times_a_matrix(decoding):
    def written(module: Module) -> list[str]:
        return [each.instruction.name for each in stored(module) if D * F in {shape.elements for shape in each.shapes}]

    two, one = (parse(compiled(replace(DECODE, batch_size=rows)).as_text()) for rows in (2, 1))
    assert written(two) == written(parse(decoding.as_text())) == []
    assert written(one)
