import dataclasses
import math

import jax
import numpy as np
import pytest

from moe.model.config import ModelConfig, RouterConfig
from moe.model.execution import Execution
from moe.model.precision import FULL, Precision
from moe.train.optimizer import OptimizerConfig
from moe.train.state import make_blueprint
from parallel.layout import SINGLE_DEVICE, Layout, LayoutConfig, LayoutError
from parallel.mesh import MeshConfig, make_mesh

SMALL = ModelConfig(
    vocab_size=64, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, num_experts=4, d_expert=8
)  # fmt: skip
HEADS = dataclasses.replace(SMALL, num_kv_heads=2)
OPTIMIZER = OptimizerConfig(warmup_steps=1)


def blueprint_of(layout, config=SMALL, precision=FULL):
    return make_blueprint(config, precision, Execution(), OPTIMIZER, layout, steps=10)


def test_every_mesh_starts_from_the_same_numbers():
    alone = blueprint_of(SINGLE_DEVICE).create_state(seed=3)
    spread = blueprint_of(Layout(make_mesh(MeshConfig(data=2, expert=4)))).create_state(seed=3)
    # The same draws; a normal number's last bit may differ where XLA vectorizes another length.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), alone, spread)
    other = blueprint_of(SINGLE_DEVICE).create_state(seed=4)
    assert (np.asarray(alone.params["embedding_VD"]) != np.asarray(other.params["embedding_VD"])).any()


def test_parameters_and_optimizer_states_are_created_sharded():
    state = blueprint_of(Layout(make_mesh(MeshConfig(data=2, expert=4)))).create_state(seed=0)

    def share(x):
        return x.addressable_shards[0].data.size / x.size

    layer = state.params["stacks"][0]["blocks"][0]
    assert share(state.params["embedding_VD"]) == 1 / 8
    assert share(layer["attention"]["w_q_DNH"]) == 1 / 8
    assert share(layer["feed_forward"]["experts"]["w_gate_EDF"]) == 1 / 8
    assert share(layer["attention_norm_D"]) == 1
    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    for moments in (adam.mu, adam.nu):
        jax.tree.map(lambda p, m: np.testing.assert_equal(share(p), share(m)), state.params, moments)


@pytest.mark.parametrize(("zero", "parameters"), [(1, 1 / 2), (3, 1 / 8)])
def test_optimizer_states_are_shared_out_at_every_stage_and_wait_where_asked(zero, parameters):
    config = LayoutConfig(zero=zero, optimizer_states="host")
    state = blueprint_of(Layout(make_mesh(MeshConfig(data=4, tensor=2)), config), HEADS).abstract_state()
    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    for tree, share, memory in ((state.params, parameters, "device"), (adam.mu, 1 / 8, "pinned_host")):
        w_q_LDNH = tree["stacks"][0]["blocks"][0]["attention"]["w_q_DNH"]
        assert math.prod(w_q_LDNH.sharding.shard_shape(w_q_LDNH.shape)) / w_q_LDNH.size == share
        assert w_q_LDNH.sharding.memory_kind == memory


def test_abstract_state_is_the_created_one():
    layout = Layout(make_mesh(MeshConfig(data=2, expert=4)), LayoutConfig(zero=1, optimizer_states="host"))
    blueprint = blueprint_of(layout, precision=Precision())
    created, abstract = blueprint.create_state(seed=0), blueprint.abstract_state()
    jax.tree.map(lambda x, a: np.testing.assert_equal((x.shape, x.dtype), (a.shape, a.dtype)), created, abstract)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, a: x.sharding == a.sharding, created, abstract)))


def test_balance_holds_biases_only_where_they_balance():
    assert jax.tree.leaves(blueprint_of(SINGLE_DEVICE).abstract_state().balance) == []
    biased = dataclasses.replace(SMALL, router=RouterConfig(balance="bias"))
    (bias_LE,) = jax.tree.leaves(blueprint_of(SINGLE_DEVICE, biased).abstract_state().balance)
    assert bias_LE.shape == (2, 4)


def test_parameters_in_bf16():
    blueprint = blueprint_of(SINGLE_DEVICE, precision=Precision(parameters="bfloat16"))
    assert {x.dtype.name for x in jax.tree.leaves(blueprint.abstract_state().params)} == {"bfloat16"}


def test_a_width_that_does_not_divide_is_refused_by_axis():
    config = dataclasses.replace(SMALL, d_model=20)
    with pytest.raises(
        LayoutError,
        match="axis D of .* has size 20, which does not divide over data=2 x expert=4 = 8",
    ):
        blueprint_of(Layout(make_mesh(MeshConfig(data=2, expert=4))), config).abstract_state()
