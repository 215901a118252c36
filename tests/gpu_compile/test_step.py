"""The train step of Hunyuan-Large compiled for each chip: what its program does not hold, what runs beside what, and
how much of its arithmetic is the model's. Each check also finds what it is for in a program that was asked to do it.

Needs the CUDA plugin; skipped without. Run as tests/gpu_compile/test_gpu_compile.py is.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, cached_property

import pytest

from experiments.hunyuan_large import experiment
from moe.model.execution import Execution
from moe.model.precision import Precision
from moe.planner.chips import A100, H20, H100, Chip
from moe.planner.compile import Compiled, compile_job
from moe.planner.count import count
from moe.planner.hlo import Module, parse
from moe.planner.job import Job
from moe.planner.plan import model_size
from moe.planner.routing import routed_rows
from moe.planner.work import Work
from parallel.layout import LayoutConfig
from parallel.mesh import MeshConfig
from parallel.network.cluster import Cluster
from tests.gpu_compile.program import (
    Stored,
    arrays_of,
    copies,
    kernel_calls,
    products_of,
    stored,
    synchronous,
    unhidden,
)
from tests.gpu_compile.target import needs_plugin

pytestmark = needs_plugin

MODEL = experiment.model
D, F, N, T = MODEL.d_model, MODEL.d_expert, MODEL.num_heads, experiment.data.sequence_length
WHOLE = Job(
    "train", MODEL, experiment.data.batch_size, T, optimizer=experiment.optimizer, steps=experiment.training.steps,
    mesh=experiment.mesh, execution=experiment.execution,
)  # fmt: skip
"""The experiment itself: all layers, on 512 GPUs, each with one expert of every layer."""
FEW = replace(
    WHOLE, model=replace(MODEL, num_layers=4), batch_size=64, mesh=MeshConfig(data=16, expert=4), execution=Execution()
)
"""Four of its layers, of which each GPU has four experts; nothing is recomputed."""
OTHERWISE = replace(
    FEW, model=replace(MODEL, num_layers=2, cla_factor=1), layout=LayoutConfig(zero=1),
    precision=Precision(compute="float32"), execution=Execution(attention="dense", grouped_matmul="ragged"),
)  # fmt: skip
"""As it must not be: products over all experts, scores of all heads, float32 weights, and these gathered at once."""
CHIPS = (H20, H100, A100)
BARE_ON_HOPPER = {
    ("all-gather", "data,expert", "forward"), ("all-gather", "data,expert", "backward"),
    ("all-to-all", "expert", "forward"), ("all-to-all", "expert", "backward"),
    ("all-reduce", "replica,data,expert", "backward"),
}  # fmt: skip
"""What is sent while no product runs, as `bare` tells it, of more than half a percent of a step's bytes: the embedding;
a group's weights in the backward pass, but for its routed experts; rows on their way to experts and back, in part; and
every sixth gradient of attention and of the shared expert."""
BARE = {H20: BARE_ON_HOPPER, H100: BARE_ON_HOPPER, A100: BARE_ON_HOPPER | {
    ("all-gather", "data", "forward"), ("all-gather", "data", "backward"), ("all-reduce", "replica,data", "backward"),
    ("reduce-scatter", "data,expert", "forward"),
}}  # fmt: skip
"""XLA schedules by times that it estimates for Hopper and later alone (xla/service/gpu/model/sol_latency_estimator.cc,
IsSupportedForModule). On an A100 the routed experts' weights, and some of their gradients, have no product beside
them."""
MOST_BARE = {H20: 0.25, H100: 0.25, A100: 0.5}
"""Share of a step's bytes."""
SMALL = 1 << 20
"""Bytes of a collective below which nobody minds when it is sent."""


