import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.model.config import ModelConfig, RouterConfig
from moe.model.execution import Execution
from moe.model.moe_layer import MoELayer
from moe.model.precision import FULL
from moe.model.randomness import Purpose, layer_key
from moe.model.router import capacity, limit_capacity
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
        return jnp.sin(y_BTD).sum() + stats.aux_loss + stats.z_loss, (y_BTD, stats._replace(wire_bytes=None))

    gradients, told = jax.jit(jax.grad(scalar, argnums=(0, 1), has_aux=True))(weights, x_BTD)
    return told, gradients


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("exchange", ["padded", "gathered"])
def test_every_mesh_gives_the_single_devices_numbers(name, exchange):
    layer = layer_of(ROUTERS[name], Execution(exchange=exchange))
    x_BTD, valid_BT = inputs()
    alone = value_and_gradients(layer, x_BTD, valid_BT, SINGLE_DEVICE)
    meshes = MESHES if exchange == "padded" else {"expert=8": MESHES["expert=8"]}
    for mesh in meshes.values():
        layout = Layout(make_mesh(mesh))
        spread = value_and_gradients(layer, x_BTD, valid_BT, layout)
        assert_trees_equal_to_scale(spread, alone)


@pytest.mark.parametrize("exchange", ["padded", "gathered"])
@pytest.mark.parametrize("experts", [("data", "expert"), ("data", "tensor")])
def test_experts_over_a_product_of_axes(experts, exchange):
    layer = layer_of(ROUTERS["capacity top-2"], Execution(exchange=exchange))
    x_BTD, valid_BT = inputs()
    layout = Layout(make_mesh(MeshConfig(data=2, expert=2, tensor=2)), LayoutConfig(experts=experts))
    spread = value_and_gradients(layer, x_BTD, valid_BT, layout)
    assert_trees_equal_to_scale(spread, value_and_gradients(layer, x_BTD, valid_BT, SINGLE_DEVICE))


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


@pytest.mark.parametrize(("exchange", "rows"), [("padded", 2 * T * 2), ("gathered", 2 * T * 2)])
def test_bytes_on_the_wire(exchange, rows):
    layer = layer_of(RouterConfig(top_k=2), Execution(exchange=exchange))
    layout = Layout(make_mesh(MeshConfig(expert=4)))
    _, stats = apply(layer, *inputs(), layout)
    # Dropless: each of the 3 others gets a block of all R = A·K rows of a device; 4 bytes; 4 journeys.
    assert float(stats.wire_bytes) == 4 * 3 * rows * D * 4
    _, alone = apply(layer, *inputs())
    assert float(alone.wire_bytes) == 0


def test_capacity_bounds_the_bytes_on_the_wire():
    layout = Layout(make_mesh(MeshConfig(expert=4)))
    _, dropless = apply(layer_of(RouterConfig(top_k=2)), *inputs(), layout)
    _, limited = apply(layer_of(RouterConfig(top_k=2, capacity_factor=1.0)), *inputs(), layout)
    # Blocks of E/P · C = 2 · ceil(2 · 12 / 8) rows a sequence instead of all 24.
    assert float(limited.wire_bytes) == float(dropless.wire_bytes) * 6 / 24
