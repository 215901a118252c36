"""Stages give the numbers of one device with the same microbatches: metrics, gradients and parameters after 3 steps."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from moe.model.config import ConfigError, RouterConfig
from moe.model.execution import Execution
from moe.model.precision import FULL, Precision
from moe.train.pipelined import check_stages
from moe.train.state import Blueprint, make_blueprint
from moe.train.step import make_evaluation_step, make_train_step, place_batch
from parallel.layout import SINGLE_DEVICE, Layout, LayoutConfig, LayoutError
from parallel.mesh import MeshConfig, make_mesh
from parallel.pipeline import PipelineError
from tests.closeness import assert_trees_equal_to_scale
from tests.moe.train.test_layouts import MODEL, OPTIMIZER, batch_of

MICROBATCHES = 4
MODELS = {
    "2 layers": MODEL,
    "4 layers": dataclasses.replace(MODEL, num_layers=4),
    "8 layers": dataclasses.replace(MODEL, num_layers=8),
    "first dense": dataclasses.replace(MODEL, num_layers=3, num_dense_layers=1, d_dense=8),
    "untied": dataclasses.replace(MODEL, tie_embeddings=False, padding_id=3),
    "shared keys": dataclasses.replace(MODEL, num_layers=8, cla_factor=2),
    "shared keys, layers over": dataclasses.replace(MODEL, num_layers=11, cla_factor=2, num_dense_layers=2, d_dense=8),
    "biased": dataclasses.replace(MODEL, num_layers=4, router=RouterConfig(balance="bias")),
    "recycled": dataclasses.replace(MODEL, num_layers=4, router=RouterConfig(capacity_factor=1.0, overflow="recycle")),
    "dense": dataclasses.replace(MODEL, num_layers=4, num_experts=0, d_expert=0, d_dense=8, num_shared_experts=0),
}
QUICK = [("2 layers", MeshConfig(stage=2), LayoutConfig(), 1)]
SLOW = [
    ("first dense", MeshConfig(stage=2, expert=2), LayoutConfig(), 1),
    ("4 layers", MeshConfig(stage=2), LayoutConfig(), 2),
    ("4 layers", MeshConfig(stage=4), LayoutConfig(), 1),
    ("8 layers", MeshConfig(stage=8), LayoutConfig(), 1),
    ("8 layers", MeshConfig(stage=4), LayoutConfig(), 2),
    ("8 layers", MeshConfig(stage=2, data=2), LayoutConfig(), 4),
    ("shared keys", MeshConfig(stage=4), LayoutConfig(), 1),
    ("shared keys", MeshConfig(stage=2, data=2, expert=2), LayoutConfig(), 2),
    ("shared keys, layers over", MeshConfig(stage=4), LayoutConfig(), 1),
    ("first dense", MeshConfig(stage=2, tensor=4), LayoutConfig(), 1),
    ("untied", MeshConfig(stage=2, data=4), LayoutConfig(), 1),
    ("biased", MeshConfig(stage=2), LayoutConfig(), 2),
    ("recycled", MeshConfig(stage=4), LayoutConfig(), 1),
    ("dense", MeshConfig(stage=2, replica=2, tensor=2), LayoutConfig(), 2),
    ("2 layers", MeshConfig(stage=2, replica=2, data=2), LayoutConfig(zero=2), 1),
    ("2 layers", MeshConfig(stage=2, data=4), LayoutConfig(zero=1), 1),
    ("2 layers", MeshConfig(stage=2, data=2, expert=2), LayoutConfig(experts=("data", "expert")), 1),
    ("2 layers", MeshConfig(stage=2, expert=2, tensor=2), LayoutConfig(experts=("expert", "tensor")), 1),
    ("2 layers", MeshConfig(stage=2, sequence=4), LayoutConfig(), 1),
    ("2 layers", MeshConfig(stage=2, sequence=2, tensor=2), LayoutConfig(sequence="ring"), 1),
    ("4 layers", MeshConfig(stage=2, expert=2, sequence=2), LayoutConfig(sequence="ring"), 2),
    ("2 layers", MeshConfig(stage=2, data=2), LayoutConfig(optimizer_states="host"), 1),
]


def blueprint_of(model: str, layout: Layout) -> Blueprint:
    blueprint = make_blueprint(MODELS[model], FULL, Execution(), OPTIMIZER, layout, steps=200)
    return dataclasses.replace(blueprint, optimizer=optax.chain(optax.trace(decay=0.0), blueprint.optimizer))


@functools.cache
def first_params(model: str):
    return jax.tree.map(np.asarray, blueprint_of(model, SINGLE_DEVICE).create_state(seed=0).params)


def begin(blueprint: Blueprint, model: str):
    shardings = blueprint.shardings()
    return blueprint.state_from(jax.device_put(first_params(model), None if shardings is None else shardings.params))


def three_steps(model: str, layout: Layout, virtual_stages: int = 1):
    """The metrics of three steps, the gradients of the first, the parameters and selection biases after the last."""
    blueprint = blueprint_of(model, layout)
    state, batch = begin(blueprint, model), place_batch(batch_of(), layout)
    step = make_train_step(blueprint, seed=0, loss_chunk=6, microbatches=MICROBATCHES, virtual_stages=virtual_stages)
    # Compiling is what takes the time here.
    step = step.lower(state, batch).compile(compiler_options={"xla_backend_optimization_level": 0})
    told, gradients = [], None
    for _ in range(3):
        state, metrics = step(state, batch)
        layers = metrics.layers and metrics.layers._replace(wire_bytes_L=None)
        told.append(metrics._replace(layers=layers))
        gradients = gradients or jax.tree.map(np.asarray, state.opt_state[0].trace)
    return told, gradients, state.params, state.balance


@functools.cache
def on_one_device(model: str):
    return three_steps(model, SINGLE_DEVICE)


@pytest.mark.parametrize(
    ("model", "mesh", "config", "virtual_stages"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
    ids=str,
)
def test_stages_give_the_numbers_of_one_device(model, mesh, config, virtual_stages):
    found = three_steps(model, Layout(make_mesh(mesh), config), virtual_stages)
    assert_trees_equal_to_scale(found, on_one_device(model))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(stage=2), MeshConfig(stage=2, data=2, tensor=2)], ids=str)
def test_bf16_stays_close(mesh):
    """Sums in another order round otherwise: the loss is within 2e-3 of itself."""

    def loss(layout: Layout, **settings: int):
        blueprint = make_blueprint(MODEL, Precision(), Execution(), OPTIMIZER, layout, steps=200)
        step = make_train_step(blueprint, seed=0, microbatches=MICROBATCHES, **settings)
        return step(blueprint.create_state(seed=0), place_batch(batch_of(), layout))[1].loss

    np.testing.assert_allclose(loss(Layout(make_mesh(mesh))), loss(SINGLE_DEVICE), rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(stage=2), MeshConfig(stage=2, data=2, expert=2)], ids=str)
def test_evaluation(mesh):
    def evaluated(layout: Layout):
        blueprint = blueprint_of("first dense", layout)
        return make_evaluation_step(blueprint)(begin(blueprint, "first dense"), place_batch(batch_of(), layout))

    assert_trees_equal_to_scale(evaluated(Layout(make_mesh(mesh))), evaluated(SINGLE_DEVICE))


def test_layers_live_on_their_stages():
    params = blueprint_of("first dense", Layout(make_mesh(MeshConfig(stage=2, data=2)))).shardings().params
    dense, moe = (params["stacks"][i]["blocks"][0] for i in (0, 1))
    assert moe["attention"]["w_q_DNH"].spec[0] == moe["attention_norm_D"].spec[0] == "stage"
    assert dense["attention"]["w_q_DNH"].spec[:2] == (None, ("data", "stage"))
    assert params["embedding_VD"].spec[1] == ("data", "stage")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_microbatches():
    """Of eight times the microbatches, each of the same size, only the tokens are more."""

    def temporary(microbatches: int) -> int:
        blueprint = blueprint_of("2 layers", Layout(make_mesh(MeshConfig(stage=2))))
        batch = jax.tree.map(lambda x: np.repeat(x[:1], 2 * microbatches, 0), batch_of())
        step = make_train_step(blueprint, seed=0, microbatches=microbatches)
        compiled = step.lower(blueprint.abstract_state(), place_batch(batch, blueprint.layout)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(32) < 1.1 * temporary(4)


@pytest.mark.parametrize(
    ("model", "stages", "virtual_stages", "sentence"),
    [
        ("4 layers", 3, 1, "4 equal groups of 1 .* do not divide over mesh.stage=3 .*: make their product 1, 2 or 4"),
        ("4 layers", 2, 4, "training.virtual_stages=4: make their product 1, 2 or 4, or the groups a multiple of 8"),
        ("shared keys", 8, 1, r"num_layers=8 has 4 equal groups of 2 \(model.cla_factor=2\)"),
        ("4 layers", 1, 2, "training.virtual_stages=2 with mesh.stage=1: .* set mesh.stage"),
    ],
)
def test_layers_that_do_not_divide_are_named(model, stages, virtual_stages, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_stages(MODELS[model], stages, virtual_stages)


def test_experts_cannot_be_shared_out_over_stages():
    with pytest.raises(LayoutError, match="a stage has layers of its own"):
        LayoutConfig(experts=("stage",))


def test_a_step_says_which_microbatches_interleave():
    blueprint = blueprint_of("4 layers", Layout(make_mesh(MeshConfig(stage=2))))
    step = make_train_step(blueprint, seed=0, microbatches=1, virtual_stages=2)
    with pytest.raises(PipelineError, match="1 microbatches .* use a multiple, such as 2, or 1 virtual stage"):
        step.lower(blueprint.abstract_state(), batch_of())
