from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel.blocks import Blocks, block_size, from_blocks, pack_rows, packed_width, to_blocks, unpack_rows
from tests.oracle.blocks import FORMATS, on_the_wire


@partial(jax.jit, static_argnums=1)
def there_and_back(rows_RD: np.ndarray, element: str) -> jax.Array:
    packed = pack_rows(rows_RD, element)
    assert packed.dtype == jnp.uint8
    assert packed.shape == (rows_RD.shape[0], packed_width(rows_RD.shape[1]))
    return unpack_rows(packed, rows_RD.shape[1], element)


def rows(width: int) -> np.ndarray:
    """Of all sizes, from a row's own to its numbers' own; and zeros."""
    r = np.random.default_rng(width)
    rows_RD = r.normal(size=(9, width)) * np.exp(r.normal(size=(9, width)) * 3) * 10.0 ** np.arange(-12, 15, 3)[:, None]
    rows_RD[4] = 0
    return rows_RD.astype(np.float32)


@pytest.mark.parametrize("element", FORMATS)
@pytest.mark.parametrize("width", [1, 32, 75])
def test_rows_become_the_nearest_numbers_of_the_format(width, element):
    rows_RD = rows(width)
    expected_RD = np.stack([on_the_wire(row_D, element) for row_D in rows_RD])
    np.testing.assert_array_equal(there_and_back(rows_RD, element), expected_RD.astype(np.float32))


@pytest.mark.parametrize("element", FORMATS)
def test_a_second_time_changes_nothing_and_bfloat16_holds_it(element):
    once_RD = there_and_back(rows(75), element)
    np.testing.assert_array_equal(once_RD.astype(jnp.bfloat16).astype(jnp.float32), once_RD)
    np.testing.assert_array_equal(there_and_back(once_RD, element), once_RD)


@pytest.mark.parametrize("element", FORMATS)
def test_what_is_not_finite_arrives_so_and_leaves_other_blocks_alone(element):
    rows_RD = np.random.default_rng(0).normal(size=(9, 75)).astype(np.float32)
    rows_RD[1:4, 40] = np.inf, -np.inf, np.nan
    rows_RD[1:4, 41] = 0
    finite_RD = np.isfinite(np.asarray(there_and_back(rows_RD, element)))
    broken_RD = np.zeros((9, 75), bool)
    broken_RD[1:4, 32:64] = True
    np.testing.assert_array_equal(finite_RD, ~broken_RD)


def test_the_largest_and_the_smallest_numbers():
    largest = 0.9 * float(np.finfo(np.float32).max)
    for element in FORMATS:
        arrived_RD = np.asarray(there_and_back(np.array([[largest, -largest], [1e-45, 0]], np.float32), element))
        assert np.isfinite(arrived_RD).all()
        np.testing.assert_allclose(arrived_RD[0], [largest, -largest], rtol=1 / 8)
        np.testing.assert_allclose(arrived_RD[1], 0, atol=1e-38)


@pytest.mark.parametrize("element", FORMATS)
def test_zero_bytes_are_zeros(element):
    np.testing.assert_array_equal(unpack_rows(jnp.zeros((2, packed_width(40)), jnp.uint8), 40, element), 0)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_blocks_lie_along_any_axis(axis):
    x = np.random.default_rng(0).normal(size=(6, 4, 8)).astype(np.float32)
    block = {0: 3, 1: 2, 2: 4}[axis]
    blocks = jax.jit(to_blocks, static_argnums=(1, 2, 3))(x, "int8", axis, block)
    assert isinstance(blocks, Blocks)
    assert blocks.bits.shape == x.shape
    assert blocks.exponents.shape == tuple(n // block if i == axis else n for i, n in enumerate(x.shape))
    lines = np.moveaxis(x, axis, -1)
    expected = [[on_the_wire(line, "int8", block) for line in lines_of_one] for lines_of_one in lines]
    found = jax.jit(from_blocks, static_argnums=(1, 2, 3))(blocks, "int8", axis, block)
    np.testing.assert_array_equal(np.moveaxis(np.asarray(found), axis, -1), np.float32(expected))


@pytest.mark.parametrize(("size", "block"), [(1, 1), (14, 14), (64, 32), (100, 25), (34, 34), (37, 37), (134, 67)])
def test_blocks_that_fill_an_axis(size, block):
    assert block_size(size) == block
