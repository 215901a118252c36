import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from parallel.layout import SINGLE_DEVICE, Layout, LayoutError
from parallel.mesh import MeshConfig, make_mesh


@pytest.fixture(scope="module")
def layout():
    return Layout(make_mesh(MeshConfig(data=2, expert=4)))


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        ("VD", P(None, ("data", "expert"))),
        ("LDNH", P(None, ("data", "expert"), None, None)),
        ("EDF", P("expert", ("data",), None)),
        ("LEFD", P(None, "expert", None, ("data",))),
        ("DE", P(("data", "expert"), None)),
        ("D", P()),
        ("LH", P()),
    ],
)
def test_weights_at_rest(layout, axes, spec):
    assert layout.stored_spec(axes) == spec


def test_activations_are_split_over_the_batch(layout):
    assert layout.activation_spec("BTD") == P(("replica", "data", "expert"), None, None)


def test_experts_stay_where_they_live_when_used(layout):
    assert layout.used_spec("EDF") == P("expert")
    assert layout.used_spec("DE") == P()


def test_a_size_that_does_not_divide_names_axis_size_and_remedy(layout):
    with pytest.raises(LayoutError, match=r"axis D of w_VD has size 12.*data=2 x expert=4 = 8.*multiple of 8"):
        layout.stored("VD", (100, 12))


def test_without_a_mesh_nothing_happens():
    x = np.ones((2, 3))
    assert SINGLE_DEVICE.constrain(x, "BT") is x
    assert SINGLE_DEVICE.gather(x, "DF") is x
    assert SINGLE_DEVICE.stored("DF", (2, 3)) is None
    assert SINGLE_DEVICE.batch_shards == 1
