"""Root-mean-square normalisation."""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """x / sqrt(mean(x²) + eps), times `weight`, over the last axis (Zhang and Sennrich, arXiv 1910.07467).

    Normalised in float32, cast to x's dtype, and only then scaled (released code, HunYuanRMSNorm). The backward pass is
    saved x as it is, in its own format, and divides anew.

    Args:
        x: any shape.
        weight: of the size of x's last axis; None for no scale.
        eps: added to the mean square, dimensionless.

    Returns:
        of x's shape and dtype.
    """
    normalised = _divided(x, eps)[0].astype(x.dtype)
    return normalised if weight is None else weight.astype(x.dtype) * normalised


def _divided(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """f32: x over its root mean square, and the inverse of that."""
    x_f32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + eps)
    return x_f32 * inverse, inverse


def _forward(x: jax.Array, weight: jax.Array | None, eps: float):
    return rms_norm(x, weight, eps), (x, weight)


def _backward(eps: float, saved, dy: jax.Array):
    """With n = x · r and r = (mean(x²) + eps)^(-1/2): dx = r · (dn − n · mean(dn · n)), in float32."""
    x, weight = saved

    def terms(x, dy):
        normalised, inverse = _divided(x, eps)
        dn = dy.astype(jnp.float32) * (1 if weight is None else weight.astype(jnp.float32))
        return normalised, inverse, dn

    normalised, _, dn = terms(x, dy)
    mean = jnp.mean(dn * normalised, axis=-1, keepdims=True)
    dweight = None
    if weight is not None:
        products = dy * normalised.astype(x.dtype)
        dweight = products.sum(tuple(range(x.ndim - 1)), dtype=jnp.float32).astype(weight.dtype)
    # Computed twice, or XLA would store the terms in float32 between the sums and the result.
    x, dy, mean = jax.lax.optimization_barrier((x, dy, mean))
    normalised, inverse, dn = terms(x, dy)
    return (inverse * (dn - normalised * mean)).astype(x.dtype), dweight


rms_norm.defvjp(_forward, _backward)
