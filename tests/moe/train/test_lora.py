"""Adapters beside the frozen weights of two layers that share keys and values, the first of them dense."""

import dataclasses
import functools
import json
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from experiments.run import run
from moe import HunyuanMoE
from moe.model.adapter import LoraConfig, Target
from moe.model.config import ConfigError, ModelConfig, RouterConfig
from moe.model.execution import Execution
from moe.model.merge import merged
from moe.model.pieces import unrolled
from moe.model.precision import FULL
from moe.model.transformer import Transformer
from moe.train.data import Batch
from moe.train.optimizer import OptimizerConfig
from moe.train.state import make_blueprint
from moe.train.step import make_evaluation_step, make_train_step, place_batch
from moe.train.trained import TrainedModel
from parallel.layout import SINGLE_DEVICE, Layout, LayoutConfig
from parallel.mesh import MeshConfig, make_mesh
from tests.closeness import assert_trees_equal_to_scale
from tests.moe.train.small_run import small_experiment, small_run

MODEL = ModelConfig(
    vocab_size=32, d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, num_experts=4, d_expert=8,
    num_dense_layers=1, d_dense=16, num_shared_experts=1, cla_factor=2, init_std=0.2,
    router=RouterConfig(balance="none"),
)  # fmt: skip
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.1, targets=get_args(Target))
DEFAULT = LayoutConfig()
# Keeps the gradients as its state, and moves nothing.
RECORDER = optax.chain(optax.trace(decay=0.0), optax.scale(0.0))


def blueprint_of(mesh=None, frozen=None, lora=LORA, optimizer=None, config=DEFAULT):
    layout = SINGLE_DEVICE if mesh is None else Layout(make_mesh(mesh), config)
    precision = dataclasses.replace(FULL, frozen=frozen)
    adam = OptimizerConfig(learning_rate=3e-2, warmup_steps=1)
    blueprint = make_blueprint(MODEL, precision, Execution(), adam, layout, steps=100, lora=lora)
    return blueprint if optimizer is None else dataclasses.replace(blueprint, optimizer=optimizer)


def batch_of() -> Batch:
    tokens_BT = np.random.default_rng(0).integers(0, MODEL.vocab_size, (8, 8)).astype(np.int32)
    positions_BT = np.broadcast_to(np.arange(8, dtype=np.int32), (8, 8))
    ones_BT = np.ones((8, 8), np.int32)
    return Batch(tokens_BT, np.roll(tokens_BT, -1, 1), positions_BT, ones_BT, ones_BT.astype(np.float32))


def adapted(state):
    """With a B that is not zero, so that the adapters add something."""
    leaves, tree = jax.tree.flatten(state.params)
    r = np.random.default_rng(7)
    drawn = [jax.device_put(r.normal(0, 0.2, x.shape).astype(x.dtype), x.sharding) for x in leaves]
    return state._replace(params=jax.tree.unflatten(tree, drawn))


def copied(tree):
    return jax.tree.map(lambda x: np.array(x), tree)


@pytest.mark.parametrize(
    "frozen", [*(pytest.param(format, marks=pytest.mark.slow) for format in (None, "bfloat16", "int8", "nf4")), "int4"]
)
def test_adapters_alone_learn(frozen):
    blueprint = blueprint_of(frozen=frozen)
    state = blueprint.create_state(seed=0)
    assert {path[-1].key for path, _ in jax.tree.flatten_with_path(state.params)[0]} == {"a", "b"}
    moments = next(part for part in state.opt_state if hasattr(part, "mu"))
    assert jax.tree.structure(moments.mu) == jax.tree.structure(state.params)
    base, step, losses = copied(state.frozen), make_train_step(blueprint, seed=0), []
    for _ in range(25):
        state, metrics = step(state, batch_of())
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.3
    jax.tree.map(np.testing.assert_array_equal, copied(state.frozen), base)


