import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.model.config import ConfigError, ModelConfig, RouterConfig
from moe.model.execution import Execution
from moe.model.moe_layer import MoELayer, chunk_limit
from moe.model.precision import FULL
from moe.model.randomness import Purpose, layer_key
from moe.model.router import capacity, limit_capacity
from parallel.exchange import BACKENDS
from parallel.layout import SINGLE_DEVICE, Layout, LayoutConfig
from parallel.mesh import MeshConfig, make_mesh
from tests.closeness import assert_trees_equal_to_scale
from tests.oracle import moe as oracle

B, T, D, E, F = 8, 12, 16, 8, 20
ROUTERS = {
    "dropless top-1": RouterConfig(),
    "dropless top-3": RouterConfig(top_k=3),
    "capacity top-1": RouterConfig(capacity_factor=1.0),
    "capacity top-2": RouterConfig(top_k=2, capacity_factor=1.25),
    "recycle": RouterConfig(capacity_factor=1.0, overflow="recycle"),
    "bias": RouterConfig(top_k=2, balance="bias"),
}
MESHES = {
    "expert=8": MeshConfig(expert=8),
    "data=2,expert=4": MeshConfig(data=2, expert=4),
    "replica=2,data=2,expert=2": MeshConfig(replica=2, data=2, expert=2),
    "data=8": MeshConfig(data=8),
}


def config_of(router: RouterConfig, shared: int = 1) -> ModelConfig:
    return ModelConfig(
        vocab_size=10, d_model=D, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2,
        num_experts=E, d_expert=F, num_shared_experts=shared, init_std=0.4, router=router,
    )  # fmt: skip


def layer_of(router: RouterConfig, execution: Execution | None = None, shared: int = 1) -> MoELayer:
    return MoELayer(config_of(router, shared), FULL, execution or Execution(), rngs=nnx.Rngs(0))


def experts_of(layer: MoELayer) -> tuple[nnx.Param, nnx.Param, nnx.Param]:
    return layer.experts.w_gate_EDF, layer.experts.w_up_EDF, layer.experts.w_down_EFD


def inputs(valid_share: float = 0.9):
    x_BTD = jax.random.normal(jax.random.key(1), (B, T, D))
    valid_BT = jax.random.uniform(jax.random.key(2), (B, T)) < valid_share
    return x_BTD, valid_BT


@functools.partial(jax.jit, static_argnums=(0, 4))
def _apply(graph, weights, x_BTD, valid_BT, layout: Layout):
    return nnx.merge(graph, weights)(x_BTD, valid_BT, jnp.int32(3), jax.random.key(7), layout)


def apply(layer: MoELayer, x_BTD, valid_BT, layout: Layout = SINGLE_DEVICE):
    return _apply(*nnx.split(layer), x_BTD, valid_BT, layout)


@pytest.mark.parametrize("name", ROUTERS)
def test_output_is_the_oracles(name):
    router = ROUTERS[name]
    layer = layer_of(router)
    x_BTD, valid_BT = inputs()
    y_BTD, stats = apply(layer, x_BTD, valid_BT)

    routing = layer.router(x_BTD, valid_BT, SINGLE_DEVICE)
    experts_BTK, weights_BTK = routing.experts_BTK, routing.weights_BTK
    slots = capacity(router, E, T)
    if slots is not None:
        key = layer_key(jax.random.key(7), 3, Purpose.RECYCLE)
        experts_BTK, weights_BTK, _, _ = limit_capacity(routing, router, slots, key)
        over = stats.recycled if router.overflow == "recycle" else stats.dropped
        assert float(over) > 0
    x_AD = np.asarray(x_BTD, np.float64).reshape(-1, D)
    expected_AD = oracle.routed(
        x_AD,
        np.asarray(experts_BTK).reshape(-1, router.top_k),
        np.asarray(weights_BTK).reshape(-1, router.top_k),
        *(np.asarray(w[...], np.float64) for w in experts_of(layer)),
    )
    shared = [
        np.asarray(w[...], np.float64) for w in (layer.shared.w_gate_DF, layer.shared.w_up_DF, layer.shared.w_down_FD)
    ]
    expected_AD += np.stack([oracle.swiglu(x_D, *shared) for x_D in x_AD])
    np.testing.assert_allclose(y_BTD.reshape(-1, D), expected_AD, atol=1e-4)


