"""Products with weights as XLA does them fastest on CPU; elsewhere they are left to XLA.

On CPU XLA hands a product to YNNPACK, which has bfloat16's own instructions, only where its sums are asked for in
float32 and its first operand is not transposed (xla/backends/cpu/ynn_support.cc). All others go to Eigen, bfloat16
widened to float32 beforehand, and take twice as long. A transposed operand of float32 Eigen takes as it is, in less
time than transposing it takes.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from parallel.platform import platform

PRODUCT = "product"
"""The name of results whose sums were wider, for rematerialisation."""

_TILE = 32


def einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """jnp.einsum(spec, a, b), of a's dtype and summed in float32; for what is not differentiated by JAX."""
    if platform() != "cpu":
        return jnp.einsum(spec, a, b)
    return wide_einsum(spec, a, b).astype(a.dtype)


def weight_einsum(spec: str, x: jax.Array, w: jax.Array, *, local: bool) -> jax.Array:
    """jnp.einsum(spec, x, w) of an activation and a weight, of x's dtype and summed in float32.

    Args:
        spec: the activation's axes begin, and the result's, with what the two share: "BTD,DNH->BTNH".
        local: whether the arrays are whole on one device, so that they may be cut into tiles.
    """
    if platform() != "cpu":
        return jnp.einsum(spec, x, w)
    return checkpoint_name(_einsum(spec, local, x, w), PRODUCT)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _einsum(spec: str, local: bool, x: jax.Array, w: jax.Array) -> jax.Array:
    return einsum(spec, x, w)


def _forward(spec: str, local: bool, x: jax.Array, w: jax.Array):
    return _einsum(spec, local, x, w), (x, w)


def _backward(spec: str, local: bool, saved, dy: jax.Array):
    x, w = saved
    own, weight, out = _letters(spec)
    dw = weight_gradient(spec, x, dy, local=local).astype(w.dtype)
    return einsum(f"{out},{weight}->{own}", dy, w).astype(x.dtype), dw


_einsum.defvjp(_forward, _backward)


def weight_gradient(spec: str, x: jax.Array, dy: jax.Array, *, local: bool) -> jax.Array:
    """f32, the gradient of w in `weight_einsum` from that of its result."""
    own, weight, out = _letters(spec)
    if not local or platform() != "cpu":
        return wide_einsum(f"{own},{out}->{weight}", x, dy)
    shared = [axis for axis in own if axis in out]
    rows = math.prod(x.shape[: len(shared)])
    x_RD, dy_RF = x.reshape(rows, -1), dy.reshape(rows, -1)
    in_order = weight.startswith(own[len(shared) :])
    if is_transposed_first(x.dtype):
        dw = jnp.dot(transposed(x_RD), dy_RF, preferred_element_type=jnp.float32)
        dw = dw if in_order else transposed(dw)
    else:
        first, second = (x_RD, dy_RF) if in_order else (dy_RF, x_RD)
        dw = jax.lax.dot_general(first, second, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    sizes = dict(zip(own + out, x.shape + dy.shape, strict=True))
    return dw.reshape([sizes[axis] for axis in weight])


def is_transposed_first(dtype: DTypeLike) -> bool:
    """Whether a product over rows is faster if its first operand has been transposed in memory."""
    return platform() == "cpu" and dtype == jnp.bfloat16


def _letters(spec: str) -> tuple[str, str, str]:
    operands, out = spec.split("->")
    own, weight = operands.split(",")
    return own, weight, out


def wide_einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """jnp.einsum(spec, a, b), summed and left in float32."""
    multiply = partial(jnp.einsum, spec, preferred_element_type=jnp.float32)
    own, other, out = _letters(spec)
    rows = [axis for axis in own if axis not in other]
    if platform() != "cpu" or a.dtype != jnp.bfloat16 or not rows or any(a.shape[own.index(r)] > 1 for r in rows):
        return multiply(a, b)
    # Of a product of one row XLA widens the matrix beforehand, which takes five times as long as another row.
    y = multiply(jnp.concatenate([a, a], own.index(rows[0])), b)
    return jax.lax.slice_in_dim(y, 0, 1, axis=out.index(rows[0]))


def transposed(x_RD: jax.Array) -> jax.Array:
    """x_DR, in memory: in two steps, first each tile and then the tiles, so that no line is fetched for one value; and
    so that XLA does not make a product of a transposed operand of it again."""
    R, D = x_RD.shape
    r, d = math.gcd(R, _TILE), math.gcd(D, _TILE)
    tiles = x_RD.reshape(R // r, r, D // d, d).transpose(0, 2, 3, 1)
    return jax.lax.optimization_barrier(jax.lax.optimization_barrier(tiles).transpose(1, 2, 0, 3).reshape(D, R))