@functools.cache
def gradients(mesh, frozen, config=DEFAULT):
    blueprint = blueprint_of(mesh, frozen, optimizer=RECORDER, config=config)
    state, metrics = make_train_step(blueprint, seed=0)(
        adapted(blueprint.create_state(seed=0)), place_batch(batch_of(), blueprint.layout)
    )
    return state.opt_state[0].trace, metrics.loss


@pytest.mark.parametrize(
    ("mesh", "frozen", "config"),
    [
        (MeshConfig(data=2, expert=4), None, LayoutConfig()),
        (MeshConfig(data=4, expert=2), None, LayoutConfig(zero=1)),
        (MeshConfig(data=2, expert=2, tensor=2), "int8", LayoutConfig()),
        (MeshConfig(replica=2, expert=2, tensor=2), None, LayoutConfig(zero=2, experts=("expert", "tensor"))),
        (MeshConfig(data=2, sequence=2, expert=2), "nf4", LayoutConfig(sequence="ring")),
    ],
    ids=str,
)
@pytest.mark.slow
def test_eight_devices_give_the_gradients_of_one(mesh, frozen, config):
    assert_trees_equal_to_scale(gradients(mesh, frozen, config), gradients(None, frozen))


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [None, "int8"])
def test_merging_changes_nothing_but_rounding(frozen):
    blueprint = blueprint_of(frozen=frozen)
    state = adapted(blueprint.create_state(seed=0))
    beside = blueprint.model(state.params, state.balance, state.frozen)
    beside.eval()
    plain = nnx.graphdef(nnx.eval_shape(lambda: Transformer(MODEL, blueprint.precision, Execution(), rngs=nnx.Rngs(0))))
    models = [beside, *(nnx.merge(plain, p) for p in (merged(state.params, state.frozen, LORA), state.frozen))]
    expected, within, before = (np.asarray(model(batch_of().tokens_BT).hidden_BTD) for model in models)
    np.testing.assert_allclose(within, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(before - expected).max() > 0.1 * np.abs(expected).max()


@pytest.mark.slow
def test_what_waits_on_the_hosts_changes_no_number():
    found = []
    for config in (DEFAULT, LayoutConfig(optimizer_states="host", gradients="host")):
        blueprint = blueprint_of(MeshConfig(), "nf4", config=config)
        state = adapted(blueprint.create_state(seed=0))
        batch = place_batch(batch_of(), blueprint.layout)
        step = make_train_step(blueprint, seed=0).lower(state, batch)
        step = step.compile(compiler_options={"xla_backend_optimization_level": 0})
        for _ in range(2):
            state, metrics = step(state, batch)
        found.append((state.params, metrics.loss, metrics.grad_norm))
    assert_trees_equal_to_scale(found[1], found[0])
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.ndim} == {"pinned_host"}


@pytest.mark.slow
def test_dropout_draws_anew_each_step_and_not_in_evaluation():
    blueprint = blueprint_of(optimizer=optax.scale(0.0))
    state = adapted(blueprint.create_state(seed=0))
    step, evaluate, losses = make_train_step(blueprint, seed=0), make_evaluation_step(blueprint), []
    before = evaluate(state, batch_of())
    for _ in range(2):
        state, metrics = step(state, batch_of())
        losses.append(float(metrics.loss))
    assert losses[0] != losses[1]
    np.testing.assert_array_equal(before, evaluate(state, batch_of()))


def test_given_weights_become_the_base_and_leave_the_model_as_it_was():
    plain = blueprint_of(lora=None)
    trained = plain.create_state(seed=5)
    expected, loss = copied(trained.params), make_evaluation_step(plain)(trained, batch_of())
    blueprint = blueprint_of()
    state = blueprint.state_from(trained.params, seed=1)
    jax.tree.map(np.testing.assert_array_equal, copied(state.frozen), expected)
    jax.tree.map(np.testing.assert_array_equal, state.params, blueprint.create_state(seed=1).params)
    np.testing.assert_allclose(make_evaluation_step(blueprint)(state, batch_of()), loss, rtol=1e-6)


