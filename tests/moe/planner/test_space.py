import itertools
from dataclasses import replace

from moe.model.presets import HUNYUAN_LARGE, TINY
from moe.planner.space import AXES, factorizations, meshes, microbatches, settings_of, virtual_stages
from parallel.mesh import MeshConfig


def test_factorizations_are_all_and_once():
    sizes = range(1, 13)
    expected = [found for found in itertools.product(sizes, repeat=3) if found[0] * found[1] * found[2] == 12]
    assert list(factorizations(12, 3)) == expected


def test_meshes_fill_the_devices_and_stay_in_bounds():
    found = list(meshes(64, 8, HUNYUAN_LARGE, 4096))
    assert len(found) == len(set(found))
    assert all(mesh.num_devices == 64 for mesh in found)
    assert max(mesh.tensor * mesh.sequence for mesh in found) == 8
    assert max(mesh.expert for mesh in found) == 16
    assert max(mesh.stage for mesh in found) == 32, "of 32 groups of two layers"
    assert max(mesh.sequence for mesh in found) == 4, "1024 tokens at least"
    assert MeshConfig(data=4, expert=16) in found


def test_a_dense_model_has_no_expert_axis():
    dense = replace(TINY, num_experts=0, d_dense=512, num_shared_experts=0)
    assert {mesh.expert for mesh in meshes(8, 8, dense, 256)} == {1}


def test_microbatches():
    assert list(microbatches(MeshConfig(data=2, expert=4), 64)) == [1, 2, 4, 8]
    assert list(microbatches(MeshConfig(stage=4, data=2), 24)) == [4]
    assert list(microbatches(MeshConfig(data=16), 8)) == [], "fewer rows than devices"


def test_interleaving_needs_microbatches_in_groups():
    assert virtual_stages(MeshConfig(stage=4, data=2), 8, HUNYUAN_LARGE) == [1, 8]
    assert virtual_stages(MeshConfig(stage=4, data=2), 6, HUNYUAN_LARGE) == [1]
    assert virtual_stages(MeshConfig(data=8), 8, HUNYUAN_LARGE) == [1]


def test_settings_name_every_axis():
    changes = settings_of(MeshConfig(data=2), 4, 1)
    assert [path for path in changes if path.startswith("mesh.")] == [f"mesh.{axis}" for axis in AXES]
    assert changes["training.microbatches"] == 4
