"""Adam's direction (arXiv 1412.6980), with moments in the format that is asked for."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe.train.optimizers.moments import Blocks, MomentFormat, by_format, decoded, encoded, parted, zero_moments


class _Stepped(NamedTuple):
    """Of one parameter."""

    update: jax.Array
    mu: jax.Array | Blocks
    nu: jax.Array | Blocks


def scale_by_adam(formats: Any, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8) -> optax.GradientTransformation:
    """As `optax.scale_by_adam`, which it equals where moments are float32; computes in float32.

    Args:
        formats: a MomentFormat for each parameter, or one for all.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        return optax.ScaleByAdamState(
            jnp.zeros((), jnp.int32),
            mu=zero_moments(formats, params, signed=True),
            nu=zero_moments(formats, params, signed=False),
        )

    def update(gradients: Any, state: optax.ScaleByAdamState, params: Any = None):
        del params
        count = optax.safe_increment(state.count)

        def step(format: MomentFormat, gradient: jax.Array, mu: Any, nu: Any) -> _Stepped:
            gradient = gradient.astype(jnp.float32)
            first = (1 - b1) * gradient + b1 * decoded(mu, signed=True)
            second = (1 - b2) * gradient**2 + b2 * decoded(nu, signed=False)
            direction = (first / (1 - b1**count)) / (jnp.sqrt(second / (1 - b2**count)) + eps)
            return _Stepped(direction, encoded(first, format, signed=True), encoded(second, format, signed=False))

        updates, mu, nu = parted(_Stepped, by_format(step, formats, gradients, state.mu, state.nu))
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)
