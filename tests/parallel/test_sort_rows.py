import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.sort_rows import rows_of_tokens, sort_rows, sum_of_rows, tokens_of_rows, weights_of_rows
from tests.closeness import assert_trees_equal_to_scale

E = 4


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, E), min_size=2, max_size=2), min_size=1, max_size=12))
def test_rows_stand_by_expert_then_by_token(experts):
    buckets_AK = np.array(experts, np.int32)
    order = sort_rows(jnp.asarray(buckets_AK), E)
    choices = sorted((expert, a, k) for (a, k), expert in np.ndenumerate(buckets_AK))
    np.testing.assert_array_equal(order.token_R, [a for _, a, _ in choices])
    np.testing.assert_array_equal(order.counts_E, [(buckets_AK == e).sum() for e in range(E)])
    for row, (_, a, k) in enumerate(choices):
        assert order.row_AK[a, k] == row


@pytest.mark.parametrize("spare", [None, 0, 1])
def test_gradients_are_those_of_plain_products(spare):
    """With a place for each choice, and with places for little more than those that were not dropped."""
    r = np.random.default_rng(0)
    buckets_AK = r.integers(0, E + 1, (9, 3)).astype(np.int32)
    x_AD = jnp.asarray(r.normal(size=(9, 5)), jnp.float32)
    weights_AK = jnp.asarray(r.random((9, 3)), jnp.float32)
    kept_AK = buckets_AK < E
    most = None if spare is None else int(kept_AK.sum()) + spare
    assert kept_AK.sum() < 25
    order = sort_rows(jnp.asarray(buckets_AK), E, most)
    assert order.token_R.size == (most or 27)

    def ours(x_AD, weights_AK):
        rows_RD = jnp.tanh(rows_of_tokens(x_AD, order))
        rows_RD *= jnp.arange(rows_RD.shape[0])[:, None] < order.counts_E.sum()
        return jnp.sin(tokens_of_rows(rows_RD, weights_AK, order)).sum()

    def plain(x_AD, weights_AK):
        return jnp.sin(jnp.tanh(x_AD) * (weights_AK * kept_AK).sum(1, keepdims=True)).sum()

    arguments = (x_AD, weights_AK)
    np.testing.assert_allclose(ours(*arguments), plain(*arguments), rtol=1e-6)
    assert_trees_equal_to_scale(jax.grad(ours, argnums=(0, 1))(*arguments), jax.grad(plain, argnums=(0, 1))(*arguments))


def test_rows_weighed_by_hand_sum_to_the_same_tokens():
    r = np.random.default_rng(0)
    buckets_AK = jnp.asarray(r.integers(0, E + 1, (9, 3)), jnp.int32)
    x_AD, weights_AK = (jnp.asarray(r.normal(size=size), jnp.float32) for size in ((9, 5), (9, 3)))
    order = sort_rows(buckets_AK, E)
    kept_R1 = jnp.arange(order.token_R.size)[:, None] < order.counts_E.sum()

    def before(x_AD, weights_AK):
        rows_RD = jnp.tanh(rows_of_tokens(x_AD, order)) * weights_of_rows(weights_AK, order)[:, None]
        return jnp.sin(sum_of_rows(rows_RD * kept_R1, order)).sum()

    def after(x_AD, weights_AK):
        return jnp.sin(tokens_of_rows(jnp.tanh(rows_of_tokens(x_AD, order)) * kept_R1, weights_AK, order)).sum()

    found, expected = (jax.value_and_grad(f, argnums=(0, 1))(x_AD, weights_AK) for f in (before, after))
    assert_trees_equal_to_scale(found, expected)


def test_a_plain_sum_saves_no_rows():
    order = sort_rows(jnp.zeros((4, 1), jnp.int32), 1)
    saved = jax.tree.leaves(jax.vjp(lambda rows_RD: sum_of_rows(rows_RD, order), jnp.ones((4, 5)))[1])
    assert all(x.dtype == jnp.int32 for x in saved)
