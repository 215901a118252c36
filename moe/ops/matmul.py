"""Products with weights as XLA does them fastest on CPU; elsewhere they are left to XLA.

On CPU XLA hands a product to YNNPACK, which has bfloat16's own instructions, only where its sums are asked for in
float32 and its first operand is not transposed (xla/backends/cpu/ynn_support.cc). All others go to Eigen, bfloat16
widened to float32 beforehand, and take twice as long. A transposed operand of float32 Eigen takes as it is, in less
time than transposing it takes.

A processor without those instructions takes longer for bfloat16 than for float32. There operands of many rows are
widened, and one row is multiplied without XLA's products at all (`row_product`).
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from moe.ops.bits import as_bits, from_bits
from moe.ops.places import entry
from parallel.platform import multiplies_bfloat16, platform

PRODUCT = "product"
"""The name of results whose sums were wider, for rematerialisation."""

_TILE = 32
_MANY_ROWS = 64
"""From which on widening a matrix costs less than it saves."""
_ROWS_TOGETHER = {4: 8, 2: 4}
"""Rows of a matrix in one turn of `row_product`, by bytes of a number: of fewer the turns themselves take long, of more
the code is slow."""


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
    own, weight, out = _letters(spec)
    summed = "".join(axis for axis in own if axis not in out)
    one_row = x.size == math.prod(w.shape[: len(summed)]) and weight.startswith(summed) and own.endswith(summed)
    if local and one_row and _is_slower_than_wide(x.dtype):
        y_F = row_product(x.reshape(-1), w.reshape(x.size, -1))
        return y_F.astype(x.dtype).reshape(*x.shape[: len(own) - len(summed)], *w.shape[len(summed) :])
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
    x_RD, dy_RF = operand(x.reshape(rows, -1)), operand(dy.reshape(rows, -1))
    in_order = weight.startswith(own[len(shared) :])
    if is_transposed_first(x_RD.dtype):
        dw = jnp.dot(transposed(x_RD), dy_RF, preferred_element_type=jnp.float32)
        dw = dw if in_order else transposed(dw)
    else:
        first, second = (x_RD, dy_RF) if in_order else (dy_RF, x_RD)
        dw = jax.lax.dot_general(first, second, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    sizes = dict(zip(own + out, x.shape + dy.shape, strict=True))
    return dw.reshape([sizes[axis] for axis in weight])


def is_transposed_first(dtype: DTypeLike) -> bool:
    """Whether a product over rows is faster if its first operand has been transposed in memory."""
    return platform() == "cpu" and dtype == jnp.bfloat16 and not _is_slower_than_wide(dtype)


def operand(x: jax.Array) -> jax.Array:
    """As a product of many rows takes it: bfloat16 widened on a CPU that has no products of it."""
    return x.astype(jnp.float32) if _is_slower_than_wide(x.dtype) else x


def _is_slower_than_wide(dtype: DTypeLike) -> bool:
    return platform() == "cpu" and dtype == jnp.bfloat16 and not multiplies_bfloat16()


def _letters(spec: str) -> tuple[str, str, str]:
    operands, out = spec.split("->")
    own, weight = operands.split(",")
    return own, weight, out


def wide_einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """jnp.einsum(spec, a, b), summed and left in float32; each axis stands in two parts of the spec, or in all."""
    if platform() != "cpu":
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
    multiply = partial(_einsum_as_it_stands, spec)
    if a.dtype != jnp.bfloat16:
        return multiply(a, b)
    own, other, out = _letters(spec)
    rows = [axis for axis in own if axis not in other]
    num_rows = math.prod(a.shape[own.index(axis)] for axis in rows)
    if num_rows >= _MANY_ROWS:
        return multiply(operand(a), operand(b))
    if num_rows > 1 or not rows:
        return multiply(a, b)
    # Of a product of one row XLA widens the matrix beforehand, which takes five times as long as another row.
    y = multiply(jnp.concatenate([a, a], own.index(rows[0])), b)
    return jax.lax.slice_in_dim(y, 0, 1, axis=out.index(rows[0]))


def _einsum_as_it_stands(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """jnp.einsum(spec, a, b) in float32, summed over axes in the order in which b has them. jnp's own takes them in the
    alphabet's, H before N, and XLA's CPU backend turns both factors around for it."""
    own, other, out = _letters(spec)
    batch = [axis for axis in other if axis in own and axis in out]
    summed = [axis for axis in other if axis in own and axis not in out]

    def places(axes: list[str]) -> tuple[list[int], list[int]]:
        return [own.index(axis) for axis in axes], [other.index(axis) for axis in axes]

    with jax.named_scope(spec):
        y = jax.lax.dot_general(a, b, (places(summed), places(batch)), preferred_element_type=jnp.float32)
        made = [*batch, *(axis for axis in own + other if axis not in (*batch, *summed))]
        return y.transpose([made.index(axis) for axis in out])


def row_product(x_D: jax.Array, w: jax.Array, place: tuple[jax.Array, ...] = ()) -> jax.Array:
    """f32[F], the product with the matrix w[place], [D, F], read where it stands, a few rows after the other.

    XLA's CPU backend makes a product only of a matrix in a buffer of its own, and to copy one, or to widen it, takes
    longer than to multiply one row by it.

    Args:
        x_D: float32 or bfloat16.
        w: [..., D, F], of x's dtype; bfloat16 may be given as its bits.
        place: i32, of the axes before D and F.
    """
    D, F = w.shape[-2:]
    together = math.gcd(D, _ROWS_TOGETHER[x_D.dtype.itemsize])
    wide_D, w = x_D.astype(jnp.float32), as_bits(w)

    def add(i, y_F):
        for d in range(together):
            row = entry(w, (*place, i * together + d))
            y_F += wide_D[i * together + d] * from_bits(row, x_D.dtype).astype(jnp.float32)
        return y_F

    # The number of turns is known, so that none asks whether it is the last.
    return jax.lax.fori_loop(0, D // together, add, jnp.zeros(F, jnp.float32))


def transposed(x_RD: jax.Array) -> jax.Array:
    """x_DR, in memory: in two steps, first each tile and then the tiles, so that no line is fetched for one value; and
    so that XLA does not make a product of a transposed operand of it again."""
    R, D = x_RD.shape
    r, d = math.gcd(R, _TILE), math.gcd(D, _TILE)
    tiles = x_RD.reshape(R // r, r, D // d, d).transpose(0, 2, 3, 1)
    return jax.lax.optimization_barrier(jax.lax.optimization_barrier(tiles).transpose(1, 2, 0, 3).reshape(D, R))
