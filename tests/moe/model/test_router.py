import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.model.config import ModelConfig, RouterConfig
from moe.model.precision import Precision
from moe.model.router import Router, capacity, choose, limit_capacity, measure_balance
from parallel.layout import SINGLE_DEVICE
from tests.oracle import router as oracle


def logits(shape, seed=0, scale=2.0):
    return scale * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


ALL_VALID = jnp.ones((2, 12), bool)


@pytest.mark.parametrize(("top_k", "renormalize"), [(1, None), (2, None), (2, False), (1, True), (4, None)])
def test_choice_and_weights(top_k, renormalize):
    x_BTE = logits((2, 12, 4))
    config = RouterConfig(top_k=top_k, renormalize=renormalize)
    routing = choose(jnp.asarray(x_BTE), ALL_VALID, config)
    experts, weights = oracle.choose(x_BTE.reshape(-1, 4), top_k, config.renormalizes)
    np.testing.assert_array_equal(routing.experts_BTK.reshape(-1, top_k), experts)
    np.testing.assert_allclose(routing.weights_BTK.reshape(-1, top_k), weights, rtol=1e-5)
    if top_k > 1 and renormalize is None:
        np.testing.assert_allclose(routing.weights_BTK.sum(-1), 1.0, rtol=1e-6)


def test_padding_goes_nowhere_and_counts_nowhere():
    x_BTE = jnp.asarray(logits((2, 12, 4)))
    valid_BT = jnp.arange(12)[None, :] < jnp.array([12, 7])[:, None]
    routing = choose(x_BTE, valid_BT, RouterConfig())
    assert (np.asarray(routing.experts_BTK)[1, 7:] == 4).all()
    assert (np.asarray(routing.weights_BTK)[1, 7:] == 0).all()
    alone = choose(x_BTE[1:, :7], valid_BT[1:, :7], RouterConfig())
    padded = choose(x_BTE[1:], valid_BT[1:], RouterConfig())
    chex.assert_trees_all_close(
        measure_balance(alone, valid_BT[1:, :7]), measure_balance(padded, valid_BT[1:]), rtol=1e-5
    )


