"""Adam's direction (arXiv 1412.6980), with moments in the format that is asked for."""

from typing import Any

import jax.numpy as jnp
import optax

from moe.train.optimizers.moments import all_decoded, all_encoded, all_zero, widened


def scale_by_adam(formats: Any, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, computed in float32, whose moments are kept in their formats from step to step.

    Args:
        formats: a MomentFormat for each parameter, or one for all.
    """
    adam = optax.scale_by_adam(b1, b2, eps)

    def kept(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
        mu, nu = (all_encoded(formats, *each) for each in ((state.mu, True), (state.nu, False)))
        return optax.ScaleByAdamState(state.count, mu, nu)

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = (all_zero(formats, params, signed) for signed in (True, False))
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), *zeros)

    def update(gradients: Any, state: optax.ScaleByAdamState, params: Any = None):
        del params
        wide = optax.ScaleByAdamState(state.count, all_decoded(state.mu, True), all_decoded(state.nu, False))
        updates, after = adam.update(widened(gradients), wide)
        return updates, kept(after)

    return optax.GradientTransformation(init, update)
