"""Training with products in 8 bits."""

import re
from collections import Counter

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from moe.model.config import ModelConfig, RouterConfig
from moe.model.execution import Execution
from moe.model.precision import Precision
from moe.train.data import Batch
from moe.train.optimizer import OptimizerConfig
from moe.train.state import Blueprint, make_blueprint
from moe.train.step import make_train_step
from parallel.layout import SINGLE_DEVICE, Layout

B, T = 16, 16
# A dense layer, and one with experts.
MODEL = ModelConfig(
    vocab_size=48, d_model=16, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=4, num_experts=8, d_expert=8,
    num_shared_experts=1, num_dense_layers=1, d_dense=24, init_std=0.2, router=RouterConfig(top_k=2),
)  # fmt: skip


def blueprint_of(precision: Precision, layout: Layout = SINGLE_DEVICE, **execution) -> Blueprint:
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=1)
    return make_blueprint(MODEL, precision, Execution(**execution), optimizer, layout, steps=200)


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
    ints, floats = (jax.ShapeDtypeStruct((4, 16), dtype) for dtype in (jnp.int32, jnp.float32))
    step = make_train_step(blueprint, seed=0, loss_chunk=16)
    program = jax.make_jaxpr(step)(blueprint.abstract_state(), Batch(ints, ints, ints, ints, floats))
    narrow: Counter = Counter()
    wide: Counter = Counter()

    def walk(jaxpr, outer: str) -> None:
        for eqn in jaxpr.eqns:
            name = f"{outer}/{eqn.source_info.name_stack}"
            if eqn.primitive.name == "dot_general" and "BSMH" not in name:
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


@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_every_product_with_a_weight_is_in_8_bits_and_no_other(scaling):
    narrow, wide = products(Precision(matmuls="int8", scaling=scaling))
    assert narrow == WITH_WEIGHTS
    assert wide == OTHERS


def test_no_product_is_in_8_bits_by_default():
    assert products(Precision()) == ({}, WITH_WEIGHTS | OTHERS)
