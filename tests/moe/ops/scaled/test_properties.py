"""Any routing, any magnitudes, rows of zeros, and values that are not finite: grouped products, by every recipe."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.ops.scaled import Recipe
from tests.closeness import assert_trees_equal_to_scale
from tests.moe.ops.scaled.test_contract import RECIPES, grouped_with_gradients
from tests.oracle import scaled as oracle

E, R, D, F = 4, 270, 136, 40
ANY = settings(max_examples=5, deadline=None, derandomize=True)


def arrays(seed):
    r = np.random.default_rng(seed)
    return [r.normal(size=shape).astype(np.float32) for shape in [(R, D), (E, D, F), (R, F)]]


def routings():
    """Rows of each expert: any, many empty, all rows one expert's, none at all."""
    cuts = st.lists(st.integers(0, R), min_size=E, max_size=E).map(sorted)
    some = cuts.map(lambda ends: np.diff([0, *ends]).tolist())
    return some | st.permutations([R, 0, 0, 0]) | st.just([0] * E)


QUICK = Recipe("fp8", "block"), Recipe("int8", "row")


@pytest.mark.parametrize(
    "recipe", [pytest.param(r, marks=[] if r in QUICK else pytest.mark.slow) for r in RECIPES], ids=str
)
class TestProperties:
    @ANY
    @given(sizes=routings(), seed=st.integers(0, 9), exponent=st.integers(0, 30), silent=st.integers(0, R))
    def test_any_routing_and_magnitudes(self, recipe, sizes, seed, exponent, silent):
        x_RD, w_EDF, dy_RF = arrays(seed)
        r = np.random.default_rng(seed)
        # Rows and experts of very different magnitudes; some rows all zero.
        x_RD *= np.exp2(r.integers(-exponent, exponent + 1, (R, 1)))
        w_EDF *= np.exp2(r.integers(-exponent, exponent + 1, (E, 1, 1)))
        dy_RF *= np.exp2(r.integers(-exponent, exponent + 1, (R, 1)) - 30)
        x_RD[:silent], dy_RF[silent // 2 : silent] = 0, 0
        actual = grouped_with_gradients(recipe, "blocked")(x_RD, w_EDF, np.array(sizes, np.int32), dy_RF)
        assert_trees_equal_to_scale(actual, oracle.grouped(x_RD, w_EDF, sizes, dy_RF, recipe.format, recipe.scaling))

    @ANY
    @given(
        where=st.sampled_from(["x", "w", "dy"]),
        bad=st.sampled_from([np.nan, np.inf, -np.inf]),
        row=st.integers(0, R - 1),
        column=st.integers(0, F - 1),
    )
    def test_what_is_not_finite_is_seen(self, recipe, where, bad, row, column):
        x_RD, w_EDF, dy_RF = arrays(0)
        sizes = [100, 0, 70, 100]
        expert = int(np.searchsorted(np.cumsum(sizes), row, side="right"))
        {"x": x_RD[row], "w": w_EDF[expert, row % D], "dy": dy_RF[row]}[where][column] = bad
        y_RF, dx_RD, dw_EDF = map(
            np.asarray, grouped_with_gradients(recipe, "blocked")(x_RD, w_EDF, np.array(sizes, np.int32), dy_RF)
        )
        # Wherever the exact product would have it, as nan.
        if where == "x":
            assert np.isnan(y_RF[row]).all()
            assert np.isnan(dw_EDF[expert, column]).all()
        elif where == "w":
            assert np.isnan(y_RF[row, column])
            assert np.isnan(dx_RD[row, row % D])
        else:
            assert np.isnan(dx_RD[row]).all()
            assert np.isnan(dw_EDF[expert, :, column]).all()
