import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.ops.sort_rows import rows_of_tokens, sort_rows, tokens_of_rows
from tests.closeness import assert_trees_equal_to_scale

E = 4


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, E), min_size=2, max_size=2), min_size=1, max_size=12))
def test_rows_stand_by_expert_then_by_token(experts):
    experts_AK = np.array(experts, np.int32)
    order = sort_rows(jnp.asarray(experts_AK), E)
    choices = sorted((expert, a, k) for (a, k), expert in np.ndenumerate(experts_AK))
    np.testing.assert_array_equal(order.token_R, [a for _, a, _ in choices])
    np.testing.assert_array_equal(order.counts_E, [(experts_AK == e).sum() for e in range(E)])
    for row, (_, a, k) in enumerate(choices):
        assert order.row_AK[a, k] == row


def test_gradients_are_those_of_plain_gathers():
    r = np.random.default_rng(0)
    experts_AK = jnp.asarray(r.integers(0, E + 1, (9, 3)), jnp.int32)
    x_AD = jnp.asarray(r.normal(size=(9, 5)), jnp.float32)
    weights_AK = jnp.asarray(r.random((9, 3)), jnp.float32)
    order = sort_rows(experts_AK, E)

    def ours(x_AD, weights_AK):
        return jnp.sin(tokens_of_rows(jnp.tanh(rows_of_tokens(x_AD, order)), weights_AK, order)).sum()

    def plain(x_AD, weights_AK):
        rows_RD = jnp.tanh(x_AD[order.token_R])
        return jnp.sin((rows_RD[order.row_AK] * weights_AK[..., None]).sum(1)).sum()

    arguments = (x_AD, weights_AK)
    np.testing.assert_allclose(ours(*arguments), plain(*arguments), rtol=1e-6)
    assert_trees_equal_to_scale(jax.grad(ours, argnums=(0, 1))(*arguments), jax.grad(plain, argnums=(0, 1))(*arguments))
