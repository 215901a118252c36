"""Adapters merged into weights and taken out again, against loops; the steps that train them are in
tests/moe/train/test_lora.py."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.model.adapter import LoraConfig, Target
from moe.model.config import ModelConfig
from moe.model.execution import Execution
from moe.model.hf.checkpoint import model_specs
from moe.model.merge import MergedSource, StackedAdapters, merged, unmerged
from moe.model.parameter import is_spec
from moe.model.pieces import load
from moe.model.precision import FULL, Precision
from moe.ops.quantize import dequantize
from moe.train.optimizer import OptimizerConfig
from moe.train.state import make_blueprint
from moe.train.trained import ArraySource
from parallel.layout import SINGLE_DEVICE, Layout
from parallel.mesh import MeshConfig, make_mesh

MODEL = ModelConfig(
    vocab_size=16, d_model=8, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=4, num_experts=4, d_expert=6,
    num_dense_layers=1, d_dense=12, num_shared_experts=1,
)  # fmt: skip
LORA = LoraConfig(rank=2, alpha=3.0, targets=get_args(Target))


def state_of(precision: Precision, layout: Layout = SINGLE_DEVICE):
    """With drawn A and B."""
    adam = OptimizerConfig()
    blueprint = make_blueprint(MODEL, precision, Execution(), adam, layout, steps=10000, lora=LORA)
    r = np.random.default_rng(1)

    def drawn(x, sharding=None):
        return jax.device_put(r.normal(0, 0.3, x.shape).astype(x.dtype), sharding)

    abstract = blueprint.abstract_state()
    if layout.mesh is not None:
        where = blueprint.shardings()
        return (
            blueprint,
            jax.tree.map(drawn, abstract.params, where.params),
            jax.tree.map(drawn, abstract.frozen, where.frozen),
        )
    base = blueprint.create_state(seed=0).frozen if precision.quantized else jax.tree.map(drawn, abstract.frozen)
    return blueprint, jax.tree.map(drawn, abstract.params), base


def layers_of(tree):
    """Of the stack of two MoE layers."""
    return tree["stacks"][1]["blocks"][0]


def test_a_merged_weight_is_the_sum_of_both():
    _, adapters, base = state_of(FULL)
    found = layers_of(merged(adapters, base, LORA))
    own, plain = layers_of(adapters), layers_of(base)
    experts, w_q = found["feed_forward"]["experts"]["w_down_EFD"], found["attention"]["w_q_DNH"]
    a_LEFJ, b_LEJD = (own["feed_forward"]["experts"]["adapters"]["down"][half] for half in "ab")
    a_LDJ, b_LJNH = (own["attention"]["adapters"]["q"][half] for half in "ab")
    for layer in range(2):
        for expert in range(4):
            added = 1.5 * np.asarray(a_LEFJ)[layer, expert] @ np.asarray(b_LEJD)[layer, expert]
            before = plain["feed_forward"]["experts"]["w_down_EFD"][layer, expert]
            np.testing.assert_allclose(experts[layer, expert], before + added, atol=1e-6)
        for head in range(2):
            added = 1.5 * np.asarray(a_LDJ)[layer] @ np.asarray(b_LJNH)[layer, :, head]
            before = plain["attention"]["w_q_DNH"][layer, :, head]
            np.testing.assert_allclose(w_q[layer, :, head], before + added, atol=1e-6)
    router = found["feed_forward"]["router"]["w_DE"]
    np.testing.assert_array_equal(router, plain["feed_forward"]["router"]["w_DE"])


def assert_within_a_rounding(found, base, between):
    """Half a unit in the last place of what was merged and of the result; the sums in float32 add as little as that of
    the formats they are rounded to."""
    epsilon = float(jnp.finfo(base.dtype).eps)
    found, base, between = (np.asarray(x, np.float64) for x in (found, base, between))
    bound = epsilon * (np.abs(between) + np.abs(found)) / 2 + 2**-23 * (np.abs(between) + np.abs(base))
    assert (np.abs(found - base) <= bound).all()


@pytest.mark.parametrize("format", ["float32", "bfloat16"])
def test_what_is_unmerged_is_the_base_to_a_rounding(format):
    precision = Precision(parameters="float32", frozen=format)
    _, adapters, base = state_of(precision)
    between = merged(adapters, base, LORA)
    jax.tree.map(assert_within_a_rounding, unmerged(adapters, between, LORA), base, between)
    assert any(
        (np.asarray(x) != np.asarray(y)).any() for x, y in zip(*map(jax.tree.leaves, (between, base)), strict=True)
    )


@pytest.mark.slow
def test_a_quantized_weight_comes_back_wide():
    _, adapters, base = state_of(Precision(parameters="float32", frozen="int8"))
    between = merged(adapters, base, LORA)
    found = layers_of(unmerged(adapters, between, LORA))["feed_forward"]["shared"]["w_up_DF"]
    expected = dequantize(layers_of(base)["feed_forward"]["shared"]["w_up_DF"], jnp.float32)
    assert_within_a_rounding(found, expected, layers_of(between)["feed_forward"]["shared"]["w_up_DF"])


@pytest.mark.slow
def test_on_a_mesh_each_device_merges_its_part():
    layout = Layout(make_mesh(MeshConfig(data=2, expert=2, tensor=2)))
    blueprint, adapters, base = state_of(FULL, layout)
    found = merged(adapters, base, LORA)
    assert jax.tree.map(lambda x: x.sharding, found) == blueprint.shardings().frozen
    alone, alone_base = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (adapters, base))
    expected = merged(alone, alone_base, LORA)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, expected)


def test_pieces_merged_as_they_are_read_are_those_of_the_arrays():
    _, adapters, base = state_of(FULL)
    specs = model_specs(MODEL, FULL)
    assert len(jax.tree.leaves(specs, is_leaf=is_spec)) == len(jax.tree.leaves(base))
    source = MergedSource(ArraySource(base), StackedAdapters(ArraySource(adapters), LORA))
    found = load(source, MODEL, specs, SINGLE_DEVICE)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, merged(adapters, base, LORA))
