"""The analytic estimate of memory against the states themselves, and against counts by hand; what XLA allocates is
compared in tests/gpu_compile/test_estimate_memory.py."""

import math
from dataclasses import replace

import jax
import pytest

from moe.model.adapter import LoraConfig
from moe.model.config import ConfigError
from moe.model.execution import Execution
from moe.model.precision import Precision
from moe.model.presets import TINY
from moe.planner.chips import H20
from moe.planner.estimate_layers import Layers
from moe.planner.estimate_memory import estimate_memory
from moe.planner.estimate_states import abstract_layout, moment_bytes, states_of
from moe.planner.job import Job
from moe.planner.sizes import Sizes
from moe.train.optimizer import OptimizerConfig
from moe.train.state import make_blueprint
from parallel.layout import SINGLE_DEVICE, LayoutConfig, LayoutError
from parallel.mesh import MeshConfig

JOB = Job("train", TINY, batch_size=32, sequence_length=256, mesh=MeshConfig(data=2, expert=4, tensor=2))
BFLOAT16 = replace(JOB, precision=Precision(parameters="bfloat16"))
OPTIMIZERS = {
    "int8": replace(JOB, optimizer=OptimizerConfig(states="int8")),
    "fp8": replace(JOB, optimizer=OptimizerConfig(states="fp8"), layout=LayoutConfig(zero=1)),
    "kahan": replace(BFLOAT16, optimizer=OptimizerConfig(rounding="kahan", states="bfloat16")),
    "stochastic": replace(BFLOAT16, optimizer=OptimizerConfig(rounding="stochastic")),
    "adafactor": replace(JOB, optimizer=OptimizerConfig(kind="adafactor")),
    "muon": replace(JOB, optimizer=OptimizerConfig(kind="muon", states="int8")),
}
SLOW = [pytest.param(job, marks=pytest.mark.slow) for job in OPTIMIZERS.values()]
MASTER = replace(JOB, precision=Precision(parameters="bfloat16"), optimizer=OptimizerConfig(master_weights=True))


def allocated(job: Job) -> int:
    return estimate_memory(job, H20, 8).allocated


@pytest.mark.parametrize(
    "job",
    [
        JOB,
        replace(JOB, layout=LayoutConfig(zero=1)),
        replace(JOB, lora=LoraConfig(rank=8)),
        MASTER,
        *SLOW,
    ],
    ids=["zero 3", "zero 1", "adapters", "master weights", *OPTIMIZERS],
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


def states_bytes(job: Job) -> int:
    """By JAX's own word for the whole state on one device."""
    blueprint = make_blueprint(
        job.model, job.precision, job.execution, job.optimizer, SINGLE_DEVICE, steps=job.steps, lora=job.lora
    )
    state = jax.eval_shape(blueprint.new_state, jax.random.key(0))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_on_one_device_are_whole(name):
    job = replace(OPTIMIZERS[name], mesh=MeshConfig())
    assert states_of(job, abstract_layout(job)).optimizer_states == states_bytes(job)


def test_moments_in_eight_bits_take_one_byte_and_a_scale_for_each_block():
    def moments(name: str) -> float:
        return states_bytes(OPTIMIZERS[name]) / 2

    specs = states_of(JOB, abstract_layout(JOB)).specs
    small = sum(
        math.prod(each.shape)
        for each in specs
        if each.kind in ("attention", "expert", "shared_expert") and len(each.axes) > 2
    )
    rest = sum(math.prod(each.shape) for each in specs) - small
    # Blocks are 64 values of an eighth part of the width 512, and 32 of a head; two counts are of the whole step.
    assert moments("int8") == pytest.approx(small * (1 + 4 / 64) + 4 * rest, rel=0.02)
    assert moment_bytes(OPTIMIZERS["int8"]) * (small + rest) == pytest.approx(moments("int8"), rel=1e-5)
    assert moment_bytes(JOB) == 4.0


@pytest.mark.parametrize("kind", ["adafactor", "muon"])
def test_what_no_estimate_knows_is_refused(kind):
    with pytest.raises(ConfigError, match=f"optimizer.kind='{kind}': only AdamW's update can be estimated"):
        allocated(OPTIMIZERS[kind])


def test_states_in_eight_bits_save_memory():
    assert allocated(OPTIMIZERS["int8"]) < allocated(JOB)


def test_parts_add_up():
    memory = estimate_memory(JOB, H20, 8)
    assert sum(memory.parts.values()) == memory.peak == memory.allocated
    assert memory.origin == "estimated"
    assert memory.host == 0


@pytest.mark.parametrize(("cache", "head_bytes"), [(None, 2 * TINY.head_dim), ("int8", TINY.head_dim + 2)])
def test_cache_holds_every_group_once(cache, head_bytes):
    job = replace(JOB, kind="decode", sequence_length=1024, precision=replace(JOB.precision, cache=cache))
    groups, rows, heads = 2, 32 // 8, TINY.num_kv_heads // 2
    assert estimate_memory(job, H20, 8).parts["cache"] == 2 * groups * rows * 1024 * heads * head_bytes


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
    # In the backward pass: whole in the chunks' order, and one of two chunks; of gradients one chunk's at a time.
    more = stacked / 2 * (1 + 1 / 2 - 1 / 2)
    assert allocated(replace(job, virtual_stages=2)) - allocated(job) == pytest.approx(more, rel=0.03)