@pytest.mark.parametrize("top_k", [1, 3])
def test_balance(top_k):
    x_BTE = logits((2, 12, 4))
    routing = choose(jnp.asarray(x_BTE), ALL_VALID, RouterConfig(top_k=top_k))
    balance = measure_balance(routing, ALL_VALID)
    flat = x_BTE.reshape(-1, 4).astype(np.float64)
    experts, _ = oracle.choose(flat, top_k, True)
    np.testing.assert_allclose(balance.aux_loss, oracle.aux_loss(flat, experts), rtol=1e-5)
    np.testing.assert_allclose(balance.z_loss, np.mean(np.log(np.exp(flat).sum(-1)) ** 2), rtol=1e-5)
    probs = np.stack([oracle.softmax(row) for row in flat])
    np.testing.assert_allclose(balance.entropy, -(probs * np.log(probs)).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(balance.load_E, np.bincount(experts.reshape(-1), minlength=4) / experts.size, rtol=1e-5)


def test_an_even_router_has_aux_loss_k():
    x_AE = np.tile(np.eye(4, dtype=np.float32) * 50, (3, 1))[None]
    routing = choose(jnp.asarray(x_AE), jnp.ones((1, 12), bool), RouterConfig())
    np.testing.assert_allclose(measure_balance(routing, jnp.ones((1, 12), bool)).aux_loss, 1.0, rtol=1e-5)


def test_bias_changes_the_choice_and_not_the_weight():
    x_BTE = jnp.asarray(logits((2, 12, 4)))
    config = RouterConfig(balance="bias")
    bias_E = jnp.array([0.0, 0.0, 10.0, 0.0])
    routing = choose(x_BTE, ALL_VALID, config, bias_E)
    assert (np.asarray(routing.experts_BTK) == 2).all()
    np.testing.assert_allclose(routing.weights_BTK[..., 0], jax.nn.softmax(x_BTE)[..., 2], rtol=1e-6)


@pytest.mark.parametrize(
    ("factor", "top_k", "experts", "length", "slots"),
    [(None, 1, 8, 64, None), (1.0, 1, 8, 64, 8), (1.25, 2, 8, 64, 20), (1.1, 1, 8, 60, 9), (100.0, 1, 8, 64, 64)],
)
def test_capacity(factor, top_k, experts, length, slots):
    assert capacity(RouterConfig(capacity_factor=factor, top_k=top_k), experts, length) == slots


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    top_k=st.integers(1, 3),
    slots=st.integers(1, 12),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    valid=st.integers(0, 12),
)
def test_drops_are_the_last_in_order(seed, top_k, slots, scale, valid):
    x_BTE = jnp.asarray(logits((2, 12, 4), seed, scale))
    valid_BT = jnp.arange(12)[None, :] < jnp.array([12, valid])[:, None]
    config = RouterConfig(top_k=top_k, capacity_factor=1.0)
    routing = choose(x_BTE, valid_BT, config)
    limited = limit_capacity(routing, config, slots, None)
    dropped = 0
    for b in range(2):
        experts_TK = np.asarray(routing.experts_BTK[b])
        fits = oracle.kept(experts_TK, 4, slots)
        dropped += ((experts_TK < 4) & ~fits).sum()
        np.testing.assert_array_equal(limited.experts_BTK[b], np.where(fits, experts_TK, 4))
        np.testing.assert_array_equal(limited.weights_BTK[b], np.where(fits, routing.weights_BTK[b], 0))
    np.testing.assert_allclose(
        limited.dropped, dropped / max(1, (np.asarray(routing.experts_BTK) < 4).sum()), rtol=1e-6
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), factor=st.floats(1.0, 3.0), scale=st.sampled_from([0.1, 3.0, 30.0]))
def test_recycled_tokens_take_free_slots_of_other_experts(seed, factor, scale):
    x_BTE = jnp.asarray(logits((2, 13, 4), seed, scale))
    valid_BT = jnp.ones((2, 13), bool)
    config = RouterConfig(capacity_factor=factor, overflow="recycle")
    slots = capacity(config, 4, 13)
    routing = choose(x_BTE, valid_BT, config)
    limited = limit_capacity(routing, config, slots, jax.random.key(seed))
    experts_BT = np.asarray(limited.experts_BTK[..., 0])
    assert limited.dropped == 0
    for b in range(2):
        before = np.asarray(routing.experts_BTK[b])
        fits = oracle.kept(before, 4, slots)[:, 0]
        np.testing.assert_array_equal(experts_BT[b][fits], before[fits, 0])
        assert (experts_BT[b] < 4).all()
        assert (np.bincount(experts_BT[b], minlength=4) <= slots).all()
        probs = np.take_along_axis(np.asarray(routing.probs_BTE[b]), experts_BT[b][:, None], 1)
        np.testing.assert_allclose(limited.weights_BTK[b], probs, rtol=1e-6)


def test_recycling_is_random_and_reproducible():
    x_BTE = jnp.zeros((2, 64, 8)).at[..., 3].set(5.0)
    config = RouterConfig(capacity_factor=1.0, overflow="recycle")
    routing = choose(x_BTE, jnp.ones((2, 64), bool), config)
    first, again, other = (limit_capacity(routing, config, 8, jax.random.key(seed)).experts_BTK for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()
    assert (np.asarray(first[0]) != np.asarray(first[1])).any()


def test_recycling_needs_a_key():
    config = RouterConfig(capacity_factor=1.0, overflow="recycle")
    routing = choose(jnp.zeros((1, 4, 2)), jnp.ones((1, 4), bool), config)
    with pytest.raises(ValueError, match="call the model with a key"):
        limit_capacity(routing, config, 2, None)


@pytest.mark.parametrize("format", ["float32", "bfloat16"])
def test_the_product_has_the_policys_format_and_float32_sums(format):
    """With D = 4096, terms of 1: a sum in bfloat16 would stop at 256."""
    config = ModelConfig(
        vocab_size=2, d_model=4096, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, num_experts=2, d_expert=1
    )
    router = Router(config, Precision(router=format), rngs=nnx.Rngs(0))
    router.w_DE[...] = jnp.full((4096, 2), 1 + 2**-10)
    routing = router(jnp.ones((1, 1, 4096), jnp.bfloat16), jnp.ones((1, 1), bool), SINGLE_DEVICE)
    expected = 4096.0 if format == "bfloat16" else 4100.0
    np.testing.assert_array_equal(routing.logits_BTE, np.full((1, 1, 2), expected, np.float32))
    assert routing.probs_BTE.dtype == jnp.float32