def value_and_gradients(layer: MoELayer, x_BTD, valid_BT, layout: Layout):
    """y, the statistics, and the gradients of a scalar that every output and both losses take part in."""
    graph, weights = nnx.split(layer)

    def scalar(weights, x_BTD):
        y_BTD, stats = apply(nnx.merge(graph, weights), x_BTD, valid_BT, layout)
        return jnp.sin(y_BTD).sum() + stats.aux_loss + stats.z_loss, (
            y_BTD,
            stats._replace(wire_bytes=None, across_bytes=None),
        )

    gradients, told = jax.jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))(weights, x_BTD)
    return told, gradients


@functools.cache
def on_one_device(name: str):
    return value_and_gradients(layer_of(ROUTERS[name]), *inputs(), SINGLE_DEVICE)


# Each router on one mesh, and each mesh with a router.
QUICK_MESHES = set(zip(ROUTERS, itertools.cycle(MESHES)))


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(*case, marks=[] if case in QUICK_MESHES else pytest.mark.slow, id="-".join(case))
        for case in itertools.product(ROUTERS, MESHES)
    ],
)
def test_every_mesh_gives_the_single_devices_numbers(name, mesh):
    spread = value_and_gradients(layer_of(ROUTERS[name]), *inputs(), Layout(make_mesh(MESHES[mesh])))
    assert_trees_equal_to_scale(spread, on_one_device(name))


QUICK = {("dropless top-3", "hierarchical", 2), ("capacity top-2", "ragged", 1), ("dropless top-3", "gathered", 1)}


@pytest.mark.parametrize(
    ("name", "exchange", "chunks"),
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow, id="-".join(map(str, case)))
        for case in itertools.product(("dropless top-3", "capacity top-2", "recycle"), BACKENDS, (1, 2))
    ],
)
def test_every_exchange_whole_and_in_chunks_gives_the_single_devices_numbers(name, exchange, chunks):
    layer = layer_of(ROUTERS[name], Execution(exchange=exchange, exchange_chunks=chunks, devices_per_node=2))
    spread = value_and_gradients(layer, *inputs(), Layout(make_mesh(MeshConfig(expert=8))))
    assert_trees_equal_to_scale(spread, on_one_device(name))


