import jax.numpy as jnp
import numpy as np
import pytest

from moe.ops.norm import rms_norm


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
