import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe.train.optimizers.adam import scale_by_adam
from moe.train.optimizers.moments import MomentFormat
from tests.oracle import moments as oracle


def gradients(steps: int, shape=(3, 16)) -> list[np.ndarray]:
    r = np.random.default_rng(0)
    sizes = 10 ** r.uniform(-2, 0, shape)
    return [(r.normal(size=shape) * sizes).astype(np.float32) for _ in range(steps)]


def directions(optimizer, steps: int):
    params = {"w": jnp.zeros((3, 16)), "norm": jnp.zeros(16)}
    state, told = optimizer.init(params), []
    for g in gradients(steps):
        updates, state = jax.jit(optimizer.update)({"w": g, "norm": g[0]}, state)
        told.append(updates)
    return told, state


def test_float32_moments_are_those_of_optax_bit_by_bit():
    found, state = directions(scale_by_adam(MomentFormat("float32"), 0.9, 0.95, 1e-8), 4)
    expected, expected_state = directions(optax.scale_by_adam(0.9, 0.95, 1e-8), 4)
    jax.tree.map(np.testing.assert_array_equal, (found, state), (expected, expected_state))


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_eight_bits_follow_a_loop_over_blocks(name):
    formats = {"w": MomentFormat(name, (16,)), "norm": MomentFormat("float32")}
    found, state = directions(scale_by_adam(formats, 0.9, 0.95, 1e-8), 4)
    assert state.mu["w"].values.dtype.itemsize == state.nu["w"].values.dtype.itemsize == 1
    assert state.mu["norm"].dtype == jnp.float32
    for row in range(3):
        expected = oracle.adam([g[row].astype(np.float64) for g in gradients(4)], name, 0.9, 0.95, 1e-8)
        for step in range(4):
            np.testing.assert_allclose(found[step]["w"][row], expected[step], rtol=2e-4)


def test_bfloat16_moments_move_almost_as_float32_ones():
    found, state = directions(scale_by_adam(MomentFormat("bfloat16")), 8)
    expected, _ = directions(scale_by_adam(MomentFormat("float32")), 8)
    assert state.mu["w"].dtype == state.nu["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(found[-1]["w"], expected[-1]["w"], atol=2e-2)
    assert (found[-1]["w"] != expected[-1]["w"]).any()


def test_what_is_masked_out_stays_so():
    optimizer = scale_by_adam({"w": MomentFormat("int8", (16,)), "norm": MomentFormat("float32")})
    part = {"w": jnp.ones((3, 16)), "norm": optax.MaskedNode()}
    state = optimizer.init(part)
    updates, state = jax.jit(optimizer.update)(part, state)
    np.testing.assert_allclose(updates["w"], 1.0, rtol=1e-5)
    assert updates["norm"] == state.mu["norm"] == optax.MaskedNode()
