from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.ops.grouped_matmul import grouped_matmul, grouped_matmul_in_stack
from moe.ops.grouped_matmul.in_stack import InStack
from moe.ops.grouped_matmul.triton import columns_of_tile, height, narrow, tiles, triton_kernels
from parallel.platform import SHARED_MEMORY
from tests import gpu
from tests.closeness import assert_trees_equal_to_scale


def in_stack(x_RD, w_EDF, sizes_E):
    stack_LEDF = jnp.stack([w_EDF + 1, w_EDF, w_EDF - 1])
    matrices = InStack(jax.lax.stop_gradient(stack_LEDF), jnp.int32(1), stack_LEDF.astype(jnp.float32))
    return grouped_matmul_in_stack(x_RD, matrices, sizes_E, backend="blocked")[0]


BACKENDS = {
    "in a stack": in_stack,
    "blocked": partial(grouped_matmul, backend="blocked"),
    "ragged": partial(grouped_matmul, backend="ragged"),
    "triton": lambda x_RD, w_EDF, sizes_E: triton_kernels(x_RD, w_EDF, sizes_E, not gpu.HERE),
}
D, F = 16, 48


def oracle(x_RD, w_EDF, sizes_E):
    y_RF = np.zeros((len(x_RD), w_EDF.shape[2]))
    row = 0
    for expert, size in enumerate(sizes_E):
        for _ in range(size):
            y_RF[row] = x_RD[row] @ w_EDF[expert]
            row += 1
    return y_RF


def oracle_gradients(x_RD, w_EDF, sizes_E, dy_RF):
    dx_RD, dw_EDF = np.zeros(x_RD.shape), np.zeros(w_EDF.shape)
    row = 0
    for expert, size in enumerate(sizes_E):
        for _ in range(size):
            dx_RD[row] = w_EDF[expert] @ dy_RF[row]
            dw_EDF[expert] += np.outer(x_RD[row], dy_RF[row])
            row += 1
    return dx_RD, dw_EDF


def arrays(num_rows, num_experts, dtype=np.float32):
    r = np.random.default_rng(0)
    return tuple(
        jnp.asarray(r.normal(size=shape), dtype) for shape in [(num_rows, D), (num_experts, D, F), (num_rows, F)]
    )


def both(backend, x_RD, w_EDF, sizes_E, dy_RF):
    def product(x_RD, w_EDF):
        return BACKENDS[backend](x_RD, w_EDF, jnp.array(sizes_E, jnp.int32))

    y_RF, pull = jax.vjp(product, x_RD, w_EDF)
    return y_RF, pull(dy_RF)


