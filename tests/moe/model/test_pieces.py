import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.model.config import ModelConfig
from moe.model.execution import Execution
from moe.model.parameter import quantized, specs_of, stored
from moe.model.pieces import load, parameters, pieces, unrolled
from moe.model.precision import FULL
from moe.model.transformer import Transformer
from moe.train.trained import ArraySource
from parallel.layout import SINGLE_DEVICE, Layout, LayoutConfig
from parallel.mesh import MeshConfig, make_mesh

CONFIG = ModelConfig(
    vocab_size=24, d_model=16, num_layers=5, num_heads=2, num_kv_heads=2, head_dim=8, num_experts=4, d_expert=8,
    cla_factor=2, num_dense_layers=1, d_dense=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return Transformer(CONFIG, FULL, Execution(), rngs=nnx.Rngs(0))


def test_pieces_make_up_every_parameter_in_the_order_of_memory(model):
    specs = specs_of(model)
    for path, spec in parameters(specs):
        own = [piece for piece in pieces(CONFIG, specs) if piece.path == path]
        assert sum(int(np.prod(piece.shape)) for piece in own) == np.prod(spec.shape)
        assert [piece.index for piece in own] == sorted(piece.index for piece in own)
    layers = {piece.layer for piece in pieces(CONFIG, specs)}
    assert layers == {None, 0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("mesh", "config"),
    [
        (None, LayoutConfig()),
        (MeshConfig(data=2, expert=4), LayoutConfig()),
        (MeshConfig(replica=2, expert=2), LayoutConfig(zero=1)),
        (MeshConfig(data=8), LayoutConfig()),
        (MeshConfig(data=2, expert=2, tensor=2), LayoutConfig()),
        (MeshConfig(data=2, expert=2, tensor=2), LayoutConfig(experts=("data", "tensor"), zero=2)),
    ],
)
def test_parameters_arrive_whole_where_the_layout_says(model, mesh, config):
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    layout = SINGLE_DEVICE if mesh is None else Layout(make_mesh(mesh), config)
    specs = specs_of(model)
    loaded = load(ArraySource(params), CONFIG, specs, layout)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    for path, spec in parameters(specs):
        array = loaded
        for key in path:
            array = array[key]
        wanted = layout.stored(spec.axes, spec.shape)
        assert wanted is None or array.sharding == wanted


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, expert=4)])
@pytest.mark.parametrize("format", [None, "int8"])
def test_parameters_arrive_as_an_unrolled_model_has_them(model, mesh, format):
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    layout = SINGLE_DEVICE if mesh is None else Layout(make_mesh(mesh))
    stacked = load(ArraySource(params), CONFIG, specs_of(model), layout, None, format)
    found = load(ArraySource(params), CONFIG, specs_of(model), layout, None, format, unrolled=True)
    jax.tree.map(np.testing.assert_array_equal, found, unrolled(stacked))
    apart = nnx.clone(model)
    apart.unroll()
    assert [len(stack["blocks"]) for stack in found["stacks"].values()] == [2, 2, 1]
    if format is None:
        jax.tree.map(np.testing.assert_array_equal, found, nnx.to_pure_dict(nnx.state(apart, nnx.Param)))
    if mesh is not None:
        where = stored(found, specs_of(apart), layout)
        assert jax.tree.all(jax.tree.map(lambda x, wanted: x.sharding.is_equivalent_to(wanted, x.ndim), found, where))


def test_each_piece_is_read_once(model):
    read = []

    class Counting(ArraySource):
        def read(self, piece):
            read.append(piece)
            return super().read(piece)

    source = Counting(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    load(source, CONFIG, specs_of(model), Layout(make_mesh(MeshConfig(data=2, expert=4))))
    assert len(read) == len(set(read)) == len(pieces(CONFIG, specs_of(model)))


@pytest.mark.parametrize(
    ("mesh", "format"),
    [(None, "int8"), (MeshConfig(data=2, expert=4), "int4"), (MeshConfig(data=2, expert=2, tensor=2), "int8")],
)
def test_matrices_are_quantized_as_they_arrive(model, mesh, format):
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    layout = SINGLE_DEVICE if mesh is None else Layout(make_mesh(mesh))
    specs = specs_of(model)
    loaded = load(ArraySource(params), CONFIG, specs, layout, jnp.bfloat16, format)
    for path, spec in parameters(specs):
        found, stored = loaded, params
        for key in path:
            found, stored = found[key], stored[key]
        if spec.kind in ("embedding", "norm", "router"):
            assert found.dtype == jnp.bfloat16
            continue
        expected = quantized(stored, spec.axes.removeprefix("L"), format)
        assert (found.format, found.shape) == (format, spec.shape)
        np.testing.assert_array_equal(found.values, expected.values)
        np.testing.assert_allclose(found.scales.astype(jnp.float32), expected.scales.astype(jnp.float32), rtol=1e-6)
        wanted = layout.stored(spec.axes, spec.shape)
        assert wanted is None or found.values.sharding.is_equivalent_to(wanted, len(spec.shape))
