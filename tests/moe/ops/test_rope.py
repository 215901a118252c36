import jax.numpy as jnp
import numpy as np
import pytest

from moe.ops.rope import apply_rope, rope_tables
from tests.oracle.transformer import rope


@pytest.mark.parametrize("ntk_alpha", [None, 1000.0])
def test_values(ntk_alpha):
    x_BTNH = np.random.default_rng(0).normal(size=(2, 5, 3, 8))
    positions_BT = np.array([[0, 1, 2, 3, 4], [0, 1, 0, 7, 300]], np.int32)
    tables = rope_tables(jnp.asarray(positions_BT), 8, theta=10_000.0, ntk_alpha=ntk_alpha)
    turned = apply_rope(jnp.asarray(x_BTNH, jnp.float32), tables)
    base = 10_000.0 * (1 if ntk_alpha is None else ntk_alpha ** (8 / 6))
    for b, t, n in np.ndindex(2, 5, 3):
        expected = rope(x_BTNH[b, t, n], positions_BT[b, t], base)
        np.testing.assert_allclose(turned[b, t, n], expected, atol=1e-4)


def test_scores_depend_on_the_distance_only():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8))

    def score(place_of_q, place_of_k):
        turned = [
            apply_rope(jnp.asarray(x, jnp.float32), rope_tables(jnp.array([[place]]), 8))
            for x, place in ((q, place_of_q), (k, place_of_k))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(5, 2) == pytest.approx(score(105, 102), rel=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 3), rel=1e-2)


def test_keeps_the_format():
    assert (
        apply_rope(jnp.ones((1, 2, 1, 4), jnp.bfloat16), rope_tables(jnp.zeros((1, 2), int), 4)).dtype == jnp.bfloat16
    )


@pytest.mark.parametrize(("head_dim", "alpha"), [(7, None), (2, 10.0)])
def test_widths_that_cannot_be_turned(head_dim, alpha):
    with pytest.raises(ValueError, match=f"head_dim={head_dim}"):
        rope_tables(jnp.zeros((1, 1), int), head_dim, ntk_alpha=alpha)
