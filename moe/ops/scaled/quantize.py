"""Arrays in 8 bits with float32 scales: which values share a scale, and how the scale is found.

fp8's scales are powers of two, rounded up: values move between binades without a rounding of their own, so the format's
is the only one, and what is saved can be widened and scaled exactly in bfloat16 (DeepSeek-V3, arXiv 2412.19437 §3.3.2,
does so for activations that are quantized twice; V3.1 for all). int8 has no exponent: half a bit of eight would be lost
so, and its scales are largest · (1 / 127). Neither is below float32's smallest normal number, 2^-126.

A value that is not finite makes its scale nan, and so all that shares it: it is seen in every product.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from parallel.blocks import magnitude

BLOCK = 128
"""Values along an axis that share a scale (DeepSeek-V3, §3.3.2)."""
EACH, ALL = 1, 0
"""Besides BLOCK, how many entries of an axis share a scale: each has its own, or all have one."""


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=[])
@dataclass(frozen=True)
class Scaled:
    """values · scales.

    values: float8_e4m3fn, float8_e5m2 or int8.
    scales: f32 of as many axes, each 1 long, as long as values', or one for each BLOCK, the last of which may be short.
    """

    values: jax.Array
    scales: jax.Array


def largest_magnitude(x: jax.Array, shared: tuple[int, ...]) -> jax.Array:
    """f32: |x|'s maximum over what shares a scale; infinity where any of that is not finite.

    Args:
        shared: for each axis EACH, BLOCK or ALL.
    """
    everything = tuple(axis for axis, share in enumerate(shared) if share == ALL)
    x = magnitude(x).max(everything, keepdims=True, initial=0)
    for axis, share in enumerate(shared):
        if share == BLOCK:
            widths = [(0, -x.shape[axis] % BLOCK if i == axis else 0) for i in range(x.ndim)]
            x = jnp.pad(x, widths)
            x = x.reshape(*x.shape[:axis], -1, BLOCK, *x.shape[axis + 1 :]).max(axis + 1)
    return x.astype(jnp.float32)


def scales_for(largest: jax.Array, dtype: DTypeLike) -> jax.Array:
    """f32: the scales with which `largest` is within the format; 1 for what is all zero, nan for what is not finite."""
    # By products with constants, as XLA rewrites quotients in some programs and not in others.
    if dtype == jnp.int8:
        scales = largest * jnp.float32(1 / 127)
    else:
        # The largest number is 1.75 · 2^n: what is above 1.75 carries into the exponent.
        n = 8 if dtype == jnp.float8_e4m3fn else 15
        bits = jax.lax.bitcast_convert_type(largest * 2.0**-n, jnp.uint32)
        scales = jax.lax.bitcast_convert_type((bits + 0x1FFFFF) & 0x7F800000, jnp.float32)
    scales = jnp.maximum(scales, jnp.finfo(jnp.float32).tiny)
    return jnp.where(jnp.isfinite(largest), jnp.where(largest == 0, 1, scales), jnp.nan)


def quantize(
    x: jax.Array, dtype: DTypeLike, shared: tuple[int, ...], over: tuple[str, ...] = (), *, gradient: bool = False
) -> Scaled:
    """Values of the format, of x with its own largest magnitudes as the scales.

    Args:
        over: mesh axes, inside `jax.shard_map`, over which what shares a scale goes on.
        gradient: whether x is one; see `rounded`.
    """
    largest = largest_magnitude(x, shared)
    if over:
        largest = jax.lax.pmax(largest, over)
    scales = scales_for(largest, dtype)
    return Scaled(rounded(x, scales, dtype, gradient=gradient), scales)


def rounded(x: jax.Array, scales: jax.Array, dtype: DTypeLike, *, gradient: bool = False) -> jax.Array:
    """x · (1 / scales) in the format, the nearest value, ties to even; finite values beyond its largest become that.

    A gradient in int8 becomes the value below or above, so that it is right on average. Of a logit's gradients nearly
    all are far below 1/254 of the largest: as the nearest they would be zero, and no wrong token's logit would fall.
    (AQT rounds gradients so, too.)
    """
    # By the reciprocal, as XLA rewrites quotients in some programs and not in others.
    scaled = x.astype(jnp.float32) * spread(1 / scales, x.shape)
    if dtype == jnp.int8:
        whole = jnp.floor(scaled + _chance(x)) if gradient else jnp.round(scaled)
        return jnp.clip(whole, -127, 127).astype(jnp.int8)
    top = float(jnp.finfo(dtype).max)
    # By way of its bits, as which rematerialisation keeps it (moe/model/remat.py).
    bits = jax.lax.bitcast_convert_type(jnp.clip(scaled, -top, top).astype(dtype), jnp.uint8)
    return jax.lax.bitcast_convert_type(bits, dtype)


def _chance(x: jax.Array) -> jax.Array:
    """f32 from 0 to below 1, evenly: from a value's own bits, which need no key (MurmurHash3's finalizer). Where meshes
    differ in a value's last bit, they may round it differently. Of 16 bits, with which no sum below 128 is rounded."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return (bits >> 16).astype(jnp.float32) * jnp.float32(2.0**-16)


def scaled_along_the_sum(x: Scaled, own: str, out: str) -> bool:
    """Whether x, with the axes `own`, has several scales along what is summed over for a result with the axes `out`."""
    return any(size > 1 for axis, size in zip(own, x.scales.shape, strict=True) if axis not in out)


def spread(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Scales of blocks repeated for each of their values; axes that share one stay 1 long."""
    for axis, size in enumerate(shape):
        if scales.shape[axis] not in (1, size):
            scales = jax.lax.slice_in_dim(jnp.repeat(scales, BLOCK, axis), 0, size, axis=axis)
    return scales


def multiplied(x: Scaled) -> jax.Array:
    """The values as a CPU multiplies them: fp8 in bfloat16, which holds all its numbers, and int8 as it is."""
    return x.values if x.values.dtype == jnp.int8 else x.values.astype(jnp.bfloat16)


def widened(x: Scaled) -> jax.Array:
    """values · scales, where these cannot be taken out of a sum: exact in bfloat16 for fp8, whose scales are powers of
    two; in float32 for int8."""
    dtype = jnp.float32 if x.values.dtype == jnp.int8 else jnp.bfloat16
    return x.values.astype(dtype) * spread(x.scales, x.values.shape).astype(dtype)


def sum_dtype(x: Scaled) -> DTypeLike:
    """In which products of the values are summed."""
    return jnp.int32 if x.values.dtype == jnp.int8 else jnp.float32
