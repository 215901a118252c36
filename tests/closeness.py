"""What counts as equal in float32, where sums are taken in another order."""

import jax
import numpy as np


def assert_trees_equal_to_scale(actual, expected, tolerance: float = 1e-5) -> None:
    """Every array within `tolerance` of its expected counterpart, relative to that one's largest value."""

    def check(path, expected, actual):
        expected, actual = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
        scale = max(np.abs(expected).max(initial=0), 1e-12)
        np.testing.assert_allclose(
            actual / scale, expected / scale, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path)
        )

    jax.tree_util.tree_map_with_path(check, expected, actual)