@pytest.mark.parametrize("name", ["capacity top-2", pytest.param("recycle", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("exchange", "mesh"),
    [
        ("padded", None),
        pytest.param("ragged", MeshConfig(data=2, expert=4), marks=pytest.mark.slow),
        pytest.param("hierarchical", MeshConfig(data=2, expert=4), marks=pytest.mark.slow),
        pytest.param("padded", MeshConfig(expert=4, tensor=2), marks=pytest.mark.slow),
    ],
)
def test_weighing_before_the_down_projection_gives_the_same_numbers(name, exchange, mesh):
    execution = Execution(exchange=exchange, gate="before", devices_per_node=2)
    layout = SINGLE_DEVICE if mesh is None else Layout(make_mesh(mesh))
    found = value_and_gradients(layer_of(ROUTERS[name], execution), *inputs(), layout)
    assert_trees_equal_to_scale(found, on_one_device(name))


@pytest.mark.parametrize(
    ("experts", "exchange"),
    [
        (("data", "expert"), "padded"),
        pytest.param(("data", "tensor"), "hierarchical", marks=pytest.mark.slow),
        pytest.param(("expert", "data"), "ragged_hierarchical", marks=pytest.mark.slow),
    ],
)
def test_experts_over_a_product_of_axes(experts, exchange):
    layer = layer_of(ROUTERS["capacity top-2"], Execution(exchange=exchange, devices_per_node=2))
    layout = Layout(make_mesh(MeshConfig(data=2, expert=2, tensor=2)), LayoutConfig(experts=experts))
    assert_trees_equal_to_scale(value_and_gradients(layer, *inputs(), layout), on_one_device("capacity top-2"))


@pytest.mark.parametrize(
    ("sequences", "length", "slots", "chunks", "limit"),
    [
        (4, 12, None, 1, 48),
        (4, 12, None, 8, 6),
        (4, 12, 5, 1, 20),
        (4, 12, 5, 2, 10),  # two whole sequences
        (4, 12, 5, 8, 5),  # within one sequence
        (4, 12, 5, 6, 8),  # 8 tokens of up to two sequences: all of them
        (4, 12, 1, 6, 2),
        (4, 12, 1, 3, 3),  # 16 tokens of up to three sequences
    ],
)
def test_an_expert_never_takes_more_of_a_chunk_than_the_limit(sequences, length, slots, chunks, limit):
    assert chunk_limit(sequences, length, slots, chunks) == limit
    size, most = sequences * length // chunks, slots or length
    for first in range(0, sequences * length, size):
        touched = np.bincount(np.arange(first, first + size) // length)
        assert np.minimum(touched, most).sum() <= limit


def test_chunks_that_do_not_divide_name_what_would():
    with pytest.raises(ConfigError, match=r"exchange_chunks=5 does not divide the 4 x 12 tokens .* 1, 2, 3, 4, 6, 8"):
        chunk_limit(4, 12, None, 5)


def test_gradients_are_those_of_finite_differences():
    layer = layer_of(ROUTERS["capacity top-2"])
    x_BTD, valid_BT = inputs()
    graph, weights = nnx.split(layer)
    direction = jax.random.normal(jax.random.key(3), layer.experts.w_up_EDF.shape)

    def scalar(step):
        moved = nnx.to_pure_dict(weights)
        moved["experts"]["w_up_EDF"] += step * direction
        return jnp.sin(apply(nnx.merge(graph, moved), x_BTD, valid_BT)[0]).sum()

    slope = (scalar(1e-3) - scalar(-1e-3)) / 2e-3
    np.testing.assert_allclose(jax.grad(scalar)(0.0), slope, rtol=1e-2)


def test_router_learns_through_the_weights_of_its_choice():
    layer = layer_of(RouterConfig())
    _, (weights, _) = value_and_gradients(layer, *inputs(), SINGLE_DEVICE)
    assert float(jnp.abs(weights.router.w_DE[...]).max()) > 0


@settings(max_examples=15, deadline=None)
@given(favourite=st.integers(0, E - 1), top_k=st.integers(1, 2), factor=st.sampled_from([None, 0.3, 1.0, 8.0]))
def test_all_tokens_for_one_expert(favourite, top_k, factor):
    router = RouterConfig(top_k=top_k, capacity_factor=factor)
    layer = layer_of(router)
    layer.router.w_DE[...] = jnp.zeros((D, E)).at[:, favourite].set(1.0)
    x_BTD = jnp.abs(inputs()[0])
    y_BTD, stats = apply(layer, x_BTD, jnp.ones((B, T), bool))
    spread, _ = apply(layer, x_BTD, jnp.ones((B, T), bool), Layout(make_mesh(MESHES["data=2,expert=4"])))
    np.testing.assert_allclose(y_BTD, spread, atol=1e-5)
    np.testing.assert_allclose(stats.load_E[favourite], 1 / top_k, rtol=1e-6)
    if factor is None:
        assert float(stats.dropped) == 0


def test_only_padding():
    layer = layer_of(RouterConfig(), shared=0)
    y_BTD, stats = apply(layer, inputs()[0], jnp.zeros((B, T), bool))
    assert float(jnp.abs(y_BTD).max()) == 0
    assert all(bool(jnp.isfinite(x).all()) for x in stats)


def test_bytes_on_the_wire():
    layer = layer_of(RouterConfig(top_k=2), Execution(devices_per_node=2))
    _, stats = apply(layer, *inputs(), Layout(make_mesh(MeshConfig(expert=4))))
    # Dropless: each of the 3 others gets a block of all R = A·K rows of a device; 4 bytes; 4 journeys; and once the
    # counts of its two experts.
    block = 4 * (2 * T * 2) * D * 4 + 2 * 4
    assert float(stats.wire_bytes) == 3 * block
    assert float(stats.across_bytes) == 2 * block
    _, alone = apply(layer, *inputs())
    assert float(alone.wire_bytes) == float(alone.across_bytes) == 0


def test_capacity_bounds_the_bytes_on_the_wire():
    layout = Layout(make_mesh(MeshConfig(expert=4)))
    _, dropless = apply(layer_of(RouterConfig(top_k=2)), *inputs(), layout)
    _, limited = apply(layer_of(RouterConfig(top_k=2, capacity_factor=1.0)), *inputs(), layout)
    # Blocks of E/P · C = 2 · ceil(2 · 12 / 8) rows a sequence instead of all 24; the counts of two experts as before.
    counts = 3 * 2 * 4
    assert float(limited.wire_bytes) - counts == (float(dropless.wire_bytes) - counts) * 6 / 24
