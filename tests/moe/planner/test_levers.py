from dataclasses import replace

import pytest

from moe.model.execution import Execution
from moe.model.precision import FULL, Precision
from moe.model.presets import HUNYUAN_LARGE, TINY
from moe.planner.job import Job
from moe.planner.levers import Variant, variants
from moe.train.optimizer import OptimizerConfig, check_optimizer
from parallel.layout import LayoutConfig
from parallel.mesh import MeshConfig
from parallel.network.cluster import Cluster

TINY_JOB = Job("train", TINY, batch_size=16, sequence_length=256, mesh=MeshConfig(data=2, expert=4))
LARGE_JOB = Job(
    "train", HUNYUAN_LARGE, 1024, 4096, mesh=MeshConfig(replica=2, data=16, expert=16),
    execution=Execution(remat="full"), steps=100_000,
)  # fmt: skip
NODES = Cluster(nodes=64)


def turned(job: Job, cluster: Cluster = NODES) -> dict[str, Variant]:
    return {each.lever: each for each in variants(job, cluster, active=int(51e9))}


def test_the_report_s_recipe_has_these_levers():
    ways = {lever: each.turned for lever, each in turned(LARGE_JOB).items()}
    off = [
        "mixture of experts", "bfloat16", "FSDP", "ZeRO-3", "expert parallelism", "recomputation", "CLA", "GQA",
        "GPUDirect RDMA",
    ]  # fmt: skip
    on = [
        "8-bit products",
        "8-bit exchange",
        "tensor parallelism",
        "context parallelism",
        "pipeline",
        "offload",
        "8-bit optimizer",
        "hierarchical exchange",
    ]
    assert ways == dict.fromkeys(off, "off") | dict.fromkeys(on, "on")
    assert list(ways) == off + on


@pytest.mark.parametrize("job", [TINY_JOB, LARGE_JOB, replace(LARGE_JOB, mesh=MeshConfig(stage=4, tensor=8, data=16))])
def test_every_mesh_has_as_many_devices(job):
    meshes = [each.settings["mesh"] for each in turned(job).values() if "mesh" in each.settings]
    assert len(meshes) >= 5
    assert {mesh.num_devices for mesh in meshes} == {job.mesh.num_devices}
    for mesh in meshes:
        assert job.model.d_model % (mesh.data * mesh.expert * mesh.sequence) == 0


def test_devices_of_an_axis_go_to_data_as_far_as_the_width_divides():
    assert turned(LARGE_JOB)["expert parallelism"].settings["mesh"] == MeshConfig(replica=2, data=256)
    wide = replace(LARGE_JOB, mesh=MeshConfig(tensor=8, data=64))
    assert turned(wide)["tensor parallelism"].settings["mesh"] == MeshConfig(replica=2, data=256)


def test_without_fsdp_there_are_copies():
    copies = turned(LARGE_JOB)["FSDP"].settings
    assert copies == {"mesh": MeshConfig(replica=32, expert=16), "layout.zero": 1}


def test_a_lever_that_is_off_is_turned_on():
    plain = replace(
        TINY_JOB, precision=FULL, layout=LayoutConfig(zero=1, optimizer_states="host"),
        execution=Execution(exchange="hierarchical"), mesh=MeshConfig(tensor=2, sequence=2, stage=2),
    )  # fmt: skip
    ways = {lever: each.turned for lever, each in turned(plain, Cluster(nodes=2, gpudirect=False)).items()}
    assert ways["bfloat16"] == ways["ZeRO-3"] == ways["recomputation"] == ways["GPUDirect RDMA"] == "on"
    assert ways["tensor parallelism"] == ways["context parallelism"] == ways["pipeline"] == "off"
    assert ways["offload"] == ways["hierarchical exchange"] == "off"
    assert "FSDP" not in ways


def test_eight_bit_states_are_turned_off_and_float32_ones_on():
    assert turned(LARGE_JOB)["8-bit optimizer"].settings == {"optimizer.states": "int8"}
    small = turned(replace(LARGE_JOB, optimizer=OptimizerConfig(states="fp8")))["8-bit optimizer"]
    assert (small.turned, small.settings) == ("off", {"optimizer.states": "float32"})
    assert "8-bit optimizer" not in turned(replace(LARGE_JOB, optimizer=OptimizerConfig(kind="adafactor")))
    assert "8-bit optimizer" not in turned(replace(TINY_JOB, kind="decode"))


def test_what_is_computed_and_sent_in_8_bits_is_widened():
    small = turned(replace(LARGE_JOB, precision=Precision(matmuls="fp8", scaling="row", exchange="fp8")))
    assert small["8-bit products"].settings == {"precision.matmuls": None, "precision.scaling": "tensor"}
    assert small["8-bit exchange"].settings == {"precision.exchange": "bfloat16"}
    assert small["bfloat16"].settings["precision.matmuls"] is None
    # Experts on one device send no rows.
    assert "8-bit exchange" not in turned(replace(LARGE_JOB, mesh=MeshConfig(data=512)))


def test_float32_parameters_need_neither_copies_nor_compensation():
    stored = Precision(parameters="bfloat16")
    for optimizer in (OptimizerConfig(master_weights=True), OptimizerConfig(rounding="kahan")):
        job = replace(TINY_JOB, precision=stored, optimizer=optimizer)
        settings = turned(job)["bfloat16"].settings.items()
        own = {path.removeprefix("optimizer."): value for path, value in settings if path.startswith("optimizer.")}
        check_optimizer(replace(optimizer, **own), Precision(), job.layout)


def test_one_node_has_no_network_levers():
    assert not {"GPUDirect RDMA", "hierarchical exchange"} & set(turned(TINY_JOB, Cluster()))


def test_rdma_changes_the_cluster_alone():
    rdma = turned(LARGE_JOB)["GPUDirect RDMA"]
    assert (rdma.settings, rdma.cluster) == ({}, {"gpudirect": False})


def test_serving_has_weights_to_quantize_and_nothing_to_recompute():
    serving = turned(replace(TINY_JOB, kind="decode"))
    assert serving["quantization"].settings == {"precision.frozen": "int8"}
    assert not {"recomputation", "offload", "pipeline"} & set(serving)
    assert "quantization" not in turned(TINY_JOB)
