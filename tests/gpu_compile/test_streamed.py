"""Compiled for eight H20s: what waits on the hosts is there, and the devices hold one layer of it at a time.

Needs the CUDA plugin; skipped without. Run as tests/gpu_compile/test_gpu_compile.py is.
"""

import functools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from moe.model.config import ModelConfig, RouterConfig
from moe.model.execution import Execution
from moe.model.precision import Precision
from moe.planner.chips import H20
from moe.planner.compile import compile_job
from moe.planner.job import Job
from moe.train.optimizer import OptimizerConfig
from parallel.layout import LayoutConfig
from parallel.mesh import MeshConfig
from parallel.network.cluster import Cluster
from tests.gpu_compile.target import needs_plugin

pytestmark = needs_plugin

MODEL = ModelConfig(
    vocab_size=1024, d_model=1024, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=128, num_experts=8,
    d_expert=4096, router=RouterConfig(top_k=1, capacity_factor=1.25),
)  # fmt: skip
TRAIN = Job(
    "train", MODEL, 8, 256, mesh=MeshConfig(expert=8), execution=Execution(remat="full"),
    precision=Precision(parameters="bfloat16", gradients="bfloat16"), optimizer=OptimizerConfig(master_weights=True),
    layout=LayoutConfig(optimizer_states="host", gradients="host"),
)  # fmt: skip
SERVE = Job(
    "decode", MODEL, 4, 256, mesh=MeshConfig(data=4, tensor=2), precision=Precision(parameters="bfloat16"),
    layout=LayoutConfig(experts=()),
)  # fmt: skip


@functools.cache
def compiled(job: Job, layers: int, folder: Path, prefetch: bool = True):
    job = replace(job, model=replace(MODEL, num_layers=layers))
    return compile_job(job, H20, Cluster(prefetch=prefetch), cache=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plan")


def test_devices_keep_only_the_parameters_of_more_layers(folder):
    few, many = (compiled(TRAIN, layers, folder).facts for layers in (4, 12))
    a_layer = (many.arguments - few.arguments) / 8
    # Three matrices of an expert, alone on its device, and an eighth of the shared expert's and of attention's.
    assert a_layer == pytest.approx(2 * (9 / 8 * 3 * 1024 * 4096 + 1024 * 128 * (8 + 4 + 4 + 8) / 8), rel=0.01)
    # An input of the layer, kept for the backward pass, and no more.
    assert many.temporaries - few.temporaries < 8 * 0.1 * a_layer
    # Master weights and two moments in float32, and the gradient.
    assert (many.host - few.host) / 8 == pytest.approx((12 + 2) / 2 * a_layer, rel=0.01)


def test_states_enter_and_leave_in_the_hosts_memory(folder):
    header = compiled(TRAIN, 4, folder).program().splitlines()[0]
    assert "entry_computation_layout" in header
    # Arguments and results: master, m and v of w_gate, w_up and w_down, four layers of one expert.
    on_host = re.findall(r"f32\[4,1,(?:1024,4096|4096,1024)\]\{3,2,1,0:S\(5\)\}", header)
    assert len(on_host) == 2 * 3 * 3


def test_serving_gathers_one_layer_without_copying_the_stack(folder):
    few, many = (compiled(SERVE, layers, folder, False).facts for layers in (4, 12))
    assert many.arguments > 2 * few.arguments
    assert many.temporaries < 1.1 * few.temporaries
