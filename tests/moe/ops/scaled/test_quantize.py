"""The formats' values, what shares a scale, and values that no format holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe.ops.scaled.quantize import ALL, BLOCK, EACH, Scaled, largest_magnitude, quantize, widened
from tests.oracle import scaled as oracle

FORMATS = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2, "int8": jnp.int8}


@pytest.mark.parametrize("format", FORMATS)
class TestRounding:
    def test_every_number_between_two_of_the_format(self, format):
        numbers = oracle.NUMBERS[format]
        # The numbers, what lies half way between them, and what lies next to that.
        middle = (numbers[1:] + numbers[:-1]) / 2
        x = np.concatenate(
            [numbers, middle, np.nextafter(middle.astype(np.float32), np.float32(np.inf)), middle * 0.999]
        )
        x = np.concatenate([x, -x]).astype(np.float32)
        scaled = quantize(jnp.asarray(x), FORMATS[format], (ALL,))
        assert float(scaled.scales[0]) == 1
        np.testing.assert_array_equal(
            np.asarray(scaled.values, np.float64), oracle.nearest(x.astype(np.float64), format)
        )

    def test_scales(self, format):
        for largest in (1.2e-38, 1e-37, 1e-10, 0.75, 1.0, 447.0, 448.0, 449.0, 57344.0, 1e10, 3e38):
            scale = float(quantize(jnp.array([largest], jnp.float32), FORMATS[format], (ALL,)).scales[0])
            # Nothing below float32's normal numbers.
            assert scale == max(oracle.scale(float(np.float32(largest)), format), 2.0**-126)

    def test_zeros_have_scale_one(self, format):
        scaled = quantize(jnp.array([[0.0, 0.0], [1.0, 0.0]]), FORMATS[format], (EACH, ALL))
        assert float(scaled.scales[0, 0]) == 1
        assert (np.asarray(scaled.values, np.float32)[0] == 0).all()

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_makes_all_that_shares_its_scale_nan(self, format, bad):
        x = np.ones((2, 3), np.float32)
        x[1, 2] = bad
        scaled = quantize(jnp.asarray(x), FORMATS[format], (EACH, ALL))
        wide = np.asarray(scaled.values, np.float32) * np.asarray(scaled.scales)
        assert np.isnan(wide[1]).all()
        np.testing.assert_allclose(wide[0], 1, rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    x=hnp.arrays(np.float32, (3, 130), elements=st.floats(-(2.0**60), 2.0**60, width=32)),
    format=st.sampled_from(sorted(FORMATS)),
    shared=st.sampled_from([(ALL, ALL), (EACH, ALL), (ALL, EACH), (EACH, BLOCK)]),
)
def test_any_values_are_held_to_half_a_step(x, format, shared):
    scaled = jax.jit(quantize, static_argnums=(1, 2))(jnp.asarray(x), FORMATS[format], shared)
    scales = np.asarray(scaled.scales, np.float64)
    scales = np.repeat(scales, 128, 1)[:, :130] if shared[1] == BLOCK else scales
    error = np.abs(np.asarray(scaled.values, np.float64) * scales - x)
    steps = {"e4m3": (2.0**-4, 2.0**-10), "e5m2": (2.0**-3, 2.0**-17), "int8": (0, 0.5)}
    relative, subnormal = steps[format]
    assert (error <= np.maximum(np.abs(x) * relative, subnormal * scales) * (1 + 1e-5)).all()


def test_blocks_of_128_and_what_is_left():
    x = jnp.zeros((2, 300)).at[0, 127].set(3).at[1, 128].set(-5).at[0, 299].set(7)
    np.testing.assert_array_equal(largest_magnitude(x, (EACH, BLOCK)), [[3, 0, 7], [0, 5, 0]])
    np.testing.assert_array_equal(largest_magnitude(x, (BLOCK, BLOCK)), [[3, 5, 7]])


def test_fp8_is_widened_exactly():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 256)) * 1e-3, jnp.float32)
    scaled = quantize(x, jnp.float8_e4m3fn, (EACH, BLOCK))
    exact = np.asarray(scaled.values, np.float64) * np.repeat(np.asarray(scaled.scales, np.float64), 128, 1)
    np.testing.assert_array_equal(np.asarray(widened(scaled), np.float64), exact)
    assert widened(Scaled(scaled.values.astype(jnp.int8), scaled.scales)).dtype == jnp.float32


def test_a_gradient_in_int8_is_right_on_average_and_exact_where_it_can_be():
    random = np.random.default_rng(0)
    x = np.append(random.uniform(-0.4, 0.4, 100_000), 127).astype(np.float32)

    def held(gradient):
        return np.asarray(widened(quantize(jnp.asarray(x), jnp.int8, (ALL,), gradient=gradient)))[:-1]

    assert not held(gradient=False).any()
    for low in np.arange(-0.4, 0.4, 0.1):
        some = (low <= x[:-1]) & (x[:-1] < low + 0.1)
        # Four times the spread of a mean of so many.
        assert abs(held(gradient=True)[some].mean() - x[:-1][some].mean()) < 4 * 0.5 / np.sqrt(some.sum())
    numbers = jnp.arange(-127.0, 128.0)
    np.testing.assert_array_equal(quantize(numbers, jnp.int8, (ALL,), gradient=True).values, numbers)
