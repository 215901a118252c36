"""Training with products in 8 bits."""

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe.model.config import ConfigError, ModelConfig, RouterConfig
from moe.model.execution import Execution
from moe.model.precision import FULL, Precision
from moe.train.checkpoint import named
from moe.train.data import Batch
from moe.train.histories import check_products, growth
from moe.train.optimizer import OptimizerConfig
from moe.train.state import Blueprint, make_blueprint
from moe.train.step import make_train_step, place_batch
from parallel.layout import SINGLE_DEVICE, Layout
from parallel.mesh import MeshConfig, make_mesh
from tests.closeness import assert_trees_equal_to_scale
from tests.moe.train.small_run import small_run

B, T = 16, 16
# A dense layer, and one with experts.
MODEL = ModelConfig(
    vocab_size=48, d_model=16, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=4, num_experts=8, d_expert=8,
    num_shared_experts=1, num_dense_layers=1, d_dense=24, init_std=0.2, router=RouterConfig(top_k=2),
)  # fmt: skip


def blueprint_of(
    precision: Precision, layout: Layout = SINGLE_DEVICE, model: ModelConfig = MODEL, **execution
) -> Blueprint:
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=1)
    return make_blueprint(model, precision, Execution(**execution), optimizer, layout, steps=200)


def batch_of(seed: int = 0) -> Batch:
    """Two documents a row, and some padding."""
    r = np.random.default_rng(seed)
    tokens_BT = r.integers(0, MODEL.vocab_size, (B, T)).astype(np.int32)
    segments_BT = np.where(np.arange(T) < r.integers(1, T, (B, 1)), 1, 2).astype(np.int32)
    segments_BT[:2, 12:] = 0
    positions_BT = np.where(segments_BT == 2, np.arange(T) - (segments_BT == 1).sum(1, keepdims=True), np.arange(T))
    weights_BT = ((segments_BT > 0) & (np.roll(segments_BT, -1, axis=1) == segments_BT)).astype(np.float32)
    weights_BT[:, -1] = 0
    return Batch(tokens_BT, np.roll(tokens_BT, -1, 1), positions_BT.astype(np.int32), segments_BT, weights_BT)


def products(precision: Precision) -> tuple[Counter, Counter]:
    """Of a train step, in 8 bits and in other formats: how many stand in its program, by scope and pass. Without those
    of scores, which are no weight's."""
    blueprint = blueprint_of(precision)
    # So few tokens that the experts have blocks of one height.
    ints, floats = (jax.ShapeDtypeStruct((1, 16), dtype) for dtype in (jnp.int32, jnp.float32))
    step = make_train_step(blueprint, seed=0, loss_chunk=16)
    program = jax.make_jaxpr(step)(blueprint.abstract_state(), Batch(ints, ints, ints, ints, floats))
    narrow: Counter = Counter()
    wide: Counter = Counter()

    def walk(jaxpr, outer: str) -> None:
        for eqn in jaxpr.eqns:
            name = f"{outer}/{eqn.source_info.name_stack}"
            if eqn.primitive.name == "dot_general" and "BMSH" not in name:
                scope = [word for word in re.findall(r"\w+", name) if word in SCOPES][-1]
                way = "backward" if "transpose(jvp" in name or "backward" in name else "forward"
                in_8_bits = all(v.aval.dtype == jnp.int8 for v in eqn.invars)
                (narrow if in_8_bits else wide)[scope, way] += 1
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                walk(inner, name)

    walk(program.jaxpr, "")
    return narrow, wide


SCOPES = ("attention", "experts", "shared_expert", "dense", "head", "router", "combine")
# The two layers have four products with weights each in attention, and three in each feed-forward network.
FORWARD = {"attention": 8, "experts": 3, "shared_expert": 3, "dense": 3, "head": 1}
WITH_WEIGHTS = {(scope, "forward"): n for scope, n in FORWARD.items()} | {
    (scope, "backward"): 2 * n for scope, n in FORWARD.items()
}
OTHERS = {("router", "forward"): 1, ("router", "backward"): 2, ("combine", "forward"): 1, ("combine", "backward"): 1}


@pytest.mark.parametrize("scaling", ["tensor", pytest.param("row", marks=pytest.mark.slow)])
def test_every_product_with_a_weight_is_in_8_bits_and_no_other(scaling):
    narrow, wide = products(Precision(matmuls="int8", scaling=scaling))
    assert narrow == WITH_WEIGHTS
    assert wide == OTHERS


def test_no_product_is_in_8_bits_by_default():
    assert products(Precision()) == ({}, WITH_WEIGHTS | OTHERS)


def one_step(precision: Precision, mesh: MeshConfig | None = None, microbatches: int = 1, **execution):
    """The loss, the gradients and the next histories of a first step."""
    layout = SINGLE_DEVICE if mesh is None else Layout(make_mesh(mesh))
    blueprint = blueprint_of(precision, layout, **execution)
    # Keeps the gradients as its state, and moves nothing.
    blueprint = dataclasses.replace(blueprint, optimizer=optax.chain(optax.trace(decay=0.0), optax.scale(0.0)))
    state, batch = blueprint.create_state(seed=0), place_batch(batch_of(), layout)
    step = make_train_step(blueprint, seed=0, loss_chunk=T, microbatches=microbatches)
    # Compiling is what takes the time here.
    step = step.lower(state, batch).compile(compiler_options={"xla_backend_optimization_level": 0})
    state, metrics = step(state, batch)
    return jax.tree.map(np.asarray, (metrics.loss, state.opt_state[0].trace, state.histories))


def away(found, expected) -> float:
    """The largest relative distance of a gradient, in the norm."""
    distances = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), found, expected)
    return max(jax.tree.leaves(distances))


