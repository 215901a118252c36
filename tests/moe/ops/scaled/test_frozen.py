import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe.ops.quantize import dequantize, quantize
from moe.ops.scaled import frozen_einsum, frozen_grouped_matmul


def kept_row(x, format):
    """A row as its 8 bits have it: int8 in steps of its largest magnitude / 127, fp8 with a power of two as scale."""
    largest = float(np.abs(x).max())
    if largest == 0:
        return x
    if format == "int8":
        step = np.float32(largest) / np.float32(127)
        return np.round(x / step) * step
    scale = 2.0 ** np.ceil(np.log2(largest / 448))
    return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("spec", "x_shape", "w_shape", "summed"),
    [("BTD,DNH->BTNH", (2, 3, 16), (16, 2, 4), (-3,)), ("BTNH,NHD->BTD", (2, 3, 2, 8), (2, 8, 5), (-3, -2))],
)
def test_rows_and_columns_are_quantized_and_multiplied(format, spec, x_shape, w_shape, summed):
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=shape).astype(np.float32) for shape in (x_shape, w_shape))
    x[0, 1] = 0
    frozen = quantize(jnp.asarray(w), format, summed)
    rows = np.stack([kept_row(row, format) for row in x.reshape(6, -1)]).reshape(x_shape)
    expected = np.einsum(spec, rows, np.asarray(dequantize(frozen, jnp.float32)))
    np.testing.assert_allclose(frozen_einsum(spec, jnp.asarray(x), frozen), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_experts_multiply_their_rows_and_padding_counts_nothing(format):
    rng = np.random.default_rng(1)
    x_RD, w_EDF = rng.normal(size=(9, 16)).astype(np.float32), rng.normal(size=(3, 16, 5)).astype(np.float32)
    x_RD[7:] = np.nan
    frozen = quantize(jnp.asarray(w_EDF), format, (-2,))
    found = frozen_grouped_matmul(jnp.asarray(x_RD), frozen, jnp.array([4, 0, 3]))
    wide_EDF = np.asarray(dequantize(frozen, jnp.float32))
    for r in range(9):
        expected_F = 0 if r > 6 else kept_row(x_RD[r], format) @ wide_EDF[0 if r < 4 else 2]
        np.testing.assert_allclose(found[r], expected_F, rtol=1e-5, atol=1e-4)
