"""A two-operand einsum of an activation and a weight in 8 bits, forward and backward."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe.ops.scaled.history import DY, W, X, next_history, quantize_delayed
from moe.ops.scaled.partitioned import kernel_einsum
from moe.ops.scaled.quantize import Scaled, multiplied, quantize, scaled_along_the_sum, spread, sum_dtype, widened
from moe.ops.scaled.recipe import Recipe, Split
from parallel.platform import platform


def scaled_einsum(
    spec: str, x: jax.Array, w: jax.Array, recipe: Recipe, history: jax.Array | None = None, *, split: Split = ()
) -> jax.Array:
    """jnp.einsum(spec, x, w) with operands in 8 bits; the gradients of x and w likewise, from dy in 8 bits.

    Sums are taken in float32, of int8 in int32, which holds 133,152 products of its largest values. What is kept for
    the backward pass are the 8-bit operands.

    Args:
        spec: of an activation and a weight, as "BTD,DNH->BTNH": every letter twice, none of them three times.
        x: the activation. w: the weight, of x's dtype.
        history: with "delayed" only, f32 [3, HISTORY_LENGTH]; its cotangent is the next one (`moe.ops.scaled.history`).
        split: inside `jax.shard_map`, the mesh axes that split each axis; scales are then those of the whole arrays.

    Returns:
        of x's dtype.

    Raises:
        ValueError: a spec that is not so, dtypes that differ, or a history that is missing or not needed.
    """
    a, b, out = _letters(spec)
    if sorted(a + b + out) != sorted(2 * "".join(set(a + b + out))) or any(len(set(s)) < len(s) for s in (a, b, out)):
        raise ValueError(f"spec {spec!r}: each letter must stand in exactly two of the two operands and the result")
    if x.dtype != w.dtype:
        raise ValueError(f"x is {x.dtype} and w {w.dtype}: cast both to the compute format")
    recipe.check_history(history)
    return _einsum(spec, recipe, split, x, w, history)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _einsum(
    spec: str, recipe: Recipe, split: Split, x: jax.Array, w: jax.Array, history: jax.Array | None
) -> jax.Array:
    return _forward(spec, recipe, split, x, w, history)[0]


def _forward(spec: str, recipe: Recipe, split: Split, x, w, history):
    (a, b, out), dtype = _letters(spec), recipe.forward_dtype
    quantized = partial(_quantized, recipe, split, dtype)
    if history is not None:
        x_y, x_largest = quantize_delayed(x, dtype, history, X)
        w_y, w_largest = quantize_delayed(w, dtype, history, W)
        saved, past = (x_y, w_y), (history, x_largest, w_largest)
    else:
        x_y, w_y = quantized(x, a, out), quantized(w, b, out, weight=True)
        # The backward products sum over other axes, along which others share a scale.
        x_dw, w_dx = quantized(x, a, b), quantized(w, b, a, weight=True)
        saved, past = (x_dw, w_dx), None
    return product(spec, x_y, w_y, x.dtype), (*saved, past)


def _backward(spec: str, recipe: Recipe, split: Split, saved, dy: jax.Array):
    (a, b, out), dtype = _letters(spec), recipe.gradient_dtype
    x, w, past = saved
    history = None
    if past is not None:
        history, x_largest, w_largest = past
        dy_dx, dy_largest = quantize_delayed(dy, dtype, history, DY)
        dy_dw = dy_dx
        history = next_history(history, (x_largest, w_largest, dy_largest))
    else:
        dy_dx, dy_dw = (_quantized(recipe, split, dtype, dy, out, into, gradient=True) for into in (a, b))
    dx, dw = product(f"{out},{b}->{a}", dy_dx, w, dy.dtype), product(f"{a},{out}->{b}", x, dy_dw, dy.dtype)
    return dx, dw, history


_einsum.defvjp(_forward, _backward)


def _quantized(
    recipe: Recipe, split: Split, dtype, x: jax.Array, own: str, out: str, *, weight: bool = False, gradient=False
):
    """An operand with the axes `own`, for a product whose result has the axes `out`."""
    shared, over = recipe.shared(own, out, weight=weight), recipe.over(own, out, split)
    return quantize(x, dtype, shared, over, gradient=gradient)


def product(spec: str, a: Scaled, b: Scaled, dtype: DTypeLike) -> jax.Array:
    """The einsum of two scaled arrays."""
    left, right, out = _letters(spec)
    blocks = scaled_along_the_sum(a, left, out) or scaled_along_the_sum(b, right, out)
    # XLA's own kernels of int8 gave wrong sums on an H200 (experiments/LOG.md, 2026-11-26).
    if platform() == "gpu" and (blocks or a.values.dtype == jnp.int8):
        return kernel_einsum(f"{left},{right}->{out}", a, b).astype(dtype)
    if blocks:
        return jnp.einsum(spec, widened(a), widened(b), preferred_element_type=jnp.float32).astype(dtype)
    x, w = (a.values, b.values) if platform() == "gpu" else (multiplied(a), multiplied(b))
    # Otherwise tensor cores may drop bits of sums of fp8 (cuBLASLt's fast accumulation; DeepSeek-V3 §3.3.2).
    precision = jax.lax.Precision.HIGHEST if platform() == "gpu" else None
    y = jnp.einsum(spec, x, w, preferred_element_type=sum_dtype(a), precision=precision).astype(jnp.float32)
    return (y * _onto(a, left, out) * _onto(b, right, out)).astype(dtype)


def _letters(spec: str) -> tuple[str, str, str]:
    operands, out = spec.replace(" ", "").split("->")
    a, b = operands.split(",")
    return a, b, out


def _onto(x: Scaled, own: str, out: str) -> jax.Array:
    """The scales of x with axes `own`, 1 long where `out` has none, laid along `out`."""
    scales, kept = spread(x.scales, x.values.shape), [axis for axis in own if axis in out]
    scales = scales.reshape([size for axis, size in zip(own, scales.shape, strict=True) if axis in out])
    scales = scales.transpose([kept.index(axis) for axis in out if axis in kept])
    return jnp.expand_dims(scales, [i for i, axis in enumerate(out) if axis not in kept])
