import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from parallel.layout import SINGLE_DEVICE, Layout, LayoutConfig, LayoutError
from parallel.mesh import MeshConfig, make_mesh

BATCH = ("replica", "data", "expert")


@pytest.fixture(scope="module")
def layout():
    return Layout(make_mesh(MeshConfig(data=2, expert=2, tensor=2)))


def with_config(layout: Layout, **settings) -> Layout:
    return Layout(layout.mesh, LayoutConfig(**settings))


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        ("VD", P(("tensor",), ("data", "expert"))),
        ("LDNH", P(None, ("data", "expert"), ("tensor",), None)),
        ("NHD", P(("tensor",), None, ("data", "expert"))),
        ("EDF", P(("expert",), ("data",), ("tensor",))),
        ("LEFD", P(None, ("expert",), ("tensor",), ("data",))),
        ("DE", P(("data", "expert"), None)),
        ("D", P()),
        ("LH", P()),
    ],
)
def test_weights_at_rest(layout, axes, spec):
    assert layout.stored_spec(axes) == spec


@pytest.mark.parametrize(
    ("experts", "spec"),
    [
        (("data",), P(("data",), ("expert",), ("tensor",))),
        (("data", "expert"), P(("data", "expert"), None, ("tensor",))),
        (("expert", "tensor"), P(("expert", "tensor"), ("data",), None)),
        ((), P(None, ("data", "expert"), ("tensor",))),
    ],
)
def test_experts_over_any_axes_and_what_these_leave(layout, experts, spec):
    assert with_config(layout, experts=experts).stored_spec("EDF") == spec
    # Attention does not follow.
    assert with_config(layout, experts=experts).stored_spec("DNH") == layout.stored_spec("DNH")


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_each_stage_of_zero_shares_out_one_thing_more(layout, zero):
    layout = with_config(layout, zero=zero)
    fine, whole = P(None, ("data", "expert"), ("tensor",), None), P(None, None, ("tensor",), None)
    assert layout.sharded_spec("LDNH") == fine
    assert layout.gradient_spec("LDNH") == (fine if zero >= 2 else whole)
    assert layout.stored_spec("LDNH") == (fine if zero == 3 else whole)
    assert layout.used_spec("LDNH") == whole


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        ("BTD", P(BATCH, ("tensor",), None)),
        ("LBTD", P(None, BATCH, ("tensor",), None)),
        ("BT", P(BATCH, None)),
        ("BTE", P(BATCH, None, None)),
        ("BTNH", P(BATCH, None, ("tensor",), None)),
        ("BGSMH", P(BATCH, None, None, ("tensor",), None)),
    ],
)
def test_activations(layout, axes, spec):
    assert layout.activation_spec(axes) == spec


def test_a_sequence_that_does_not_divide_stays_whole(layout):
    assert layout.for_length(6) == layout
    assert layout.for_length(1).activation_spec("BTD") == P(BATCH, None, None)
    assert (layout.for_length(6).sequence_length(6), layout.for_length(5).sequence_length(5)) == (3, 5)


def test_experts_stay_where_they_live_when_used(layout):
    assert layout.used_spec("EDF") == P(("expert",), None, ("tensor",))
    assert layout.used_spec("DE") == P(None, None)


@pytest.mark.parametrize(
    ("axes", "shape", "sentence"),
    [
        ("VD", (100, 6), "axis D of w_VD has size 6, which does not divide over data=2 x expert=2 = 4: make it a mul"),
        ("DMH", (8, 3, 2), "axis M of w_DMH has size 3, which does not divide over tensor=2 = 2: make it a multiple of "
         "2, or use a mesh of 1 along these axes"),
    ],
)  # fmt: skip
def test_a_size_that_does_not_divide_names_axis_size_and_remedy(layout, axes, shape, sentence):
    with pytest.raises(LayoutError, match=re.escape(sentence)):
        layout.stored(axes, shape)


@pytest.mark.parametrize("experts", [("dat",), ("data", "data")])
def test_experts_over_axes_that_are_none(experts):
    with pytest.raises(LayoutError, match="give each once, of replica, data, expert, tensor"):
        LayoutConfig(experts=experts)


def test_stages_of_zero_are_three():
    with pytest.raises(LayoutError, match=r"layout.zero=0: give 1 \(optimizer states\).*mesh.replica"):
        LayoutConfig(zero=0)


def test_a_mesh_may_lack_axes():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    layout = Layout(mesh)
    assert layout.batch_shards == 4
    assert layout.stored_spec("EDF") == P(("expert",), ("data",), None)


def test_without_a_mesh_nothing_happens():
    x = np.ones((2, 3))
    assert SINGLE_DEVICE.constrain(x, "BT") is x
    assert SINGLE_DEVICE.gather(x, "DF") is x
    assert SINGLE_DEVICE.stored("DF", (2, 3)) is None
    assert SINGLE_DEVICE.batch_shards == 1
