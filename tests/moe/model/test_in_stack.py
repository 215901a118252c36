import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.model.adapter import LoraConfig
from moe.model.config import ModelConfig
from moe.model.execution import Execution
from moe.model.precision import FULL, Precision
from moe.model.transformer import Transformer
from moe.ops.bits import as_bits
from tests.closeness import assert_trees_equal_to_scale

L, E, D, F = 3, 4, 16, 24
CONFIG = ModelConfig(
    vocab_size=64, d_model=D, num_layers=L, num_heads=2, num_kv_heads=1, head_dim=8, num_experts=E, d_expert=F,
    init_std=0.4,
)  # fmt: skip
LAYER = re.compile(rf"(f32|bf16|u16)\[(1,)?{E},({D},{F}|{F},{D})\]")
"""One layer's matrices of one kind, as XLA writes the array's shape."""
GRADIENT = re.compile(rf"= f32\[{L},{E},({D},{F}|{F},{D})\]\S* (dynamic-update-slice|fusion)\(.*dynamic_update_slice")
"""One matrix's gradient written among those of all layers."""


def loss_of(backend: str, precision: Precision = FULL):
    model = Transformer(CONFIG, precision, Execution(grouped_matmul=backend), rngs=nnx.Rngs(0))
    graph, weights, others = nnx.split(model, nnx.Param, ...)

    def loss(weights, tokens_BT):
        hidden_BTD = nnx.merge(graph, weights, others)(tokens_BT).hidden_BTD
        return jnp.square(hidden_BTD.astype(jnp.float32)).mean(where=jnp.arange(D) < D // 2)

    return loss, weights, jax.random.randint(jax.random.key(1), (2, 40), 0, 64)


def compiled(function, *given) -> str:
    return jax.jit(function).lower(*given).compile().as_text()


def test_gradients_are_those_of_matrices_that_were_taken_out():
    (in_stack, *given), (taken_out, *_) = loss_of("blocked"), loss_of("ragged")
    assert_trees_equal_to_scale(
        jax.jit(jax.value_and_grad(in_stack))(*given), jax.jit(jax.value_and_grad(taken_out))(*given)
    )


@pytest.mark.parametrize("precision", [FULL, Precision()], ids=["float32", "bfloat16"])
def test_no_layers_matrices_are_copied(precision):
    loss, *given = loss_of("blocked", precision)
    assert not LAYER.search(compiled(loss, *given))


@pytest.mark.parametrize("precision", [FULL, Precision()], ids=["float32", "bfloat16"])
def test_gradients_are_written_among_those_of_all_layers(precision):
    loss, *given = loss_of("blocked", precision)
    program = compiled(jax.grad(loss), *given)
    assert GRADIENT.search(program)
    assert not LAYER.search(program)


def test_the_check_sees_matrices_that_are_copied():
    loss, *given = loss_of("ragged")
    assert LAYER.search(compiled(loss, *given))


def test_frozen_matrices_cost_no_gradient():
    model = Transformer(CONFIG, FULL, Execution(grouped_matmul="blocked"), rngs=nnx.Rngs(0))
    model.adapt(LoraConfig(rank=2, dropout=0.0), rngs=nnx.Rngs(1))
    graph, adapters, others = nnx.split(model, nnx.LoRAParam, ...)

    def loss(adapters, tokens_BT):
        return jnp.square(nnx.merge(graph, adapters, others)(tokens_BT).hidden_BTD).mean(where=jnp.arange(D) < D // 2)

    given = adapters, jax.random.randint(jax.random.key(1), (2, 40), 0, 64)
    assert max(np.abs(x).max() for x in jax.tree.leaves(jax.jit(jax.grad(loss))(*given))) > 0
    program = compiled(jax.grad(loss), *given)
    assert not LAYER.search(program)
    assert not GRADIENT.search(program)


@pytest.mark.parametrize("frozen", ["int8", "fp8", "int4", "nf4"])
def test_quantized_matrices_are_widened_one_by_one(frozen):
    precision = dataclasses.replace(FULL, frozen=frozen)
    (in_stack, *given), (taken_out, *_) = loss_of("blocked", precision), loss_of("ragged", precision)
    # As serving has scales in bfloat16 (moe/serve/engine.py).
    given[0] = jax.tree.map(as_bits, given[0])
    expected = jax.jit(taken_out)(*given)
    assert_trees_equal_to_scale(jax.jit(in_stack)(*given), expected)
    assert LAYER.search(compiled(taken_out, *given))
    assert not LAYER.search(compiled(in_stack, *given))
