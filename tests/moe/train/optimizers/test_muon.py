import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe.train.optimizers.moments import MomentFormat
from moe.train.optimizers.muon import Orthogonalized, newton_schulz, orthogonalized, scale_by_muon
from parallel.layout import SINGLE_DEVICE


def by_hand(matrix: np.ndarray) -> np.ndarray:
    """Through singular values: five times 3.4445 s - 4.7750 s^3 + 2.0315 s^5."""
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return 0.2 * np.sqrt(max(matrix.shape)) * (u * s) @ vt


def random(*shape) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("rows", "columns"), [(6, 10), (10, 6), (8, 8)])
def test_singular_values_are_those_of_the_polynomial(rows, columns):
    x = random(3, rows, columns)
    found = newton_schulz(jnp.asarray(x), 1)
    for matrix, expected in zip(np.asarray(found), x, strict=True):
        np.testing.assert_allclose(matrix, by_hand(expected), atol=2e-5)
    # The update's size is Adam's, about 0.2: singular values end between 0.7 and 1.2.
    assert 0.13 < np.sqrt((np.asarray(found) ** 2).mean()) < 0.25


@pytest.mark.parametrize(
    ("axes", "shape", "matrix"),
    [
        ("LEDF", (2, 3, 6, 8), (6, 8)),
        ("LEFD", (2, 3, 8, 6), (8, 6)),
        ("LDNH", (2, 6, 4, 2), (6, 8)),
        ("LNHD", (2, 4, 2, 6), (8, 6)),
        ("DF", (6, 8), (6, 8)),
    ],
)
def test_each_layer_and_expert_is_a_matrix_and_heads_belong_together(axes, shape, matrix):
    x = random(*shape)
    found = np.asarray(orthogonalized(jnp.asarray(x), axes, SINGLE_DEVICE)).reshape(-1, *matrix)
    for each, expected in zip(found, x.reshape(-1, *matrix), strict=True):
        np.testing.assert_allclose(each, by_hand(expected), atol=2e-5)


def test_momentum_is_nesterovs():
    optimizer = scale_by_muon({"w": Orthogonalized("DF", MomentFormat("float32"))}, momentum=0.9)
    state, momentum = optimizer.init({"w": jnp.zeros((6, 8))}), np.zeros((6, 8))
    for step in range(3):
        g = random(3, 6, 8)[step]
        updates, state = optimizer.update({"w": jnp.asarray(g)}, state)
        momentum = 0.9 * momentum + g
        np.testing.assert_allclose(updates["w"], by_hand(g + 0.9 * momentum), atol=5e-5)
        np.testing.assert_allclose(state.momentum["w"], momentum, rtol=1e-6)


def test_orthogonalization_is_that_of_optax():
    x = random(6, 8)
    numbers = {"w": optax.contrib.MuonDimensionNumbers(0, 1)}
    theirs = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=numbers)
    params = {"w": jnp.asarray(x)}
    expected = theirs.update(params, theirs.init(params), params)[0]["w"]
    found = newton_schulz(jnp.asarray(x)[None], 1)[0] / (0.2 * np.sqrt(8))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_products_in_bfloat16_stay_near():
    x = random(1, 16, 24)
    found = np.asarray(newton_schulz(jnp.asarray(x, jnp.bfloat16), 1), np.float32)[0]
    expected = by_hand(x[0])
    # Measured: 0.06.
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)
