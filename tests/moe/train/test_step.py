import dataclasses
import functools
import itertools

import jax
import numpy as np
import optax
import pytest

from moe.model.config import ModelConfig, RopeConfig, RouterConfig
from moe.model.execution import Execution
from moe.model.parameter import QUANTIZED_KINDS, is_spec
from moe.model.precision import FULL, Precision
from moe.train.data import Batch
from moe.train.optimizer import OptimizerConfig
from moe.train.state import Blueprint, make_blueprint
from moe.train.step import make_evaluation_step, make_train_step, place_batch
from parallel.exchange import BACKENDS
from parallel.layout import SINGLE_DEVICE, Layout, LayoutConfig
from parallel.mesh import MeshConfig, make_mesh
from tests.closeness import assert_trees_equal_to_scale
from tests.oracle.blocks import on_the_wire

B, T = 16, 24
SMALL = ModelConfig(
    vocab_size=96,
    d_model=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=8,
    d_expert=24,
    cla_factor=2,
    init_std=0.1,
    rope=RopeConfig(ntk_alpha=1000.0),
)
ROUTERS = {
    "dropless": RouterConfig(top_k=2, z_loss_weight=1e-3),
    "capacity": RouterConfig(top_k=2, capacity_factor=1.0),
    "recycle": RouterConfig(capacity_factor=1.0, overflow="recycle"),
    "bias": RouterConfig(balance="bias"),
}
# Keeps the gradients as its state, and moves nothing.
RECORDER = optax.chain(optax.trace(decay=0.0), optax.scale(0.0))


def batch_of(seed: int = 0) -> Batch:
    r = np.random.default_rng(seed)
    tokens_BT = r.integers(0, SMALL.vocab_size, (B, T)).astype(np.int32)
    segments_BT = np.where(np.arange(T) < r.integers(1, T, (B, 1)), 1, 2).astype(np.int32)
    segments_BT[:2, 20:] = 0
    starts_BT = np.where(segments_BT == 2, (segments_BT == 1).sum(1, keepdims=True), 0)
    positions_BT = (np.arange(T) - starts_BT).astype(np.int32)
    targets_BT = np.roll(tokens_BT, -1, axis=1)
    weights_BT = ((segments_BT > 0) & (np.roll(segments_BT, -1, axis=1) == segments_BT)).astype(np.float32)
    weights_BT[:, -1] = 0
    return Batch(tokens_BT, targets_BT, positions_BT, segments_BT, weights_BT)


def blueprint_of(
    router: RouterConfig,
    mesh: MeshConfig | None = None,
    execution: Execution | None = None,
    precision: Precision = FULL,
    config: LayoutConfig | None = None,
) -> Blueprint:
    model = dataclasses.replace(SMALL, router=router)
    layout = SINGLE_DEVICE if mesh is None else Layout(make_mesh(mesh), config or LayoutConfig())
    blueprint = make_blueprint(model, precision, execution or Execution(), OptimizerConfig(), layout, steps=200)
    return dataclasses.replace(blueprint, optimizer=RECORDER)


def one_step(blueprint: Blueprint, params=None, **settings):
    """The gradients of the first step, its metrics, and the selection biases after it."""
    state = blueprint.create_state(seed=0) if params is None else blueprint.state_from(params)
    step = make_train_step(blueprint, seed=0, loss_chunk=10, **settings)
    state, metrics = step(state, place_batch(batch_of(), blueprint.layout))
    assert int(state.step) == 1
    return state.opt_state[0].trace, metrics, state.balance


@functools.cache
def on_one_device(name: str):
    return one_step(blueprint_of(ROUTERS[name]))


def without_wire(told):
    gradients, metrics, balance = told
    return gradients, metrics._replace(layers=metrics.layers._replace(wire_bytes_L=None, across_bytes_L=None)), balance


@pytest.mark.parametrize("mesh", [None, pytest.param(MeshConfig(data=2, expert=4), marks=pytest.mark.slow)], ids=str)
def test_a_step_is_compiled_once(mesh):
    blueprint = dataclasses.replace(blueprint_of(ROUTERS["dropless"], mesh), optimizer=optax.adam(1e-3))
    step, state = make_train_step(blueprint, seed=0, loss_chunk=10), blueprint.create_state(seed=0)
    for _ in range(3):
        state, _ = step(state, place_batch(batch_of(), blueprint.layout))
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "capacity")) for name in ROUTERS]
)
def test_eight_devices_give_the_loss_and_gradients_of_one(name):
    spread = one_step(blueprint_of(ROUTERS[name], MeshConfig(data=2, expert=4)))
    assert_trees_equal_to_scale(without_wire(spread), without_wire(on_one_device(name)))
    assert (spread[1].layers.wire_bytes_L > 0).all()


WITH_EXPERTS = [MeshConfig(expert=8), MeshConfig(replica=2, data=2, expert=2)]
WITHOUT = [MeshConfig(data=8), MeshConfig(replica=8)]


# In turns; tests/moe/model/test_moe_layer.py has every exchange with both.
WITH_ROUTERS = zip(
    itertools.cycle(("dropless", "capacity")),
    [*itertools.product(WITH_EXPERTS, BACKENDS), *((mesh, "padded") for mesh in WITHOUT)],
)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh", "exchange"), [(name, *each) for name, each in WITH_ROUTERS], ids=str)
def test_every_mesh_and_exchange_gives_the_loss_and_gradients_of_one(name, mesh, exchange):
    spread = one_step(
        blueprint_of(
            ROUTERS[name], mesh, Execution(exchange=exchange, exchange_chunks=2, devices_per_node=2, remat="full")
        )
    )
    assert_trees_equal_to_scale(without_wire(spread), without_wire(on_one_device(name)))


