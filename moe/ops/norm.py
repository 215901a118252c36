"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """x / sqrt(mean(x²) + eps), times `weight`, over the last axis (Zhang and Sennrich, arXiv 1910.07467).

    Normalised in float32, cast to x's dtype, and only then scaled (released code, HunYuanRMSNorm).

    Args:
        x: any shape.
        weight: of the size of x's last axis; None for no scale.
        eps: added to the mean square, dimensionless.

    Returns:
        of x's shape and dtype.
    """
    x_f32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True)
    normalised = (x_f32 * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)
    return normalised if weight is None else weight.astype(x.dtype) * normalised
