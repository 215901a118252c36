import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe.train.optimizers.adafactor import scale_by_adafactor
from moe.train.optimizers.matrices import MatrixAxes, matrix_axes


def random(seed: int, *shape) -> np.ndarray:
    r = np.random.default_rng(seed)
    return (r.normal(size=shape) * 10 ** r.uniform(-2, 0, shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("axes", "rows", "columns"),
    [
        ("LEDF", (-2,), (-1,)),
        ("LEFD", (-2,), (-1,)),
        ("LDNH", (-3,), (-2, -1)),
        ("LNHD", (-3, -2), (-1,)),
        ("VD", (-2,), (-1,)),
        ("LDE", (-2,), (-1,)),
        ("LD", (-1,), ()),
        ("D", (-1,), ()),
    ],
)
def test_rows_are_what_a_product_sums_over(axes, rows, columns):
    assert matrix_axes(axes) == MatrixAxes(rows, columns)


def one_matrix(gradients: list[np.ndarray], largest: float) -> list[np.ndarray]:
    """Algorithm 4 of the paper, entry by entry, without relative steps."""
    rows, columns = gradients[0].shape
    r, c, updates = np.zeros(rows), np.zeros(columns), []
    for step, g in enumerate(gradients, start=1):
        decay = min(1 - step**-0.8, largest)
        for i in range(rows):
            r[i] = decay * r[i] + (1 - decay) * np.mean([g[i, j] ** 2 + 1e-30 for j in range(columns)])
        for j in range(columns):
            c[j] = decay * c[j] + (1 - decay) * np.mean([g[i, j] ** 2 + 1e-30 for i in range(rows)])
        u = np.array([[g[i, j] / np.sqrt(r[i] * c[j] / r.mean()) for j in range(columns)] for i in range(rows)])
        updates.append(u / max(1.0, np.sqrt((u**2).mean())))
    return updates


def test_every_layer_and_expert_is_the_papers_algorithm():
    gradients = [random(step, 2, 3, 4, 6).astype(np.float64) for step in range(4)]
    optimizer = scale_by_adafactor({"w": matrix_axes("LEDF")}, 0.6)
    state, found = optimizer.init({"w": jnp.zeros((2, 3, 4, 6))}), []
    for g in gradients:
        updates, state = jax.jit(optimizer.update)({"w": jnp.asarray(g, jnp.float32)}, state)
        found.append(np.asarray(updates["w"]))
    assert state.squares["w"].rows.shape == (2, 3, 4, 1)
    assert state.squares["w"].columns.shape == (2, 3, 1, 6)
    for layer, expert in np.ndindex(2, 3):
        expected = one_matrix([g[layer, expert] for g in gradients], 0.6)
        for step in range(4):
            np.testing.assert_allclose(found[step][layer, expert], expected[step], rtol=1e-4)


def test_one_matrix_is_optaxs_own():
    ours = scale_by_adafactor({"w_DF": matrix_axes("DF"), "scale_D": matrix_axes("D")}, 1.0)
    theirs = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=2), optax.clip_by_block_rms(1.0))
    params = {"w_DF": jnp.zeros((4, 6)), "scale_D": jnp.zeros(8)}
    state, their_state = ours.init(params), theirs.init(params)
    for step in range(3):
        gradients = {"w_DF": jnp.asarray(random(step, 4, 6)), "scale_D": jnp.asarray(random(step, 8))}
        found, state = ours.update(gradients, state, params)
        expected, their_state = theirs.update(gradients, their_state, params)
        jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5), found, expected)
