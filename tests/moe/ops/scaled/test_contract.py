"""What every recipe owes, dense and grouped, on every backend."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.ops.scaled import Recipe, new_history, scaled_einsum, scaled_grouped_matmul
from moe.ops.scaled.grouped import BLOCKED, grouped, triton_products
from tests import gpu
from tests.closeness import assert_trees_equal_to_scale
from tests.oracle import scaled as oracle

RECIPES = [Recipe(format, scaling) for format in ("fp8", "int8") for scaling in ("tensor", "row", "block")]
ROUTINGS = [[150, 0, 7, 100], [0, 0, 0, 0], [0, 0, 270, 0], [128, 128, 0, 14]]
BACKENDS = {"blocked": BLOCKED, "triton": triton_products(interpret=not gpu.HERE)}


def arrays(*shapes):
    """Normal numbers with a few rows, columns and values far from the rest, as float32."""
    r = np.random.default_rng(0)

    def make(shape):
        x = r.normal(size=shape)
        x *= np.exp(r.normal(size=shape[-1:])) * np.exp(2 * r.normal(size=(*shape[:-1], 1)))
        return x.astype(np.float32)

    return [make(shape) for shape in shapes]


@cache
def einsum_with_gradients(spec, recipe):
    def run(x, w, dy):
        y, pull = jax.vjp(lambda x, w: scaled_einsum(spec, x, w, recipe), x, w)
        return y, *pull(dy)

    return jax.jit(run)


@cache
def grouped_with_gradients(recipe, backend):
    def run(x_RD, w_EDF, sizes_E, dy_RF):
        y_RF, pull = jax.vjp(lambda x, w: grouped(recipe, BACKENDS[backend], (), x, w, sizes_E, None), x_RD, w_EDF)
        return y_RF, *pull(dy_RF)

    return jax.jit(run)


def tolerance_of(recipe) -> float:
    """Hopper's tensor cores keep some 14 bits of a sum of fp8 (DeepSeek-V3, arXiv 2412.19437 §3.3.2)."""
    return 1e-3 if gpu.HERE and recipe.format == "fp8" else 1e-5


def check_einsum(spec, recipe, sizes):
    x, w, dy = arrays(*[tuple(sizes[letter] for letter in part) for part in spec.replace("->", ",").split(",")])
    actual = einsum_with_gradients(spec, recipe)(x, w, dy)
    expected = oracle.einsum(spec, x, w, dy, recipe.format, recipe.scaling)
    assert_trees_equal_to_scale(actual, expected, tolerance_of(recipe))


def check_grouped(backend, recipe, sizes, R, D, F):
    x_RD, w_EDF, dy_RF = arrays((R, D), (len(sizes), D, F), (R, F))
    actual = grouped_with_gradients(recipe, backend)(x_RD, w_EDF, np.array(sizes, np.int32), dy_RF)
    expected = oracle.grouped(x_RD, w_EDF, sizes, dy_RF, recipe.format, recipe.scaling)
    assert_trees_equal_to_scale(actual, expected, tolerance_of(recipe))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
class TestContract:
    def test_einsum(self, recipe):
        check_einsum("BTD,DNH->BTNH", recipe, {"B": 2, "T": 20, "D": 272, "N": 3, "H": 16})

    @pytest.mark.slow
    def test_einsum_over_two_axes(self, recipe):
        check_einsum("BTNH,NHD->BTD", recipe, {"B": 2, "T": 140, "N": 2, "H": 136, "D": 24})

    @pytest.mark.slow
    def test_einsum_with_a_transposed_weight(self, recipe):
        check_einsum("BTD,VD->BTV", recipe, {"B": 1, "T": 20, "D": 24, "V": 300})

    @pytest.mark.parametrize("sizes", ROUTINGS, ids=str)
    def test_grouped(self, recipe, sizes):
        check_grouped("blocked", recipe, sizes, 270, 136, 40)

    def test_padding_may_hold_anything(self, recipe):
        x_RD, w_EDF, dy_RF = arrays((270, 136), (4, 136, 40), (270, 40))
        run, sizes = grouped_with_gradients(recipe, "blocked"), np.array([50, 0, 60, 0], np.int32)
        x_RD[110:], dy_RF[110:] = 0, 0
        clean = run(x_RD, w_EDF, sizes, dy_RF)
        x_RD[110:], dy_RF[110:] = np.nan, np.inf
        dirty = run(x_RD, w_EDF, sizes, dy_RF)
        jax.tree.map(np.testing.assert_array_equal, dirty, clean)
        assert (np.asarray(dirty[0])[110:] == 0).all()
        assert (np.asarray(dirty[1])[110:] == 0).all()
        assert (np.asarray(dirty[2])[1] == 0).all()

    @pytest.mark.slow
    @pytest.mark.parametrize("sizes", [[0, 2, 0, 1, 0, 0, 1, 0], [0] * 8, [0] * 7 + [5]], ids=str)
    def test_fewer_rows_than_experts(self, recipe, sizes):
        check_grouped("blocked", recipe, sizes, 5, 136, 40)

    @pytest.mark.slow
    @pytest.mark.parametrize("sizes", ROUTINGS, ids=str)
    def test_kernels(self, recipe, sizes):
        check_grouped("triton", recipe, sizes, 270, 256, 128)


def test_bfloat16_in_bfloat16_out():
    x_RD, w_EDF, dy_RF = (jnp.ones(shape, jnp.bfloat16) for shape in [(1024, 32), (1, 32, 16), (1024, 16)])
    run = grouped_with_gradients(Recipe("fp8", "tensor"), "blocked")
    y_RF, _, dw_EDF = run(x_RD, w_EDF, jnp.array([1024], jnp.int32), dy_RF)
    assert y_RF.dtype == dw_EDF.dtype == jnp.bfloat16
    # In bfloat16 alone a sum of ones stops at 256.
    assert (np.asarray(dw_EDF, np.float32) == 1024).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Recipe("fp4", "row"), "format='fp4': give one of fp8, int8"),
        (lambda: Recipe("fp8", "channel"), "scaling='channel': give one of tensor, delayed, row, block"),
        (lambda: scaled_einsum("BTD,DF->BF", *OPERANDS, ROW), "exactly two of the two operands and the result"),
        (lambda: scaled_einsum("BTD,DF->BTF", OPERANDS[0], OPERANDS[1].astype(jnp.bfloat16), ROW), "cast both"),
        (lambda: scaled_einsum("BTD,DF->BTF", *OPERANDS, ROW, new_history()), 'a history is given with "delayed"'),
        (lambda: scaled_einsum("BTD,DF->BTF", *OPERANDS, Recipe("int8", "delayed")), "a history is given"),
        (
            lambda: scaled_grouped_matmul(*GROUPED, ROW, backend="ragged"),
            "in 8 bits give 'auto', 'blocked' or 'triton'",
        ),
        (lambda: scaled_grouped_matmul(*GROUPED, ROW, backend="triton"), "needs an NVIDIA GPU, this is cpu"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


ROW = Recipe("fp8", "row")
OPERANDS = jnp.zeros((2, 3, 8)), jnp.zeros((8, 4))
GROUPED = jnp.zeros((6, 8)), jnp.zeros((2, 8, 4)), jnp.zeros(2, jnp.int32)
