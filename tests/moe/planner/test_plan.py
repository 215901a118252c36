from dataclasses import replace

import pytest

from moe.model.config import ConfigError
from moe.model.presets import HUNYUAN_LARGE, TINY
from moe.planner.chips import CHIPS
from moe.planner.job import Job
from moe.planner.plan import ALL_TO_ALL_ROOM, COMMUNICATOR_ROOM, CUDA_ROOM, make_plan, model_size, planned
from parallel.mesh import MeshConfig
from parallel.network.cluster import Cluster
from tests.moe.planner.handmade import MEMORY, WORK
from tests.moe.planner.handmade_plan import FACTS, JOB, handmade_plan


def test_room_is_for_one_communicator_a_set_of_axes():
    room = handmade_plan().room
    assert room.cuda == CUDA_ROOM
    assert room.nccl == COMMUNICATOR_ROOM + ALL_TO_ALL_ROOM  # data, expert
    assert room.fragmentation == int(0.02 * MEMORY.allocated)
    assert room.total == room.cuda + room.nccl + room.fragmentation


def test_fits_by_what_is_allocated_and_the_room():
    plan = handmade_plan()
    assert plan.fits
    assert plan.spare == plan.chip.memory - (12 << 30) - plan.room.total
    full = replace(MEMORY, allocated=plan.chip.memory - 1)
    assert not planned(JOB, plan.chip, plan.cluster, WORK, full, FACTS).fits


def test_the_program_may_have_all_but_the_room():
    plan = handmade_plan()
    assert plan.memory_fraction * plan.chip.memory == pytest.approx(plan.chip.memory - plan.room.cuda - plan.room.nccl)


def test_executed_over_model_flops():
    plan = handmade_plan()
    assert plan.executed_ratio == pytest.approx(76.001e12 * 8 / plan.model_flops)


def test_an_overloaded_device_takes_longer():
    plan = handmade_plan()
    times = [each.prediction.seconds for each in plan.unbalanced]
    assert [each.skew.load for each in plan.unbalanced] == [1.0, 1.5, 2.0, 4.0]
    assert times[0] == plan.prediction.seconds
    assert times == sorted(times)
    experts = plan.prediction.uses["experts"]
    assert times[-1] == pytest.approx(plan.prediction.seconds + 3 * experts, rel=0.01)


def test_cost_is_the_chips_times_the_hours():
    plan = handmade_plan()
    steps = 1e12 / plan.job.tokens
    assert plan.chip_hours_per_trillion == pytest.approx(steps * plan.prediction.seconds * 8 / 3600)


def test_hunyuan_has_the_reports_parameters():
    total, active, flops = model_size(Job("train", HUNYUAN_LARGE, 1024, 4096))
    assert total == pytest.approx(389e9, rel=1e-3)
    assert active == pytest.approx(52e9, rel=0.02)
    attention = 6 * 64 * 80 * 80 * 4096
    assert flops == pytest.approx(1024 * 4096 * (6 * active + attention), rel=1e-3)


def test_serving_is_a_third_of_training_and_decoding_sees_all_keys():
    _, _, training = model_size(Job("train", TINY, 4, 512))
    _, _, prefill = model_size(Job("prefill", TINY, 4, 512))
    _, _, decode = model_size(Job("decode", TINY, 4, 512))
    assert prefill == training / 3
    # One token instead of 512, and twice the mean causal row: 2 · L · N · H · 512 / 2 more.
    assert decode == pytest.approx(prefill / 512 + 4 * 2 * TINY.num_layers * TINY.num_heads * TINY.head_dim * 512)


def test_the_mesh_fills_the_nodes():
    with pytest.raises(ConfigError, match=r"mesh data=2 x expert=4 has 8 devices, and .* are 16 GPUs"):
        make_plan(JOB, CHIPS["h20"], Cluster(nodes=2), estimated=True)
    with pytest.raises(ConfigError, match="has 1 devices"):
        make_plan(replace(JOB, mesh=MeshConfig()), CHIPS["h20"], Cluster(), estimated=True)