@pytest.mark.parametrize("backend", BACKENDS)
class TestContract:
    @pytest.mark.parametrize(
        "sizes",
        [[300, 0, 7, 100], [0, 0, 0, 0], [407, 0, 0, 0], [0, 0, 0, 407], [128, 128, 128, 23], [1, 1, 1, 1]],
        ids=str,
    )
    def test_values_and_gradients(self, backend, sizes):
        x_RD, w_EDF, dy_RF = arrays(407, 4)
        y_RF, gradients = both(backend, x_RD, w_EDF, sizes, dy_RF)
        exact = [np.asarray(a, np.float64) for a in (x_RD, w_EDF, dy_RF)]
        assert_trees_equal_to_scale(y_RF, oracle(exact[0], exact[1], sizes))
        assert_trees_equal_to_scale(gradients, oracle_gradients(exact[0], exact[1], sizes, exact[2]))

    @settings(max_examples=8, deadline=None)
    @given(sizes=st.lists(st.integers(0, 40), min_size=5, max_size=5))
    def test_any_sizes(self, backend, sizes):
        x_RD, w_EDF, dy_RF = arrays(200, 5)
        y_RF, gradients = both(backend, x_RD, w_EDF, sizes, dy_RF)
        exact = [np.asarray(a, np.float64) for a in (x_RD, w_EDF, dy_RF)]
        assert_trees_equal_to_scale(y_RF, oracle(exact[0], exact[1], sizes))
        assert_trees_equal_to_scale(gradients, oracle_gradients(exact[0], exact[1], sizes, exact[2]))

    @pytest.mark.parametrize("sizes", [[0, 2, 0, 1, 0, 0, 1, 0], [0] * 8, [0] * 7 + [5]], ids=str)
    def test_fewer_rows_than_groups(self, backend, sizes):
        x_RD, w_EDF, dy_RF = arrays(5, 8)
        exact = [np.asarray(a, np.float64) for a in (x_RD, w_EDF, dy_RF)]
        y_RF, gradients = both(backend, x_RD.at[sum(sizes) :].set(jnp.nan), w_EDF, sizes, dy_RF)
        assert_trees_equal_to_scale(y_RF, oracle(exact[0], exact[1], sizes))
        exact[0][sum(sizes) :] = 0
        assert_trees_equal_to_scale(gradients, oracle_gradients(exact[0], exact[1], sizes, exact[2]))

    def test_padding_may_hold_anything(self, backend):
        x_RD, w_EDF, dy_RF = arrays(200, 3)
        sizes = [50, 0, 60]
        clean = both(backend, x_RD.at[110:].set(0), w_EDF, sizes, dy_RF.at[110:].set(0))
        dirty = both(backend, x_RD.at[110:].set(jnp.nan), w_EDF, sizes, dy_RF.at[110:].set(jnp.inf))
        jax.tree.map(np.testing.assert_array_equal, dirty, clean)
        assert (np.asarray(dirty[0])[110:] == 0).all()
        assert (np.asarray(dirty[1][0])[110:] == 0).all()
        assert (np.asarray(dirty[1][1])[1] == 0).all()

    def test_bf16_accumulates_in_float32(self, backend):
        x_RD, w_EDF, dy_RF = (jnp.ones(shape, jnp.bfloat16) for shape in [(1024, D), (1, D, F), (1024, F)])
        y_RF, (_, dw_EDF) = both(backend, x_RD, w_EDF, [1024], dy_RF)
        assert y_RF.dtype == dw_EDF.dtype == jnp.bfloat16
        # In bfloat16 alone a sum of ones stops at 256.
        assert (np.asarray(dw_EDF, np.float32) == 1024).all()


def test_a_stack_of_bits_is_read_in_the_rows_format():
    x_RD, w_EDF, _ = arrays(40, 3, jnp.bfloat16)
    bits_LEDF = jax.lax.bitcast_convert_type(jnp.stack([w_EDF, w_EDF]), jnp.uint16)
    sizes_E = jnp.array([10, 0, 30], jnp.int32)
    expected = grouped_matmul(x_RD, w_EDF, sizes_E, backend="blocked")
    found, _ = grouped_matmul_in_stack(x_RD, InStack(bits_LEDF, jnp.int32(1), None), sizes_E, backend="blocked")
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("rows", "experts", "expected"), [(1, 1, 16), (64, 16, 16), (17 * 4, 4, 32), (4096, 2, 128)])
def test_tiles_are_as_high_as_an_expert_has_rows(rows, experts, expected):
    assert height(rows, experts) == expected


@pytest.mark.parametrize(
    ("size", "capability", "expected"),
    [(6400, "9.0", 256), (18_304, "9.0", 128), (6400, "8.0", 256), (6400, "8.9", 128), (48, "9.0", 16)],
)
def test_tiles_are_as_wide_as_the_shared_memory_lets_them(size, capability, expected):
    assert columns_of_tile(size, 128, SHARED_MEMORY[capability]) == expected


