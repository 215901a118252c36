import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe.model.config import ConfigError
from moe.model.parameter import ParameterSpec
from moe.model.precision import Precision
from moe.train.optimizer import OptimizerConfig, check_optimizer, make_optimizer
from parallel.layout import LayoutConfig

SPECS = {
    "norm_D": ParameterSpec((3,), jnp.dtype("float32"), "D", "norm"),
    "w_DE": ParameterSpec((3, 2), jnp.dtype("float32"), "DE", "router"),
    "w_EDF": ParameterSpec((2, 3, 2), jnp.dtype("float32"), "EDF", "expert"),
}


def trees(seed):
    r = np.random.default_rng(seed)
    return {name: jnp.asarray(r.normal(size=spec.shape), jnp.float32) for name, spec in SPECS.items()}


def test_five_steps_are_adamw_with_clipping_by_hand():
    config = OptimizerConfig(
        learning_rate=0.1, schedule="constant", warmup_steps=2, weight_decay=0.3, clip_norm=0.5, expert_rate=0.4
    )
    optimizer, rate = make_optimizer(config, SPECS, 10)
    params = trees(0)
    expected = {name: np.asarray(x, np.float64) for name, x in params.items()}
    state = optimizer.init(params)
    m = dict.fromkeys(SPECS, 0.0)
    v = dict.fromkeys(SPECS, 0.0)
    for step in range(5):
        grads = trees(step + 1)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)

        norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in grads.values()))
        for name, spec in SPECS.items():
            g = np.asarray(grads[name], np.float64) * min(1, 0.5 / norm)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            direction = (m[name] / (1 - 0.9 ** (step + 1))) / (np.sqrt(v[name] / (1 - 0.95 ** (step + 1))) + 1e-8)
            if spec.kind != "norm":
                direction = direction + 0.3 * expected[name]
            own_rate = 0.1 * min(1, (step + 1) / 2) * (0.4 if spec.kind == "expert" else 1)
            expected[name] = expected[name] - own_rate * direction
        for name in SPECS:
            np.testing.assert_allclose(params[name], expected[name], rtol=1e-4, atol=1e-6)
    assert float(rate(0)) == pytest.approx(0.05)


def test_no_clipping_leaves_large_gradients():
    optimizer, _ = make_optimizer(OptimizerConfig(clip_norm=None, warmup_steps=0), SPECS, 10)
    params, grads = trees(0), jax.tree.map(lambda g: 1e6 * g, trees(1))
    _, state = optimizer.update(grads, optimizer.init(params), params)
    adam = next(part for part in state if hasattr(part, "mu"))
    np.testing.assert_allclose(adam.mu["w_DE"], 0.1 * grads["w_DE"], rtol=1e-5)


