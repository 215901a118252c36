import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.model.config import ModelConfig, RopeConfig, RouterConfig
from moe.model.execution import Execution
from moe.model.parameter import specs_of
from moe.model.precision import FULL, Precision
from moe.model.transformer import Transformer
from tests.closeness import assert_trees_equal_to_scale
from tests.oracle import transformer as oracle

SMALL = ModelConfig(
    vocab_size=50,
    d_model=16,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=4,
    d_expert=12,
    cla_factor=2,
    init_std=0.3,
    rope=RopeConfig(ntk_alpha=1000.0),
)
T = 9


def inputs():
    r = np.random.default_rng(0)
    tokens_BT = r.integers(0, SMALL.vocab_size, (2, T)).astype(np.int32)
    segments_BT = np.array([[1] * T, [1] * 3 + [2] * 4 + [0] * 2], np.int32)
    positions_BT = np.array([list(range(T)), [0, 1, 2, 0, 1, 2, 3, 0, 1]], np.int32)
    return tokens_BT, positions_BT, segments_BT


def with_random_norms(model: Transformer) -> dict:
    """The parameters with norm weights that are not all one, so that their order shows."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    return jax.tree.map(
        lambda x, spec: jax.random.uniform(next(keys), x.shape, minval=0.5) if spec.kind == "norm" else x,
        params,
        specs_of(model),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cla_factor": 1, "rope": RopeConfig(), "router": RouterConfig(top_k=2)},
        {"cla_factor": 3, "num_layers": 5, "tie_embeddings": False},
        {"cla_factor": 4, "num_shared_experts": 2, "qk_norm": "none"},
        {"num_dense_layers": 1, "d_dense": 20, "num_shared_experts": 0},
        {"cla_factor": 1, "qk_norm": "before_rope"},
        {"num_experts": 0, "d_dense": 20, "num_layers": 2},
        {"num_kv_heads": 4, "num_layers": 1, "router": RouterConfig(top_k=4)},
    ],
    ids=lambda changes: ",".join(f"{k}" for k in changes) or "base",
)
def test_logits_are_the_oracles(changes):
    config = dataclasses.replace(SMALL, **changes)
    model = Transformer(config, FULL, Execution(), rngs=nnx.Rngs(0))
    params = with_random_norms(model)
    model = nnx.merge(nnx.graphdef(model), params, {})
    tokens_BT, positions_BT, segments_BT = inputs()
    output = jax.jit(lambda *x: model(*x))(tokens_BT, positions_BT, segments_BT)
    logits_BTV = np.asarray(model.logits(output.hidden_BTD))
    for b in range(2):
        expected = oracle.logits(params, config, tokens_BT[b], positions_BT[b], segments_BT[b])
        np.testing.assert_allclose(logits_BTV[b], expected, atol=2e-5 * np.abs(expected).max())
    has_moe = config.num_experts > 0
    assert (output.stats is not None) == has_moe
    if has_moe:
        assert output.stats.load_E.shape == (config.num_layers - config.num_dense_layers, config.num_experts)


def test_default_positions_and_segments_are_one_document():
    model = Transformer(SMALL, FULL, Execution(), rngs=nnx.Rngs(0))
    tokens_BT, positions_BT, segments_BT = inputs()
    alone = model(tokens_BT[:1]).hidden_BTD
    np.testing.assert_array_equal(alone, model(tokens_BT[:1], positions_BT[:1], segments_BT[:1]).hidden_BTD)


def test_documents_in_a_row_do_not_see_each_other():
    model = Transformer(SMALL, FULL, Execution(), rngs=nnx.Rngs(0))
    tokens_BT, positions_BT, segments_BT = inputs()
    packed = model(tokens_BT, positions_BT, segments_BT).hidden_BTD[1, 3:7]
    alone = model(tokens_BT[1:, 3:7]).hidden_BTD[0]
    np.testing.assert_allclose(packed, alone, atol=1e-5)


@functools.cache
def gradient(**execution):
    graph, params = nnx.split(Transformer(SMALL, FULL, Execution(), rngs=nnx.Rngs(0)))

    def loss(params):
        model = nnx.merge(graph, params)
        model.execution = Execution(**execution)
        return jnp.sin(model(*inputs()).hidden_BTD).sum()

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("remat", ["full", "matmuls", "matmuls_on_host"])
def test_rematerialisation_changes_no_gradient(remat):
    assert_trees_equal_to_scale(gradient(remat=remat), gradient(remat="none"), tolerance=2e-6)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_out_of_a_loop_have_its_gradients(remat):
    assert_trees_equal_to_scale(gradient(remat=remat, scan_layers=False), gradient(remat="none"), tolerance=2e-6)


def test_bf16_computes_in_bf16_and_stays_near():
    tokens_BT, positions_BT, segments_BT = inputs()
    exact = Transformer(SMALL, FULL, Execution(), rngs=nnx.Rngs(0))(tokens_BT, positions_BT, segments_BT)
    rough = Transformer(SMALL, Precision(), Execution(), rngs=nnx.Rngs(0))(tokens_BT, positions_BT, segments_BT)
    assert rough.hidden_BTD.dtype == jnp.bfloat16
    assert rough.stats.aux_loss.dtype == jnp.float32
    error = np.abs(np.asarray(rough.hidden_BTD, np.float32) - exact.hidden_BTD)
    # A token near the border between two experts may go to the other one: most stay near, not all.
    assert np.median(error) < 0.02


def test_an_unrolled_model_computes_the_same():
    config = dataclasses.replace(SMALL, num_layers=7, cla_factor=2, num_dense_layers=1, d_dense=8)
    model = Transformer(config, FULL, Execution(), rngs=nnx.Rngs(0))
    expected = model(*inputs(), keep_layer_inputs=True)
    model.unroll()
    assert [stack.blocks[0].attention_norm_D[...].shape[0] for stack in model.stacks] == [1, 1, 1, 1]
    assert_trees_equal_to_scale(model(*inputs(), keep_layer_inputs=True), expected, tolerance=1e-6)


def test_equal_groups_of_an_unrolled_model_are_traced_once():
    traced = []
    for layers in (4, 8):
        model = nnx.eval_shape(
            lambda n=layers: Transformer(
                dataclasses.replace(SMALL, num_layers=n, cla_factor=2), FULL, Execution(), rngs=nnx.Rngs(0)
            )
        )
        model.unroll()
        graph, weights = nnx.split(model)
        program = jax.jit(lambda weights, graph=graph: nnx.merge(graph, weights)(*inputs()).hidden_BTD).lower(weights)
        traced.append(len(re.findall(r"func\.func private @_computed", program.as_text())))
    assert traced == [1, 1]


@pytest.mark.parametrize(
    ("layers", "factor", "dense", "groups"),
    [
        (64, 2, 0, [((False, False), 32)]),
        (7, 4, 0, [((False,) * 4, 1), ((False,) * 3, 1)]),
        (4, 1, 1, [((True,), 1), ((False,), 3)]),
        (6, 2, 1, [((True, False), 1), ((False, False), 2)]),
    ],
)
def test_layer_groups(layers, factor, dense, groups):
    config = dataclasses.replace(SMALL, num_layers=layers, cla_factor=factor, num_dense_layers=dense, d_dense=8)
    assert config.layer_groups() == groups
    assert config.layer_groups(unrolled=True) == [(dense, 1) for dense, times in groups for _ in range(times)]
