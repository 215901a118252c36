import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from moe.train.optimizers.rounding import rounded_by_chance, with_kahan_compensation, with_stochastic_rounding

STACKED = {"w_LDF": True, "scale_D": False}
RATE = 1e-3


def params_and_gradients():
    r = np.random.default_rng(0)
    params = {"w_LDF": 1 + r.random((3, 8, 16)), "scale_D": 1 + r.random(64)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    return params, jax.tree.map(lambda p: jnp.ones(p.shape, jnp.bfloat16), params)


def walked(optimizer, steps: int, **told):
    params, gradients = params_and_gradients()
    state = optimizer.init(params)
    for step in range(steps):
        more = {"key": jax.random.key(step)} if told else {}
        updates, state = optimizer.update(gradients, state, params, **more)
        params = optax.apply_updates(params, updates)
    return params, state


def moved(params) -> dict[str, float]:
    """How far the parameters have come, on average."""
    first, _ = params_and_gradients()
    return {
        name: float(np.mean(np.asarray(params[name], np.float64) - np.asarray(first[name], np.float64)))
        for name in first
    }


def test_nearest_rounding_would_lose_every_step():
    # Half of bfloat16's spacing from 1 to 2 is 2^-8, four steps.
    assert set(moved(walked(optax.sgd(RATE), 20)[0]).values()) == {0.0}


def test_compensated_steps_add_up():
    params, state = walked(with_kahan_compensation(optax.sgd(RATE)), 40)
    for name, distance in moved(params).items():
        # Within a quarter of bfloat16's spacing, 2^-7: on average half are above, half below.
        assert distance == pytest.approx(-40 * RATE, abs=2**-9)
        assert state.compensation[name].dtype == jnp.bfloat16
    # The parameter and what it has too much make up the exact value, but for rounding in the compensation.
    first, _ = params_and_gradients()
    exact = np.asarray(first["w_LDF"], np.float32) - 40 * RATE
    corrected = np.asarray(params["w_LDF"], np.float32) - np.asarray(state.compensation["w_LDF"], np.float32)
    np.testing.assert_allclose(corrected, exact, atol=2e-4)


def test_compensation_follows_a_loop():
    params, gradients = params_and_gradients()
    optimizer = with_kahan_compensation(optax.sgd(0.01))
    state = optimizer.init(params)
    weight, compensation = np.array(params["scale_D"]), np.zeros(64, ml_dtypes.bfloat16)
    for _ in range(5):
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for i in range(64):
            wanted = np.float32(-0.01) - np.float32(compensation[i])
            after = (np.float32(weight[i]) + wanted).astype(ml_dtypes.bfloat16)
            compensation[i] = np.float32(after) - np.float32(weight[i]) - wanted
            weight[i] = after
        np.testing.assert_array_equal(params["scale_D"], weight)
        np.testing.assert_array_equal(state.compensation["scale_D"], compensation)


def test_chance_is_right_on_average_and_exact_values_stay():
    x = jnp.full(40_000, 1 + 0.3 * 2**-7, jnp.float32)
    found = np.asarray(rounded_by_chance(x, jax.random.bits(jax.random.key(0), x.shape, jnp.uint16)), np.float32)
    assert set(found.tolist()) == {1.0, 1 + 2**-7}
    # Five standard deviations.
    assert (found > 1).mean() == pytest.approx(0.3, abs=5 * np.sqrt(0.21 / 40_000))
    exact = jnp.asarray([1.5, -2.0, 0.0, jnp.inf, -jnp.inf], jnp.float32)
    np.testing.assert_array_equal(rounded_by_chance(exact, jnp.full(5, 65_535, jnp.uint16)), exact.astype(jnp.bfloat16))
    assert np.isnan(float(rounded_by_chance(jnp.float32(jnp.nan), jnp.uint16(65_535))))


def test_steps_rounded_by_chance_add_up():
    params, _ = walked(with_stochastic_rounding(optax.sgd(RATE), STACKED), 40, key=True)
    for distance in moved(params).values():
        assert distance == pytest.approx(-40 * RATE, rel=0.1)
    again, _ = walked(with_stochastic_rounding(optax.sgd(RATE), STACKED), 40, key=True)
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_one_layer_is_rounded_as_in_its_stack():
    optimizer = with_stochastic_rounding(optax.sgd(RATE), STACKED)
    params, gradients = params_and_gradients()
    whole, _ = optimizer.update(gradients, optimizer.init(params), params, key=jax.random.key(7))
    for layer in range(3):
        own, masked = params["w_LDF"][layer], optax.MaskedNode()
        part, grads = {"w_LDF": own, "scale_D": masked}, {"w_LDF": gradients["w_LDF"][layer], "scale_D": masked}
        found, _ = optimizer.update(grads, optimizer.init(part), part, key=jax.random.key(7), layer=jnp.int32(layer))
        np.testing.assert_array_equal(found["w_LDF"], whole["w_LDF"][layer])
    assert len({np.asarray(layer).tobytes() for layer in whole["w_LDF"]}) == 3
