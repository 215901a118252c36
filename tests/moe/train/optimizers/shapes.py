"""Parameters of every kind, as small as an optimizer can be seen at work on, and its steps on any mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe.model.parameter import ParameterSpec, is_spec
from moe.train.optimizer import OptimizerConfig, make_optimizer
from moe.train.state import optimizer_shardings
from parallel.layout import SINGLE_DEVICE, Layout

SPECS: dict[str, Any] = {
    "embedding_VD": ParameterSpec((48, 32), jnp.dtype("float32"), "VD", "embedding"),
    "norm_D": ParameterSpec((32,), jnp.dtype("float32"), "D", "norm"),
    "stacks": {
        0: {
            "w_q_DNH": ParameterSpec((2, 32, 16, 8), jnp.dtype("float32"), "LDNH", "attention"),
            "w_o_NHD": ParameterSpec((2, 16, 8, 32), jnp.dtype("float32"), "LNHD", "attention"),
            "w_gate_EDF": ParameterSpec((2, 4, 32, 48), jnp.dtype("float32"), "LEDF", "expert"),
            "w_down_EFD": ParameterSpec((2, 4, 48, 32), jnp.dtype("float32"), "LEFD", "expert"),
            "w_DE": ParameterSpec((2, 32, 4), jnp.dtype("float32"), "LDE", "router"),
            "scale_D": ParameterSpec((2, 32), jnp.dtype("float32"), "LD", "norm"),
        }
    },
}


def values(seed: int, dtype: str = "float32", scale: float = 0.1) -> dict[str, Any]:
    r = np.random.default_rng(seed)
    return jax.tree.map(lambda spec: jnp.asarray(scale * r.normal(size=spec.shape), dtype), SPECS, is_leaf=is_spec)


def steps_on(layout: Layout, config: OptimizerConfig, dtype: str = "float32", steps: int = 3):
    """The parameters and states after a few steps."""
    optimizer, _ = make_optimizer(config, SPECS, 100, layout)
    params, state = values(0, dtype), None
    where = [None, None]
    if layout is not SINGLE_DEVICE:
        where[0] = jax.tree.map(lambda s: layout.stored(s.axes, s.shape), SPECS, is_leaf=is_spec)
        where[1] = optimizer_shardings(jax.eval_shape(optimizer.init, params), SPECS, layout)
        params = jax.device_put(params, where[0])
    state = jax.jit(optimizer.init, out_shardings=where[1])(params)

    def step(params, state, gradients, key):
        update = optax.with_extra_args_support(optimizer).update
        updates, state = update(gradients, state, params, key=key)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, out_shardings=None if where[0] is None else tuple(where))
    for number in range(steps):
        params, state = jitted(params, state, values(number + 1, scale=0.01), jax.random.key(number))
    return params, state