@pytest.mark.parametrize(
    ("size", "depth", "in_use", "expected"),
    [(2048, 2048, 1, (32, 256)), (2048, 2048, 8, (128, 64)), (6400, 6400, 16, (256, 64)), (2048, 192, 1, (32, 64))],
)
def test_few_tiles_are_narrow(size, depth, in_use, expected):
    assert narrow(256, 64, size, depth, in_use) == expected


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_few_rows_by_narrow_tiles(rows):
    r = np.random.default_rng(0)
    x_RD, w_EDF = (jnp.asarray(r.normal(size=size), jnp.float32) for size in ((rows, 256), (4, 256, 512)))
    sizes_E = np.bincount(r.integers(0, 4, rows), minlength=4)
    y_RF = triton_kernels(x_RD, w_EDF, jnp.asarray(sizes_E, jnp.int32), not gpu.HERE)
    np.testing.assert_allclose(y_RF, oracle(np.asarray(x_RD), np.asarray(w_EDF), sizes_E), atol=2e-4)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(0, 70), min_size=1, max_size=5), rows=st.sampled_from([16, 32]))
def test_every_row_lies_in_one_tile_of_its_expert(sizes, rows):
    owner = np.repeat(np.arange(len(sizes)), sizes)
    found = np.full(sum(sizes), -1)
    for expert, start, end in zip(*map(np.asarray, tiles(jnp.array(sizes), sum(sizes), rows)), strict=True):
        assert (found[start:end] == -1).all()
        assert end <= start or start // rows == (end - 1) // rows
        found[start:end] = expert
    np.testing.assert_array_equal(found, owner)


@pytest.mark.parametrize("backend", ["blocked", "ragged"])
def test_no_rows(backend):
    x_RD, w_EDF, dy_RF = arrays(0, 3)
    y_RF, (dx_RD, dw_EDF) = both(backend, x_RD, w_EDF, [0, 0, 0], dy_RF)
    assert (y_RF.shape, dx_RD.shape) == ((0, F), (0, D))
    assert (np.asarray(dw_EDF) == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_EDF": jnp.zeros((2, D + 1, F))}, "must agree in D and E"),
        ({"sizes_E": jnp.zeros(3, jnp.int32)}, "must agree in D and E"),
        ({"w_EDF": jnp.zeros((2, D, F), jnp.bfloat16)}, "x_RD is float32 and w_EDF bfloat16"),
        ({"backend": "triton"}, 'needs an NVIDIA GPU, this is cpu: use "blocked"'),
        ({"backend": "cutlass"}, "execution.grouped_matmul='cutlass': give 'auto' or one of blocked, ragged, triton"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    arguments = {"x_RD": jnp.zeros((8, D)), "w_EDF": jnp.zeros((2, D, F)), "sizes_E": jnp.zeros(2, jnp.int32)}
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**(arguments | changes))


def test_a_backend_that_reads_no_stacks_says_so():
    matrices = InStack(jnp.zeros((4, 2, D, F)), jnp.int32(0), None)
    with pytest.raises(ValueError, match="'ragged' reads no stacks: use `grouped_matmul`"):
        grouped_matmul_in_stack(jnp.zeros((8, D)), matrices, jnp.zeros(2, jnp.int32), backend="ragged")


def test_few_rows_are_multiplied_by_matrices_rounded_to_their_format():
    x_RD = jax.random.normal(jax.random.key(0), (2, 12)).astype(jnp.bfloat16)
    stack_LEDF = jax.random.normal(jax.random.key(1), (2, 4, 12, 5))
    sizes_E = jnp.array([0, 1, 0, 1])
    wide, narrow = (
        grouped_matmul_in_stack(x_RD, InStack(stack, jnp.int32(1), None), sizes_E, backend="blocked")[0]
        for stack in (stack_LEDF, stack_LEDF.astype(jnp.bfloat16))
    )
    exact = np.stack(
        [np.asarray(x, np.float64) @ np.asarray(w) for x, w in zip(x_RD, stack_LEDF[1, 1::2], strict=True)]
    )
    np.testing.assert_array_equal(wide, narrow)
    np.testing.assert_allclose(np.asarray(wide, np.float64), exact, atol=2**-6 * np.abs(exact).max())