def test_a_compiled_update_writes_no_gradient_down():
    specs = {"w_EDF": ParameterSpec((4, 256, 128), jnp.dtype("float32"), "EDF", "expert")}
    optimizer, _ = make_optimizer(OptimizerConfig(clip_norm=0.5, warmup_steps=0), specs, 10)
    params = {"w_EDF": jnp.zeros((4, 256, 128))}

    def update(gradients, state, params):
        updates, state = optimizer.update(gradients, state, params)
        return state, optax.apply_updates(params, updates)

    compiled = jax.jit(update, donate_argnums=(1, 2)).lower(params, optimizer.init(params), params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < params["w_EDF"].nbytes / 10


def test_a_part_of_the_gradients_is_clipped_by_the_norm_of_all():
    optimizer, _ = make_optimizer(OptimizerConfig(clip_norm=0.5, warmup_steps=0), SPECS, 10)
    params, grads = trees(0), trees(1)
    whole, _ = optimizer.update(grads, optimizer.init(params), params)
    told, _ = optimizer.update(grads, optimizer.init(params), params, norm=optax.tree.norm(grads))
    jax.tree.map(np.testing.assert_array_equal, told, whole)
    _, state = optimizer.update(grads, optimizer.init(params), params, norm=jnp.float32(10.0))
    adam = next(part for part in state if hasattr(part, "mu"))
    np.testing.assert_allclose(adam.mu["w_DE"], 0.1 * grads["w_DE"] * 0.5 / 10, rtol=1e-5)


def test_master_weights_add_up_what_bfloat16_would_lose():
    config = OptimizerConfig(learning_rate=1e-4, schedule="constant", warmup_steps=0, weight_decay=0.0)
    exact, _ = make_optimizer(config, SPECS, 10)
    optimizer, _ = make_optimizer(dataclasses.replace(config, master_weights=True), SPECS, 10)
    params = jax.tree.map(lambda x: (2 + jnp.abs(x)).astype(jnp.bfloat16), trees(0))
    expected = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    grads = jax.tree.map(lambda x: jnp.abs(x).astype(jnp.bfloat16), trees(1))
    state, exact_state, first = optimizer.init(params), exact.init(expected), params
    for _ in range(100):
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        # A step of 1e-4 is far below half of bfloat16's spacing at 2, 2^-7.
        updates, exact_state = exact.update(jax.tree.map(lambda g: g.astype(jnp.float32), grads), exact_state, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda m, e: np.testing.assert_allclose(m, e, rtol=1e-6), state.master, expected)
    jax.tree.map(lambda p, e: np.testing.assert_array_equal(p, e.astype(jnp.bfloat16)), params, state.master)
    assert all((p < f).any() for p, f in zip(jax.tree.leaves(params), jax.tree.leaves(first), strict=True))


@pytest.mark.parametrize("setting", [{"master_weights": True}, {"rounding": "kahan"}, {"rounding": "stochastic"}])
def test_float32_parameters_need_nothing_that_bfloat16_does(setting):
    ((name, value),) = setting.items()
    told = f"optimizer.{name}={'true' if value is True else repr(value)} with precision.parameters='float32'"
    with pytest.raises(ConfigError, match=told):
        check_optimizer(OptimizerConfig(**setting), Precision(), LayoutConfig())
    check_optimizer(OptimizerConfig(**setting), Precision(parameters="bfloat16"), LayoutConfig())


def test_matrices_that_wait_on_the_host_are_not_orthogonalized():
    with pytest.raises(ConfigError, match="optimizer.kind='muon' with layout.optimizer_states='host'.*kind='adamw'"):
        check_optimizer(OptimizerConfig(kind="muon"), Precision(), LayoutConfig(optimizer_states="host"))


def test_muon_needs_a_matrix():
    specs = {"a_DJ": ParameterSpec((4, 2), jnp.dtype("float32"), "DJ", "adapter")}
    with pytest.raises(ConfigError, match="optimizer.kind='muon': none of the trained parameters .* set kind='adamw'"):
        make_optimizer(OptimizerConfig(kind="muon"), specs, 1000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "step"}, "optimizer.schedule='step': give one of constant, linear, cosine, hunyuan"),
        ({"learning_rate": 0.0}, "optimizer.learning_rate=0.0: give a number above 0"),
        ({"b2": 1.0}, "optimizer.b2=1.0: give a number from 0 to below 1"),
        ({"warmup_steps": -1}, "optimizer.warmup_steps=-1"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay=-0.1"),
        ({"final_share": 2.0}, "optimizer.final_share=2.0"),
        ({"clip_norm": 0.0}, "optimizer.clip_norm=0.0: give a norm above 0, or None"),
        ({"undecayed": ("bias",)}, r"optimizer.undecayed names \['bias'\]: the kinds are embedding"),
        ({"kind": "sgd"}, "optimizer.kind='sgd': give one of adamw, adafactor, muon"),
        ({"states": "int4"}, "optimizer.states='int4': give one of float32, bfloat16, int8, fp8"),
        ({"rounding": "up"}, "optimizer.rounding='up': give one of nearest, stochastic, kahan"),
        ({"momentum": 1.0}, "optimizer.momentum=1.0"),
        (
            {"states": "bfloat16", "b2": 0.999},
            "optimizer.states='bfloat16' with optimizer.b2=0.999: .*b2 to 0.996",
        ),
        ({"states": "int8", "kind": "adafactor"}, "optimizer.states='int8' with optimizer.kind='adafactor'"),
        (
            {"master_weights": True, "rounding": "kahan"},
            "master_weights=true with optimizer.rounding='kahan'",
        ),
        ({"learning_rate": float("nan")}, "optimizer.learning_rate=nan"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**changes)


def test_a_warmup_as_long_as_the_run_is_refused():
    with pytest.raises(ConfigError, match="optimizer.warmup_steps=10 with training.steps=10: warm up for fewer steps"):
        make_optimizer(OptimizerConfig(warmup_steps=10), SPECS, 10)
