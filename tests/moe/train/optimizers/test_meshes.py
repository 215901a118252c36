"""Every optimizer takes on a mesh the steps that it takes on a single device, and keeps its states shared out."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.model.parameter import ParameterSpec
from moe.train.optimizer import OptimizerConfig
from moe.train.optimizers.muon import orthogonalized
from moe.train.state import optimizer_shardings
from parallel.layout import SINGLE_DEVICE, Layout, LayoutConfig, LayoutError
from parallel.mesh import MeshConfig, make_mesh
from tests.closeness import assert_trees_equal_to_scale
from tests.moe.train.optimizers.shapes import steps_on

OPTIMIZERS = {
    "int8": ("float32", {"states": "int8"}),
    "fp8": ("float32", {"states": "fp8"}),
    "stochastic": ("bfloat16", {"rounding": "stochastic"}),
    "kahan": ("bfloat16", {"rounding": "kahan", "states": "int8"}),
    "adafactor": ("float32", {"kind": "adafactor"}),
    "muon": ("float32", {"kind": "muon"}),
    "muon in int8": ("float32", {"kind": "muon", "states": "int8"}),
}
MESHES = {
    "split every way": (MeshConfig(data=2, expert=2, tensor=2), LayoutConfig()),
    "copies": (MeshConfig(replica=2, data=2, expert=2), LayoutConfig(zero=1)),
    "stages": (MeshConfig(stage=2, data=2, tensor=2), LayoutConfig(experts=("data", "tensor"))),
}
QUICK = {("muon", "stages")}


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(name, mesh, marks=[pytest.mark.slow] * ((name, mesh) not in QUICK))
        for name in OPTIMIZERS
        for mesh in MESHES
    ],
)
def test_steps_are_those_of_one_device(name, mesh):
    dtype, settings = OPTIMIZERS[name]
    # Gradients are the same to the last bit here. A step may differ in a parameter's last one, as XLA fuses it,
    # and what rounding to bfloat16 lost is smaller than a parameter by 2^9.
    config = OptimizerConfig(warmup_steps=0, clip_norm=None, **settings)
    spread = steps_on(Layout(make_mesh(MESHES[mesh][0]), MESHES[mesh][1]), config, dtype)
    alone = steps_on(SINGLE_DEVICE, config, dtype)
    assert_trees_equal_to_scale(spread, alone, tolerance=2**9 * 2**-24)
    for x in jax.tree.leaves(spread[1]):
        # All but vectors and means over one of a matrix's sides; scales as their values.
        if x.ndim > 2 and 1 not in x.shape:
            assert x.addressable_shards[0].data.size <= x.size / 4


def test_blocks_that_a_device_would_have_a_part_of_are_refused():
    specs = {"w_DF": ParameterSpec((32, 192), jnp.dtype("float32"), "DF", "dense")}
    layout = Layout(make_mesh(MeshConfig(tensor=8)))
    blocks = {"w_DF": (jax.ShapeDtypeStruct((32, 192), jnp.uint8), jax.ShapeDtypeStruct((32, 4), jnp.float32))}
    with pytest.raises(LayoutError, match="axis F of w_DF has size 4, which does not divide over tensor=8"):
        optimizer_shardings(blocks, specs, layout)


@pytest.mark.parametrize(
    ("axes", "shape", "mesh", "share"),
    [
        ("LEDF", (2, 4, 16, 24), MeshConfig(data=2, expert=4), 1),
        ("LDNH", (8, 16, 8, 4), MeshConfig(data=2, expert=2, tensor=2), 1),
        ("LNHD", (16, 8, 4, 16), MeshConfig(replica=2, data=2, tensor=2), 2),
        ("LDF", (3, 16, 24), MeshConfig(data=8), 1),
    ],
)
def test_no_device_orthogonalizes_more_than_its_share(axes, shape, mesh, share):
    """The compiled program's products have `share` matrices a device, of all that there are."""
    layout = Layout(make_mesh(mesh))
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    where = layout.optimizer_state(axes, shape)
    jitted = jax.jit(lambda x: orthogonalized(x, axes, layout), in_shardings=where, out_shardings=where)
    program = jitted.lower(x).compile()
    text = program.as_text()
    products = [int(count) for count in re.findall(r"= f32\[(\d+),\d+,\d+\]\S* dot\(", text)]
    products += [1] * len(re.findall(r"= f32\[\d+,\d+\]\S* dot\(", text))
    assert len(products) == 3 * 5
    assert set(products) == {share}
    matrices = math.prod(shape[: 2 if "E" in axes else 1])
    assert share == math.ceil(matrices / 8)
    assert "all-to-all" in text
    assert_trees_equal_to_scale(program(jax.device_put(x, where)), orthogonalized(x, axes, SINGLE_DEVICE), 5e-5)