@functools.cache
def on_one_device(scaling: str):
    return one_step(dataclasses.replace(FULL, matmuls="int8", scaling=scaling))


MESHES = [MeshConfig(data=2, expert=4), MeshConfig(data=2, tensor=4)]


@pytest.fixture
def nearest(monkeypatch):
    """Gradients in int8 rounded to the nearest: by chance, the last bit of a value decides which way it goes."""
    monkeypatch.setattr("moe.ops.scaled.quantize._chance", lambda x: jnp.float32(0.5))


@pytest.mark.usefixtures("nearest")
@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["tensor", "row", "delayed"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_eight_devices_give_the_loss_and_gradients_of_one(mesh, scaling):
    """int8, whose scales follow the largest magnitude closely, to 1e-5."""
    precision = dataclasses.replace(FULL, matmuls="int8", scaling=scaling)
    loss, gradients, histories = one_step(precision, mesh)
    expected_loss, expected, expected_histories = on_one_device(scaling)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert away(gradients, expected) < 1e-5
    assert_trees_equal_to_scale(histories, expected_histories)
    assert bool(jax.tree.leaves(histories)) == (scaling == "delayed")


@pytest.mark.usefixtures("nearest")
@pytest.mark.slow
def test_stages_give_the_loss_and_gradients_of_one_device():
    """But for rounding, with as many microbatches, each of which has scales of its own: the stages share out the
    positions whose logits they make, and the head's scales are those of a part."""
    given = dataclasses.replace(FULL, matmuls="int8"), None, 2
    model = dataclasses.replace(MODEL, num_dense_layers=0, router=RouterConfig(top_k=2, balance="none"))
    loss, gradients, _ = one_step(given[0], MeshConfig(stage=2, data=2, tensor=2), 2, model=model)
    expected_loss, expected, _ = one_step(*given, model=model)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-3)
    assert away(gradients, expected) < 0.1


@pytest.mark.usefixtures("nearest")
@pytest.mark.slow
def test_histories_take_the_largest_of_microbatches_and_chunks():
    """Of exchanges in two chunks, and of two microbatches: what goes forward has the magnitudes of the whole batch."""
    precision = dataclasses.replace(FULL, matmuls="int8", scaling="delayed")
    _, _, whole = on_one_device("delayed")
    _, _, parts = one_step(precision, microbatches=2, exchange_chunks=2)
    for name, history in named(parts).items():
        found, expected = history[..., :2, :], named(whole)[name][..., :2, :]
        np.testing.assert_allclose(found, expected, rtol=1e-6 if "stacks.0.blocks.0.attention" in name else 0.05)
        assert (history[..., 0] > 0).all()
        # What was known of the head's gradients before the first step.
        assert history[..., 1:].sum() == (1 if name == "products.histories.head" else 0)


def test_growth_counts_where_a_history_is_full():
    before = {"new": jnp.array([[[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]]]), "full": jnp.array([[2.0, 4], [1, 1], [0, 3]])}
    after = {"new": jnp.full((1, 3, 2), 900.0), "full": jnp.array([[10.0, 2], [3, 1], [5, 0]])}
    assert float(growth(before, after)) == 3
    assert float(growth({}, {})) == 0


@pytest.mark.slow
def test_a_resumed_run_with_delayed_scaling_ends_in_the_same_bits(tmp_path):
    settings = ("precision.matmuls=fp8", "precision.scaling=delayed")
    undisturbed = small_run(tmp_path / "run", tmp_path, *settings).state
    (tmp_path / "run/checkpoints/00000012/manifest.json").write_bytes(b"")
    resumed = small_run(tmp_path / "run", tmp_path, *settings).state
    jax.tree.map(np.testing.assert_array_equal, resumed, undisturbed)
    assert all((history[..., :12] > 0).any() for history in jax.tree.leaves(resumed.histories))


@pytest.mark.slow
@pytest.mark.parametrize("matmuls", ["fp8", "int8"])
@pytest.mark.parametrize("scaling", ["tensor", "delayed", "row", "block"])
def test_training_in_8_bits_keeps_close_to_bf16(matmuls, scaling):
    """After twenty steps on one batch, in which the loss falls by about one nat: within 0.05 of it."""

    def loss_after(precision: Precision) -> float:
        blueprint = blueprint_of(precision)
        state, batch = blueprint.create_state(seed=0), batch_of()
        step = make_train_step(blueprint, seed=0, loss_chunk=T)
        for _ in range(20):
            state, metrics = step(state, batch)
        return float(metrics.loss)

    wide, narrow = loss_after(Precision()), loss_after(Precision(matmuls=matmuls, scaling=scaling))
    assert abs(narrow - wide) < 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matmuls": "fp4"}, "precision.matmuls='fp4': give one of fp8, int8, or none"),
        ({"matmuls": "fp8", "scaling": "column"}, "precision.scaling='column': give one of tensor, delayed, row"),
        ({"scaling": "row"}, "precision.scaling='row' with precision.matmuls=none: nothing is scaled"),
        ({"matmuls": "fp8", "frozen": "nf4"}, "precision.frozen='nf4': the frozen matrices would be rounded twice"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        Precision(**settings)


def test_what_has_no_products_in_8_bits_or_no_histories_is_named():
    delayed = Precision(matmuls="fp8", scaling="delayed")
    with pytest.raises(ConfigError, match="precision.scaling='delayed' with mesh.stage=2: pipelines keep no histories"):
        check_products(delayed, Execution(), 2)
    with pytest.raises(ConfigError, match="execution.grouped_matmul='ragged' with precision.matmuls='fp8'"):
        check_products(delayed, Execution(grouped_matmul="ragged"), 1)
    check_products(delayed, Execution(), 1)
    check_products(Precision(matmuls="fp8"), Execution(), 2)
