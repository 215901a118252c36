import pytest

from parallel.mesh import MeshConfig, MeshError, make_mesh


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(expert=2, stage=2, tensor=2), {"stage": 2, "expert": 2, "tensor": 2}),
        (MeshConfig(), {"data": 1}),
    ],
)
def test_the_axes_that_are_on_outermost_first(config, shape):
    assert list(make_mesh(config).shape.items()) == list(shape.items())


def test_a_mesh_of_fewer_devices_takes_the_first():
    assert make_mesh(MeshConfig(data=3)).devices.size == 3


def test_more_devices_than_present():
    with pytest.raises(MeshError, match=r"the mesh data=4 x expert=4 needs 16 devices, and 8 cpu devices are present"):
        make_mesh(MeshConfig(data=4, expert=4))


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_sizes_are_whole_numbers(size):
    with pytest.raises(MeshError, match=r"mesh\.expert="):
        MeshConfig(expert=size)
