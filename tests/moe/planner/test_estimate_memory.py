"""The analytic estimate of memory against the states themselves, and against counts by hand; what XLA allocates is
compared in tests/gpu_compile/test_estimate_memory.py."""

import math
from dataclasses import replace

import jax
import pytest

from moe.model.adapter import LoraConfig
from moe.model.execution import Execution
from moe.model.precision import Precision
from moe.model.presets import TINY
from moe.planner.chips import H20
from moe.planner.estimate_layers import Layers
from moe.planner.estimate_memory import estimate_memory
from moe.planner.estimate_states import abstract_layout, states_of
from moe.planner.job import Job
from moe.planner.sizes import Sizes
from moe.train.optimizer import OptimizerConfig
from moe.train.state import make_blueprint
from parallel.layout import LayoutConfig, LayoutError
from parallel.mesh import MeshConfig

JOB = Job("train", TINY, batch_size=32, sequence_length=256, mesh=MeshConfig(data=2, expert=4, tensor=2))
MASTER = replace(JOB, precision=Precision(parameters="bfloat16"), optimizer=OptimizerConfig(master_weights=True))


def allocated(job: Job) -> int:
    return estimate_memory(job, H20, 8).allocated


@pytest.mark.parametrize(
    "job",
    [JOB, replace(JOB, layout=LayoutConfig(zero=1)), replace(JOB, lora=LoraConfig(rank=8)), MASTER],
    ids=["zero 3", "zero 1", "adapters", "master weights"],
)
def test_states_are_those_that_training_makes(job):
    layout = abstract_layout(job)
    state = make_blueprint(
        job.model, job.precision, job.execution, job.optimizer, layout, steps=job.steps, lora=job.lora
    ).abstract_state()

    def held(tree) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)

    states = states_of(job, layout)
    assert states.parameters == held((state.params, state.frozen, state.balance))
    assert states.optimizer_states == held(state.opt_state)


def test_parts_add_up():
    memory = estimate_memory(JOB, H20, 8)
    assert sum(memory.parts.values()) == memory.peak == memory.allocated
    assert memory.origin == "estimated"
    assert memory.host == 0


def test_cache_holds_every_group_once():
    job = replace(JOB, kind="decode", sequence_length=1024)
    groups, rows, keys = 2, 32 // 8, TINY.num_kv_heads // 2 * TINY.head_dim
    assert estimate_memory(job, H20, 8).parts["cache"] == 2 * 2 * groups * rows * 1024 * keys


def test_what_waits_on_the_host_is_not_on_the_device():
    host = estimate_memory(replace(JOB, layout=LayoutConfig(optimizer_states="host")), H20, 8)
    device = estimate_memory(JOB, H20, 8)
    assert host.host == device.parts["optimizer_states"]
    assert "optimizer_states" not in host.parts


def test_recomputing_keeps_only_the_groups_inputs():
    def kept(remat: str) -> int:
        job = replace(JOB, execution=Execution(remat=remat))
        return sum(count * Layers(Sizes(job, 8)).kept(group) for group, count in Layers(Sizes(job, 8)).groups())

    sequences, positions, groups = 32 // 8, 256 // 2, 2
    assert kept("full") == groups * 2 * sequences * positions * TINY.d_model
    assert kept("full") < kept("matmuls") < kept("none")


def test_levers_that_save_memory_do():
    assert allocated(replace(JOB, layout=LayoutConfig(zero=1))) > allocated(JOB)
    assert allocated(replace(JOB, execution=Execution(remat="full"))) < allocated(JOB)
    assert allocated(replace(JOB, model=replace(TINY, router=replace(TINY.router, capacity_factor=1.0)))) < allocated(
        JOB
    )


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(LayoutError, match="batch_size=12 does not divide over the 8 parts"):
        estimate_memory(replace(JOB, batch_size=12), H20, 8)


def test_microbatches_add_their_sums():
    one = estimate_memory(replace(JOB, execution=Execution(remat="full")), H20, 8)
    four = estimate_memory(
        replace(JOB, execution=Execution(remat="full"), batch_size=4 * JOB.batch_size, microbatches=4), H20, 8
    )
    sums = one.parts["optimizer_states"] / 2  # Adam's two moments, in float32 and shared out as the sums are.
    batches = four.parts["batch"] - one.parts["batch"]
    assert four.allocated - one.allocated == pytest.approx(sums + batches, abs=64)


def test_virtual_stages_hold_their_weights_in_another_order():
    job = Job(
        "train", replace(TINY, num_layers=16), batch_size=8, sequence_length=64, microbatches=4,
        execution=Execution(remat="full"), mesh=MeshConfig(stage=2, data=2), layout=LayoutConfig(zero=1),
    )  # fmt: skip
    stacked = 4 * sum(
        math.prod(each.shape) for each in states_of(job, abstract_layout(job)).specs if each.axes[0] == "L"
    )
    # Whole in the chunks' order, and two of the two chunks; of gradients one chunk's at a time.
    more = stacked / 2 * (1 + 2 / 2 - 1 / 2)
    assert allocated(replace(job, virtual_stages=2)) - allocated(job) == pytest.approx(more, rel=0.03)
