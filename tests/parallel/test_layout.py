import re

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from parallel.layout import SINGLE_DEVICE, Layout, LayoutConfig, LayoutError
from parallel.mesh import MeshConfig, make_mesh

BATCH = ("replica", "data", "expert")
FSDP = ("data", "expert", "sequence", "stage")


@pytest.fixture(scope="module")
def layout():
    """Of more devices than are here, with all axes on."""
    axes = tuple(MeshConfig().sizes)
    return Layout(AbstractMesh((2,) * len(axes), axes))


def with_config(layout: Layout, **settings) -> Layout:
    return Layout(layout.mesh, LayoutConfig(**settings))


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        ("VD", P(("tensor",), FSDP)),
        ("LDNH", P(None, FSDP, ("tensor",), None)),
        ("NHD", P(("tensor",), None, FSDP)),
        ("EDF", P(("expert",), ("data", "sequence", "stage"), ("tensor",))),
        ("LEFD", P(None, ("expert",), ("tensor",), ("data", "sequence", "stage"))),
        ("DE", P(FSDP, None)),
        ("D", P()),
        ("LH", P()),
    ],
)
def test_weights_at_rest(layout, axes, spec):
    assert layout.stored_spec(axes) == spec


@pytest.mark.parametrize(
    ("experts", "spec"),
    [
        (("data",), P(("data",), ("expert", "sequence", "stage"), ("tensor",))),
        (("data", "expert"), P(("data", "expert"), ("sequence", "stage"), ("tensor",))),
        (("expert", "tensor"), P(("expert", "tensor"), ("data", "sequence", "stage"), None)),
        ((), P(None, FSDP, ("tensor",))),
    ],
)
def test_experts_over_any_axes_and_what_these_leave(layout, experts, spec):
    assert with_config(layout, experts=experts).stored_spec("EDF") == spec
    # Attention does not follow.
    assert with_config(layout, experts=experts).stored_spec("DNH") == layout.stored_spec("DNH")


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_each_stage_of_zero_shares_out_one_thing_more(layout, zero):
    layout = with_config(layout, zero=zero)
    fine, whole = P(None, FSDP, ("tensor",), None), P(None, None, ("tensor",), None)
    assert layout.sharded_spec("LDNH") == fine
    assert layout.gradient_spec("LDNH") == (fine if zero >= 2 else whole)
    assert layout.stored_spec("LDNH") == (fine if zero == 3 else whole)
    assert layout.used_spec("LDNH") == whole


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        ("BTD", P(BATCH, ("sequence", "tensor"), None)),
        ("LBTD", P(None, BATCH, ("sequence", "tensor"), None)),
        ("BTE", P(BATCH, ("sequence", "tensor"), None)),
        ("BSE", P(BATCH, None, None)),
        ("BT", P(BATCH, ("sequence",))),
        ("BTNH", P(BATCH, ("sequence",), ("tensor",), None)),
        ("BSNH", P(BATCH, None, ("tensor", "sequence"), None)),
        ("BGSMH", P(BATCH, None, None, ("tensor", "sequence"), None)),
        ("BMGSH", P(BATCH, ("tensor", "sequence"), None, None, None)),
    ],
)
def test_activations(layout, axes, spec):
    assert layout.activation_spec(axes) == spec


def test_a_ring_leaves_the_heads_together(layout):
    assert with_config(layout, sequence="ring").activation_spec("BSNH") == P(BATCH, None, ("tensor",), None)


def test_a_sequence_that_does_not_divide_stays_whole():
    layout = Layout(make_mesh(MeshConfig(sequence=2, tensor=2)))
    assert layout.for_length(8) == layout
    assert layout.for_length(6).activation_spec("BTD") == P(None, ("sequence",), None)
    assert layout.for_length(1).activation_spec("BTD") == P(None, None, None)
    lengths = [(8, True), (8, False), (6, False), (1, False)]
    assert [layout.for_length(n).tokens_length(n, gathered=gathered) for n, gathered in lengths] == [4, 2, 3, 1]


def test_experts_stay_where_they_live_when_used(layout):
    assert layout.used_spec("EDF") == P(("expert",), None, ("tensor",))
    assert layout.used_spec("DE") == P(None, None)


@pytest.mark.parametrize(
    ("axes", "shape", "sentence"),
    [
        ("VD", (100, 6), "axis D of w_VD has size 6, which does not divide over data=2 x expert=2 x sequence=2 x "
         "stage=2 = 16: "),
        ("DMH", (16, 3, 2), "axis M of w_DMH has size 3, which does not divide over tensor=2 = 2: make it a multiple "
         "of 2, or use a mesh of 1 along these axes"),
    ],
)  # fmt: skip
def test_a_size_that_does_not_divide_names_axis_size_and_remedy(layout, axes, shape, sentence):
    with pytest.raises(LayoutError, match=re.escape(sentence)):
        layout.stored(axes, shape)


@pytest.mark.parametrize("experts", [("dat",), ("data", "data")])
def test_experts_over_axes_that_are_none(experts):
    with pytest.raises(LayoutError, match="give each once, of stage, replica, data, expert, sequence, tensor"):
        LayoutConfig(experts=experts)


def test_stages_of_zero_are_three():
    with pytest.raises(LayoutError, match=r"layout.zero=0: give 1 \(optimizer states\).*mesh.replica"):
        LayoutConfig(zero=0)


def test_states_on_hosts_that_have_no_such_memory(monkeypatch):
    layout = Layout(make_mesh(MeshConfig(data=2)))
    monkeypatch.setattr("parallel.layout.HOST_MEMORY", "moon")
    with pytest.raises(
        LayoutError, match=r"needs moon memory, and the memories of these cpu devices are device.*'devi"
    ):
        with_config(layout, optimizer_states="host")


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


def test_work_that_stages_would_only_repeat_is_refused():
    layout = Layout(make_mesh(MeshConfig(stage=2)))
    with pytest.raises(
        LayoutError, match="generation over mesh.stage=2: .* along mesh.tensor, mesh.expert or mesh.data"
    ):
        layout.refuse_stages("generation")
    Layout(make_mesh(MeshConfig(tensor=2))).refuse_stages("generation")