@dataclass(frozen=True)
class Step:
    job: Job
    chip: Chip
    compiled: Compiled

    @cached_property
    def module(self) -> Module:
        return parse(self.compiled.program())

    @cached_property
    def work(self) -> Work:
        per_node = Cluster().gpus_per_node
        return count(self.compiled.program(), self.job.mesh, per_node, routed_rows=routed_rows(self.job, per_node))

    @property
    def executed_to_model(self) -> float:
        return self.work.flops * self.job.mesh.num_devices / model_size(self.job)[2]

    @property
    def experts(self) -> int:
        """Of one layer on a device."""
        return self.job.model.num_experts // self.job.mesh.expert

    @property
    def sequences(self) -> int:
        """Of the batch on a device."""
        return self.job.batch_size // self.job.mesh.num_devices

    @property
    def rows(self) -> int:
        """Of the buffer on which a device's experts work: from each device that shares them out what its tokens may
        send here."""
        capacity = math.ceil(self.job.model.router.capacity_factor * T / self.job.model.num_experts)
        return self.job.mesh.expert * self.sequences * min(T, self.experts * capacity)

    @property
    def layer_weights(self) -> dict[str, int]:
        """Numbers in each matrix that a layer uses on a device, and in the embedding."""
        model = self.job.model
        return {
            "experts": self.experts * D * F, "shared": D * F, "queries": D * N * model.head_dim,
            "keys": D * model.num_kv_heads * model.head_dim, "router": D * model.num_experts,
            "embedding": model.vocab_size * D,
        }  # fmt: skip

    @property
    def group_weights(self) -> int:
        """Numbers in all matrices of the layers that share keys and values."""
        each = self.layer_weights
        a_layer = 3 * (each["experts"] + each["shared"]) + 2 * each["queries"] + each["router"]
        return self.job.model.cla_factor * a_layer + 2 * each["keys"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")

    @cache
    def compiled(job: Job, chip: Chip = H20) -> Step:
        nodes = job.mesh.num_devices // Cluster().gpus_per_node
        cluster = Cluster(nodes=nodes, prefetch=job is not OTHERWISE)
        return Step(job, chip, compile_job(job, chip, cluster, cache=folder))

    return compiled


@pytest.fixture(scope="module", params=CHIPS, ids=lambda chip: chip.name)
def chip(request) -> Chip:
    return request.param


@pytest.fixture(scope="module")
def whole(chip, compiled) -> Step:
    return compiled(WHOLE, chip)


@pytest.fixture(scope="module")
def few(chip, compiled) -> Step:
    return compiled(FEW, chip)


@pytest.fixture(scope="module")
def otherwise(compiled) -> Step:
    return compiled(OTHERWISE)


def over_all_experts(step: Step) -> list[str]:
    """Products of all rows with all experts of the device."""
    return products_of(step.module, 2.0 * step.experts * step.rows * D * F)


def rows_times_experts(step: Step) -> list[str]:
    """Arrays as large as all rows for each expert of the device."""
    return arrays_of(step.module, {step.experts * step.rows * width for width in (D, F)})


def scores(step: Step) -> list[str]:
    """Arrays as large as the scores of all heads."""
    return arrays_of(step.module, {step.sequences * N * T * T})


def expert_copies(step: Step, dtype: str) -> list[str]:
    """What the program stores of the experts' weights in this format, beside the parameters themselves."""
    found = copies(step.module, lambda name: name.startswith("state.params") and "['experts']" in name)
    return [f"{each.instruction.name} {shape}" for each, shape in found if shape.dtype == dtype]


def gathers(step: Step) -> list[Stored]:
    opcodes = ("all-gather", "all-gather-start")
    return [each for each in stored(step.module) if each.instruction.opcode in opcodes]


def sizes(gathered: list[Stored]) -> set[int]:
    """Of the arrays that are gathered, each alone even where one collective takes several."""
    return {shape.elements for each in gathered for shape in each.shapes}


def bare(step: Step) -> Counter[tuple[str, str, str]]:
    """Of the bytes that a device sends, the shares beside which no product runs: by kind, mesh axes and pass."""
    sent: Counter[tuple[str, str, str]] = Counter()
    names = {each.name for each in unhidden(step.work.events)}
    total = 0.0
    for times, each in step.work.transfers():
        size = times * (each.inside + each.across)
        total += size
        if each.name in names:
            sent[each.kind, ",".join(each.axes), "backward" if each.backward else "forward"] += size
    return Counter({which: size / total for which, size in sent.items()})


def kept_weights(step: Step) -> list[str]:
    """Stored copies of the weights of more than a layer."""
    found = copies(step.module, lambda name: name.startswith("state.params"))
    return [
        f"{each.instruction.name} {shape}" for each, shape in found if shape.elements > max(step.layer_weights.values())
    ]


def test_no_product_is_over_all_experts(few, otherwise):
    assert over_all_experts(few) == []
    assert over_all_experts(otherwise)


def test_no_array_is_all_rows_for_each_expert(few, otherwise):
    assert rows_times_experts(few) == []
    assert rows_times_experts(otherwise)


def test_the_experts_products_are_one_kernel_each(few, otherwise):
    calls = kernel_calls(few.module, "__gpu$xla.gpu.triton")
    rows, weights = ([name for name in calls if f"grouped_matmul_{over}" in name] for over in ("rows", "weights"))
    # Gate, up and down of each layer; and of each again the gradient of its rows, and of its matrices.
    assert len(weights) == 3 * few.job.model.num_layers
    assert len(rows) == 2 * len(weights)
    assert not kernel_calls(otherwise.module, "__gpu$xla.gpu.triton")


def test_attention_is_cudnns(whole, otherwise):
    assert kernel_calls(whole.module, "__cudnn$fmha")
    assert scores(whole) == []
    assert not kernel_calls(otherwise.module, "__cudnn$fmha")
    assert scores(otherwise)


def test_experts_have_no_float32_copies(whole, otherwise):
    assert expert_copies(whole, "bf16")
    assert expert_copies(whole, "f32") == []
    assert expert_copies(otherwise, "f32")


def test_no_more_is_gathered_than_a_layer_uses(whole, otherwise):
    assert sizes(gathers(whole)) == {*whole.layer_weights.values()}
    for each in gathers(whole):
        # Ahead of the loops, whose first turns XLA takes out, two groups' come together.
        groups = 2 if each.computation is whole.module.entry else 1
        assert sum(shape.elements for shape in each.shapes) <= groups * whole.group_weights
    # After the update, all layers' at once.
    assert not sizes(gathers(otherwise)) <= {*otherwise.layer_weights.values()}


def test_gathered_weights_are_not_kept(whole, few):
    assert kept_weights(whole) == []
    # Where nothing is recomputed, every layer's wait for the backward pass.
    assert kept_weights(few)


def test_collectives_are_asynchronous(whole):
    assert synchronous(whole.module, SMALL) == []


def test_collectives_run_beside_products(whole, otherwise):
    shares = bare(whole)
    assert {which for which, share in shares.items() if share > 0.005} <= BARE[whole.chip]
    assert shares.total() < MOST_BARE[whole.chip]
    assert bare(otherwise).total() > 0.5


def test_flops_are_the_models(whole, few, otherwise):
    # Of attention what its mask lets through is counted.
    assert 1.25 < whole.executed_to_model < 1.35
    assert 0.99 < few.executed_to_model < 1.05
    assert otherwise.executed_to_model > 2