def rounded(params, specs, blocks: dict[bool, int], element: str):
    """Matrices as gathering leaves them, with loops.

    Args:
        blocks: how many neighbours along D share a factor, in experts (True) and in all else; 0 where none is gathered.
    """

    def each(spec, values):
        block = blocks[spec.kind == "expert"]
        if spec.kind not in QUANTIZED_KINDS or not block:
            return values
        place = spec.axes.index("D")
        lines = np.moveaxis(np.asarray(values), place, -1)
        told = [on_the_wire(line_D, element, block) for line_D in lines.reshape(-1, lines.shape[-1])]
        return np.moveaxis(np.float32(told).reshape(lines.shape), -1, place)

    return jax.tree.map(each, specs, params, is_leaf=is_spec)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gathered", "element", "mesh", "config", "blocks"),
    [
        ("fp8", "float8_e4m3fn", MeshConfig(data=2, expert=4), LayoutConfig(), {True: 16, False: 4}),
        ("int8", "int8", MeshConfig(replica=2, data=4), LayoutConfig(), {True: 8, False: 8}),
        ("int8", "int8", MeshConfig(data=2, expert=2, tensor=2), LayoutConfig(), {True: 16, False: 8}),
        ("int8", "int8", MeshConfig(data=4, tensor=2), LayoutConfig(experts=("data", "tensor")), {True: 0, False: 8}),
        ("int8", "int8", MeshConfig(data=2, stage=2, sequence=2), LayoutConfig(), {True: 8, False: 8}),
        ("int8", "int8", MeshConfig(data=8), LayoutConfig(gradients="host"), {True: 4, False: 4}),
    ],
    ids=str,
)
def test_matrices_gathered_in_8_bits_give_the_gradients_of_the_rounded_ones(gathered, element, mesh, config, blocks):
    execution = Execution(remat="full")
    precision = dataclasses.replace(FULL, gathered=gathered)
    told = one_step(blueprint_of(ROUTERS["dropless"], mesh, execution, precision, config))
    alone = blueprint_of(ROUTERS["dropless"])
    params = alone.create_state(seed=0).params
    by_hand = rounded(params, alone.specs, blocks, element)
    assert_trees_equal_to_scale(without_wire(told), without_wire(one_step(alone, by_hand)))


# Without auxiliary losses: they are means over each part.
UNBALANCED = RouterConfig(top_k=2, balance="none")


@functools.cache
def whole_batch():
    return one_step(blueprint_of(UNBALANCED))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, expert=2)], ids=str)
def test_microbatches_add_up_to_the_batch(mesh):
    whole = whole_batch()
    parts = one_step(blueprint_of(UNBALANCED, mesh), microbatches=4)
    assert_trees_equal_to_scale(parts[0], whole[0])
    np.testing.assert_allclose(parts[1].loss, whole[1].loss, rtol=1e-5)
    assert int(parts[1].tokens) == int(whole[1].tokens) == int(batch_of().weights_BT.sum())


def test_biases_move_against_the_load():
    _, metrics, balance = on_one_device("bias")
    load_LE = np.asarray(metrics.layers.load_LE)
    moved = [balance["stacks"][0]["blocks"][i]["feed_forward"]["router"]["bias_E"] for i in (0, 1)]
    moved_LE = np.stack(moved, axis=1).reshape(load_LE.shape)
    np.testing.assert_array_equal(moved_LE, np.float32(0.001) * np.sign(1 / 8 - load_LE))


def test_bias_balancing_evens_the_load():
    blueprint = blueprint_of(dataclasses.replace(ROUTERS["bias"], bias_rate=0.01))
    step = make_train_step(blueprint, seed=0)
    state, batch = blueprint.create_state(seed=0), batch_of()
    loads = []
    for _ in range(60):
        state, metrics = step(state, batch)
        loads.append(float(metrics.layers.load_LE.max()))
    even = 1 / SMALL.num_experts
    assert loads[-1] - even < 0.5 * (loads[0] - even)


@pytest.mark.slow
def test_evaluation_is_the_loss_before_the_step():
    blueprint = blueprint_of(ROUTERS["dropless"], MeshConfig(data=2, expert=4))
    loss, tokens = make_evaluation_step(blueprint)(
        blueprint.create_state(seed=0), place_batch(batch_of(), blueprint.layout)
    )
    _, metrics, _ = on_one_device("dropless")
    np.testing.assert_allclose(loss / tokens, metrics.loss, rtol=1e-5)


@pytest.mark.slow
def test_steps_draw_their_own_random_slots():
    blueprint = blueprint_of(ROUTERS["recycle"])
    step = make_train_step(blueprint, seed=0)
    state, batch = blueprint.create_state(seed=0), batch_of()
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    assert len(set(losses)) == 3
    again = make_train_step(blueprint, seed=0)(blueprint.create_state(seed=0), batch)[1]
    assert float(again.loss) == losses[0]


@pytest.mark.slow
def test_bf16_learns():
    config = dataclasses.replace(SMALL, router=ROUTERS["capacity"])
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=2)
    blueprint = make_blueprint(config, Precision(), Execution(), optimizer, SINGLE_DEVICE, steps=60)
    step = make_train_step(blueprint, seed=0)
    state, batch = blueprint.create_state(seed=0), batch_of()
    losses = []
    for _ in range(40):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 1.5