def test_a_quantized_base_takes_its_bits():
    state = blueprint_of(MeshConfig(data=2, expert=4), frozen="int4").abstract_state()
    blocks = state.frozen["stacks"][0]["blocks"]
    layer, mixture = blocks[0], blocks[1]
    assert mixture["feed_forward"]["experts"]["w_gate_EDF"].values.dtype == jnp.uint8
    assert layer["attention"]["w_q_DNH"].values.shape == (1, 8, 2, 8)
    assert layer["attention_norm_D"].dtype == state.frozen["embedding_VD"].dtype == jnp.float32


def test_what_does_not_work_together():
    with pytest.raises(ConfigError, match="precision.frozen='int8' without lora"):
        blueprint_of(frozen="int8", lora=None)
    with pytest.raises(ConfigError, match="lora with mesh.stage=2"):
        blueprint_of(MeshConfig(stage=2))
    with pytest.raises(ConfigError, match="lora.dropout=1"):
        LoraConfig(dropout=1)
    for targets in ((), ("q", "q"), ("q", "router")):
        with pytest.raises(ConfigError, match="lora.targets=.*give some of q, k, v, o, gate, up, down, each once"):
            LoraConfig(targets=targets)


def parameters_in(trained):
    """Names of the arrays that a run's last checkpoint holds for parameters."""
    written = json.loads((trained.checkpoint / "state" / "array_metadatas" / "process_0").read_text())
    names = [each["array_metadata"]["param_name"] for each in written["array_metadatas"]]
    return [name for name in names if name.startswith("params.")]


@pytest.mark.slow
def test_a_run_keeps_adapters_alone_and_is_served_with_them_merged(tmp_path):
    small_run(tmp_path / "base", tmp_path / "corpus", "training.steps=3", "optimizer.warmup_steps=1")
    experiment = small_experiment(tmp_path / "corpus").vary(
        {
            "lora": LoraConfig(rank=4, targets=get_args(Target)),
            "init_from": str(tmp_path / "base"),
            "training.steps": 4,
            "precision.frozen": "int8",
        }
    )
    console = Console(quiet=True)
    outcome = run(experiment, tmp_path / "run", console)
    again = run(experiment, tmp_path / "run", console)
    jax.tree.map(np.testing.assert_array_equal, copied(again.state), copied(outcome.state))

    trained = TrainedModel(tmp_path / "run")
    adapters, _ = trained.restore(SINGLE_DEVICE)
    jax.tree.map(np.testing.assert_array_equal, copied(adapters), copied(outcome.state.params))
    with pytest.raises(ConfigError, match="holds adapters for .*no weights of a whole model"):
        trained.source()
    kept, before = (parameters_in(each) for each in (trained, TrainedModel(tmp_path / "base")))
    assert len(kept) > 10
    assert all(".adapters." in name for name in kept)
    assert not any(".adapters." in name for name in before)

    served = HunyuanMoE.from_hf(tmp_path / "run").weights.params
    base = HunyuanMoE.from_hf(tmp_path / "base").weights.params
    expected = unrolled(merged(adapters, TrainedModel(tmp_path / "base").restore(SINGLE_DEVICE)[0], experiment.lora))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), copied(served), copied(expected))
    queries, before = (tree["stacks"][0]["blocks"][0]["attention"]["w_q_DNH"] for tree in (served, base))
    assert np.abs(np.asarray(queries) - np.asarray(before)).max() > 1e-4

    (tmp_path / "base").rename(tmp_path / "first")
    small_run(tmp_path / "base", tmp_path / "corpus", "training.steps=3", "optimizer.warmup_steps=1", "training.seed=1")
    with pytest.raises(ConfigError, match=r"embedding_VD differs: init_from, or the seed, gives another base"):
        run(experiment, tmp_path / "run", console)
