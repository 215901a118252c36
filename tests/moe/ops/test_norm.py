import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.ops.norm import rms_norm
from tests.closeness import assert_trees_equal_to_scale


@pytest.mark.parametrize("weighted", [True, False])
def test_values(weighted):
    r = np.random.default_rng(0)
    x_AD, weight_D = r.normal(size=(5, 16)), r.normal(size=16)
    expected = np.stack([row / np.sqrt((row**2).mean() + 1e-3) * (weight_D if weighted else 1) for row in x_AD])
    weight = jnp.asarray(weight_D, jnp.float32) if weighted else None
    np.testing.assert_allclose(rms_norm(jnp.asarray(x_AD, jnp.float32), weight, 1e-3), expected, rtol=1e-5)


def test_squares_are_summed_in_float32():
    x_D = jnp.full(4096, 3.0, jnp.bfloat16)
    assert rms_norm(x_D, None, 0.0).dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(rms_norm(x_D, None, 0.0), np.float32), 1.0)


def test_zeros_stay_zeros():
    np.testing.assert_array_equal(rms_norm(jnp.zeros(8), jnp.ones(8), 1e-5), 0)


@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_are_those_of_the_plain_formula(weighted):
    r = np.random.default_rng(1)
    x_AD, dy_AD, weight_D = (jnp.asarray(r.normal(size=size), jnp.float32) for size in ((5, 16), (5, 16), 16))
    given = (x_AD, weight_D) if weighted else (x_AD,)

    def plain(x_AD, weight_D=1.0):
        return (dy_AD * x_AD * weight_D / jnp.sqrt(jnp.square(x_AD).mean(-1, keepdims=True) + 1e-3)).sum()

    def ours(x_AD, weight_D=None):
        return (dy_AD * rms_norm(x_AD, weight_D, 1e-3)).sum()

    which = tuple(range(len(given)))
    expected = jax.grad(plain, which)(*given)
    assert_trees_equal_to_scale(jax.grad(ours, which)(*given), expected)


def test_nothing_wide_is_saved_of_a_narrow_input():
    x_AD, weight_D = jnp.ones((6, 16), jnp.bfloat16), jnp.ones(16, jnp.bfloat16)
    saved = jax.tree.leaves(jax.vjp(lambda x, w: rms_norm(x, w, 1e-5), x_AD, weight_D)[1])
    assert sorted((str(x.dtype), x.shape) for x in saved) == [("bfloat16", (6, 16)), ("bfloat16", (16,))]
