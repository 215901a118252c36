import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.ops.quantize import NF4, QuantizedWeight, dequantize, group_size, quantize
from tests.oracle.quantize import dequantized

CASES = [((6, 4), (-2,)), ((256, 3), (-2,)), ((3, 8, 5), (-3, -2)), ((2, 192, 3), (-2,)), ((2, 80, 4), (-2,))]
FORMATS = ["int8", "fp8", "int4", "nf4"]


def weights(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("format", "case"), list(itertools.product(FORMATS, CASES)), ids=str)
def test_values_are_those_of_loops(format, case):
    shape, summed = case
    w = weights(shape)
    found = dequantize(quantize(jnp.asarray(w), format, summed), jnp.float32)
    np.testing.assert_allclose(found, dequantized(w, format, summed), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_no_value_is_off_by_more_than_half_a_step(format, seed):
    # Half the widest gap between neighbours, relative to the largest magnitude of the column or group; beyond the last
    # whole number there is none, and bfloat16 rounds a scale by up to 1/256.
    half = {"int8": 1 / 254, "fp8": 16 / 448, "int4": 1 / 15, "nf4": max(np.diff(NF4)) / 2}[format]
    w = weights((256, 8), seed) * np.exp(weights((1, 8), seed + 100))
    group = {"int4": 128, "nf4": 64}.get(format, 256)
    largest = np.repeat(np.abs(w).reshape(-1, group, 8).max(1), group, axis=0)
    error = np.abs(np.asarray(dequantize(quantize(jnp.asarray(w), format, (-2,)), jnp.float32)) - w)
    assert (error <= (half + 1 / 256) * largest).all()
    assert (error > half / 4 * largest).any()


@pytest.mark.parametrize("format", FORMATS)
def test_scaling_the_weights_scales_what_is_kept(format):
    w = jnp.asarray(weights((128, 4)))
    once, scaled = (dequantize(quantize(x, format, (-2,)), jnp.float32) for x in (w, w * 2.0**-7))
    np.testing.assert_array_equal(np.asarray(once) * 2.0**-7, scaled)


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zeros(format):
    w = jnp.asarray(weights((128, 4))).at[:, 1].set(0)
    found = dequantize(quantize(w, format, (-2,)), jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    assert (found[:, 1] == 0).all()
    assert jnp.isfinite(found).all()


@pytest.mark.parametrize(("format", "bits"), [("int8", 8), ("fp8", 8), ("int4", 4.125), ("nf4", 4.25)])
def test_bits_a_value(format, bits):
    kept = quantize(jnp.asarray(weights((2, 4096, 8))), format, (-2,))
    assert kept.shape == (2, 4096, 8)
    columns = 2 * 8 * 32 if format in ("int8", "fp8") else 0
    assert 8 * (kept.values.nbytes + kept.scales.nbytes) == bits * math.prod(kept.shape) + columns


@pytest.mark.parametrize("format", FORMATS)
def test_a_stack_is_scanned_matrix_by_matrix(format):
    w = jnp.asarray(weights((3, 64, 4)))
    stack = quantize(w, format, (-2,))

    def one(_, kept: QuantizedWeight):
        return None, (dequantize(kept, jnp.float32), jnp.array(kept.shape))

    _, (found, shapes) = jax.lax.scan(one, None, stack)
    np.testing.assert_array_equal(found, dequantize(stack, jnp.float32))
    assert shapes.tolist() == [[64, 4]] * 3


def test_groups_divide_the_axis():
    sizes = (6400, 18304, 80, 64, 100)
    assert [group_size(size, 128) for size in sizes] == [128, 128, 80, 64, 100]
    assert group_size(6401, 128) == 37


def test_what_cannot_be_quantized():
    with pytest.raises(ValueError, match="format 'int3': give one of int8"):
        quantize(jnp.ones((4, 4)), "int3", (-2,))
    with pytest.raises(ValueError, match="pairs along an axis of 5 values: make it even, or take int8"):
        quantize(jnp.ones((5, 4)), "int4", (-2,))
