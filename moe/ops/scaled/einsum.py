"""A two-operand einsum of an activation and a weight in 8 bits, forward and backward."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe.ops.scaled.quantize import ALL, EACH, Scaled, quantize
from moe.ops.scaled.recipe import Recipe
from parallel.platform import platform


def scaled_einsum(spec: str, x: jax.Array, w: jax.Array, recipe: Recipe, history: jax.Array | None = None) -> jax.Array:
    """jnp.einsum(spec, x, w) with operands in 8 bits; the gradients of x and w likewise, from dy in 8 bits.

    Sums are taken in float32, of int8 in int32. What is kept for the backward pass are the 8-bit operands.

    Args:
        spec: of an activation and a weight, as "BTD,DNH->BTNH": every letter twice, none of them three times.
        x: the activation. w: the weight, of x's dtype.

    Returns:
        of x's dtype.

    Raises:
        ValueError: a spec that is not so, or dtypes that differ.
    """
    _check(spec, x, w)
    if recipe.scaling in ("delayed", "block") or history is not None:
        raise NotImplementedError('scaling "delayed" and "block" are not there yet: take "tensor" or "row"')
    return _einsum(spec, recipe, x, w)


def _check(spec: str, x: jax.Array, w: jax.Array) -> None:
    a, b, out = _letters(spec)
    if sorted(a + b + out) != sorted(2 * "".join(set(a + b + out))) or any(len(set(s)) < len(s) for s in (a, b, out)):
        raise ValueError(f"spec {spec!r}: each letter must stand in exactly two of the two operands and the result")
    if x.dtype != w.dtype:
        raise ValueError(f"x is {x.dtype} and w {w.dtype}: cast both to the compute format")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _einsum(spec: str, recipe: Recipe, x: jax.Array, w: jax.Array) -> jax.Array:
    return _forward(spec, recipe, x, w)[0]


def _forward(spec: str, recipe: Recipe, x: jax.Array, w: jax.Array):
    a, b, out = _letters(spec)
    dtype = recipe.forward_dtype
    x_y, w_y = (quantize(value, dtype, _shared(recipe, own, out)) for value, own in ((x, a), (w, b)))
    # As the backward products sum over other axes, other values share a scale there.
    if recipe.scaling == "tensor":
        saved = x_y, w_y
    else:
        saved = quantize(x, dtype, _shared(recipe, a, b)), quantize(w, dtype, _shared(recipe, b, a))
    return product(spec, x_y, w_y, x.dtype), saved


def _backward(spec: str, recipe: Recipe, saved: tuple[Scaled, Scaled], dy: jax.Array):
    a, b, out = _letters(spec)
    x, w = saved
    dy_x, dy_w = (quantize(dy, recipe.gradient_dtype, _shared(recipe, out, into)) for into in (a, b))
    return product(f"{out},{b}->{a}", dy_x, w, dy.dtype), product(f"{a},{out}->{b}", x, dy_w, dy.dtype)


_einsum.defvjp(_forward, _backward)


def product(spec: str, a: Scaled, b: Scaled, dtype: DTypeLike) -> jax.Array:
    """The einsum of two scaled arrays whose scales are one along every axis that is summed over."""
    left, right, out = _letters(spec)
    values = _values_product(spec, a.values, b.values)
    return (values * _onto(a.scales, left, out) * _onto(b.scales, right, out)).astype(dtype)


def _values_product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """f32: the einsum of the values alone."""
    if a.dtype == jnp.int8:
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.int32).astype(jnp.float32)
    if platform() == "cpu":
        # Every fp8 number is one of bfloat16.
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _letters(spec: str) -> tuple[str, str, str]:
    operands, out = spec.replace(" ", "").split("->")
    a, b = operands.split(",")
    return a, b, out


def _shared(recipe: Recipe, own: str, out: str) -> tuple[int, ...]:
    """What shares a scale along each axis of an operand, in the einsum whose result has the axes `out`."""
    if recipe.scaling == "tensor":
        return (ALL,) * len(own)
    return tuple(EACH if letter in out else ALL for letter in own)


def _onto(scales: jax.Array, own: str, out: str) -> jax.Array:
    """Scales with axes `own`, 1 long where `out` has none, laid along `out`."""
    kept = [letter for letter in own if letter in out]
    scales = scales.reshape([size for letter, size in zip(own, scales.shape, strict=True) if letter in out])
    scales = scales.transpose([kept.index(letter) for letter in out if letter in kept])
    return jnp.expand_dims(scales, [i for i, letter in enumerate(out) if letter not in kept])
