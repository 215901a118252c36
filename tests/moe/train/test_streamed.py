"""What waits on the hosts changes no number: steps of a model with two stacks and master weights, against the ordinary
ones. Other formats and meshes are in test_layouts.py."""

import dataclasses

import jax
import numpy as np
import pytest

from moe.model.config import ConfigError
from moe.model.execution import Execution
from moe.model.precision import Precision
from moe.train.checkpoint import CheckpointStore
from moe.train.optimizer import OptimizerConfig
from moe.train.state import make_blueprint
from moe.train.step import make_train_step, place_batch
from moe.train.streamed import check_landing, landed_gradients
from parallel.layout import Layout, LayoutConfig
from parallel.mesh import MeshConfig, make_mesh
from tests.closeness import assert_trees_equal_to_scale
from tests.moe.train.test_layouts import MODEL, batch_of

CONFIG = dataclasses.replace(MODEL, num_layers=3, num_dense_layers=1, d_dense=8)
ON_HOST = LayoutConfig(optimizer_states="host", gradients="host")
PRECISION = Precision(parameters="bfloat16", compute="float32", gradients="bfloat16", exchange="float32")


def blueprint_of(layout: LayoutConfig, **settings):
    settings = settings or {"master_weights": True}
    optimizer = OptimizerConfig(
        learning_rate=3e-3, warmup_steps=1, eps=1e-4, clip_norm=0.1, expert_rate=0.3, **settings
    )
    where = Layout(make_mesh(MeshConfig()), layout)
    return make_blueprint(CONFIG, PRECISION, Execution(remat="full"), optimizer, where, steps=200)


def three_steps(layout: LayoutConfig, steps: int = 3, **settings):
    blueprint = blueprint_of(layout, **settings)
    state, told = blueprint.create_state(seed=0), []
    batch = place_batch(batch_of(), blueprint.layout)
    step = make_train_step(blueprint, seed=0, loss_chunk=6)
    step = step.lower(state, batch).compile(compiler_options={"xla_backend_optimization_level": 0})
    for _ in range(steps):
        state, metrics = step(state, batch)
        told.append((metrics.loss, metrics.grad_norm))
    return state, told


@pytest.mark.slow
def test_steps_with_everything_on_the_host_are_the_ordinary_ones():
    (state, told), (expected, expected_told) = three_steps(ON_HOST), three_steps(LayoutConfig())
    assert_trees_equal_to_scale(told, expected_told)
    # Gradients in bfloat16: where their last bit differs, Adam moves by less than 1e-4 of the largest weight.
    assert_trees_equal_to_scale(state.opt_state.master, expected.opt_state.master, tolerance=1e-4)
    for params, master in ((state.params, state.opt_state.master), (expected.params, expected.opt_state.master)):
        jax.tree.map(lambda p, m: np.testing.assert_array_equal(p, m.astype(p.dtype)), params, master)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.ndim} == {"pinned_host"}
    assert {int(x) for x in jax.tree.leaves(state.opt_state) if not x.ndim} == {3}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"rounding": "stochastic", "states": "int8"},
        {"rounding": "kahan", "states": "fp8"},
        {"kind": "adafactor", "rounding": "stochastic"},
    ],
    ids=str,
)
def test_every_optimizer_that_goes_layer_by_layer_takes_the_ordinary_step(settings):
    found, expected = (three_steps(layout, steps=1, **settings)[0] for layout in (ON_HOST, LayoutConfig()))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        # Gradients in bfloat16: where their last bit differs, a parameter may be rounded otherwise.
        assert (np.asarray(ours) != np.asarray(theirs)).mean() < 0.02


def test_gradients_of_the_stacks_land_on_the_host():
    blueprint = blueprint_of(ON_HOST)

    def objective(params, histories, landing, factor):
        model = blueprint.model(params, {}, {})
        output = model(batch_of().tokens_BT, layout=blueprint.layout, landing=landing)
        return factor * output.hidden_BTD.sum(), None

    params = blueprint.abstract_state().params
    jaxpr, (shape, _) = jax.make_jaxpr(
        lambda p: landed_gradients(blueprint, objective, p, {}, (2.0,))[0], return_shape=True
    )(params)
    assert jax.tree.structure(shape) == jax.tree.structure(params)
    places = jax.tree.unflatten(jax.tree.structure(shape), [aval.memory_space for aval in jaxpr.out_avals])
    assert set(jax.tree.leaves(places["stacks"])) == {jax.memory.Space.Host}
    assert places["embedding_VD"] == jax.memory.Space.Device


def test_master_weights_come_back_from_a_checkpoint(tmp_path):
    blueprint = blueprint_of(ON_HOST)
    state = blueprint.create_state(seed=0)
    store = CheckpointStore(tmp_path, fingerprint="same", keep=1)
    store.save(0, state, {})
    store.wait()
    restored = store.restore_latest(blueprint.abstract_state(), print).state
    store.close()
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    master = restored.opt_state.master["stacks"][0]["blocks"][0]["attention"]["w_q_DNH"]
    assert (master.dtype, master.sharding.memory_kind) == (np.float32, "pinned_host")


@pytest.mark.parametrize(("stages", "microbatches", "which"), [(2, 4, "mesh.stage=2"), (1, 2, "microbatches=2")])
def test_gradients_that_are_added_up_stay_on_the_devices(stages, microbatches, which):
    with pytest.raises(ConfigError, match=f"layout.gradients='host' with .*{which}.*set layout.gradients='device'"):
        check_landing(ON_HOST, stages, microbatches)
