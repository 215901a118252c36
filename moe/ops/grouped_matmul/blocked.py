"""The grouped product for CPU: a loop over groups, and in it one over blocks of the group's own rows.

Fewer rows than groups, as when a few texts are continued by a token each, take their matrices one by one instead: a
loop over groups would move all of them, and one product of all rows would have as many matrices in memory at once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe.ops.bits import as_bits, from_bits
from moe.ops.grouped_matmul.blocks import (
    belong,
    matrix,
    multiply,
    over_blocks,
    over_blocks_with_gradients,
    put,
    summed_in,
    take,
)
from moe.ops.grouped_matmul.in_stack import InStack, alone
from moe.ops.matmul import is_transposed_first, row_product, transposed, wide_einsum
from moe.ops.places import entry, slice_of, with_slice


def blocked_matmul(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """See `moe.ops.grouped_matmul.grouped_matmul`."""
    return blocked_matmul_in_stack(x_RD, alone(w_EDF), sizes_E)[0]


@jax.custom_vjp
def blocked_matmul_in_stack(x_RD: jax.Array, w_EDF: InStack, sizes_E: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """`blocked_matmul`, and the stack's landing for what comes after."""
    return rows_product(x_RD, w_EDF, sizes_E, 0, x_RD.dtype), w_EDF.landing_LEDF


def _forward(x_RD: jax.Array, w_EDF: InStack, sizes_E: jax.Array):
    return blocked_matmul_in_stack(x_RD, w_EDF, sizes_E), (x_RD, w_EDF._replace(landing_LEDF=None), sizes_E)


def _backward(saved, gradients):
    (x_RD, w_EDF, sizes_E), (dy_RF, dw_LEDF) = saved, gradients
    dx_RD = rows_product(dy_RF, w_EDF, sizes_E, 1, dy_RF.dtype)
    if dw_LEDF is not None:
        dw_LEDF = _with_weights_product(dw_LEDF, w_EDF.layer, x_RD, dy_RF, sizes_E)
    nothing: Any = None
    return dx_RD, InStack(nothing, nothing, dw_LEDF), None


blocked_matmul_in_stack.defvjp(_forward, _backward)


def rows_product(
    x_RD: jax.Array, w_EDF: jax.Array | InStack, sizes_E: jax.Array, contract_w: int, dtype: DTypeLike
) -> jax.Array:
    """Each row times its group's matrix, or with contract_w=1 the matrix's transpose, summed in `dtype` or float32."""
    if x_RD.shape[0] < w_EDF.shape[0]:
        return _few_rows_product(x_RD, w_EDF, sizes_E, contract_w, dtype)
    ends_E = jnp.cumsum(sizes_E.astype(jnp.int32))

    def group(e, y_RF):
        w_DF, end, size = matrix(w_EDF, e, x_RD.dtype), entry(ends_E, (e,)), entry(sizes_E, (e,))

        def block(height, row, y_RF):
            x_bD, first = take(x_RD, height, row)
            y_bF = multiply(x_bD, w_DF, 1, contract_w, dtype)
            return put(y_RF, first, y_bF, belong(first, height, row, end))

        return over_blocks(x_RD.shape[0], end - size, size, block, y_RF)

    y_RF = as_bits(jnp.zeros((x_RD.shape[0], w_EDF.shape[2 - contract_w]), dtype))
    return from_bits(jax.lax.fori_loop(0, w_EDF.shape[0], group, y_RF), dtype)


def _few_rows_product(
    x_RD: jax.Array, w_EDF: jax.Array | InStack, sizes_E: jax.Array, contract_w: int, dtype: DTypeLike
) -> jax.Array:
    ends_E = jnp.cumsum(sizes_E.astype(jnp.int32))
    stack = w_EDF if isinstance(w_EDF, InStack) else alone(w_EDF)
    stands: Any = stack.stack_LEDF
    # Of another format it is quantized, or rounded for the product.
    same = isinstance(stands, jax.Array) and as_bits(stands).dtype == as_bits(x_RD).dtype
    in_place = same and contract_w == 0 and x_RD.dtype in (jnp.float32, jnp.bfloat16)

    def row(r, y_RF):
        x_1D, e = from_bits(slice_of(as_bits(x_RD), r, 1), x_RD.dtype), (ends_E <= r).sum()
        if in_place:
            y_1F = row_product(x_1D[0], stands, (stack.layer, e))[None]
        else:
            spec = "RF,DF->RD" if contract_w else "RD,DF->RF"
            y_1F = wide_einsum(spec, x_1D, stack.matrix(e, x_RD.dtype))
        return with_slice(y_RF, as_bits(y_1F.astype(dtype)), r)

    y_RF = as_bits(jnp.zeros((x_RD.shape[0], w_EDF.shape[2 - contract_w]), dtype))
    return from_bits(jax.lax.fori_loop(0, ends_E[-1], row, y_RF), dtype)


def weights_product(x_RD: jax.Array, dy_RF: jax.Array, sizes_E: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`dtype` [E, D, F]: the product of each group's rows of x, transposed, and of dy; summed in `dtype` or float32."""
    zeros_LEDF = jnp.zeros((1, len(sizes_E), x_RD.shape[1], dy_RF.shape[1]), summed_in(dtype))
    return _with_weights_product(zeros_LEDF, jnp.int32(0), x_RD, dy_RF, sizes_E)[0].astype(dtype)


def _with_weights_product(
    dw_LEDF: jax.Array, layer: jax.Array, x_RD: jax.Array, dy_RF: jax.Array, sizes_E: jax.Array
) -> jax.Array:
    """dw_LEDF, zero in one layer, with that layer's set to `weights_product` in its format."""
    num_rows, ends_E = x_RD.shape[0], jnp.cumsum(sizes_E.astype(jnp.int32))
    x, rows_axis = (transposed(x_RD), 1) if is_transposed_first(x_RD.dtype) else (x_RD, 0)

    def block(height: int, row: jax.Array, end: jax.Array, nothing: None) -> tuple[None, list[jax.Array]]:
        x_block, first = take(x, height, row, rows_axis)
        dy_bF, _ = take(dy_RF, height, row)
        mine_b = belong(first, height, row, end)
        x_block = jnp.where(jnp.expand_dims(mine_b, 1 - rows_axis), x_block, 0)
        return nothing, [multiply(x_block, jnp.where(mine_b[:, None], dy_bF, 0), rows_axis, 0, dw_LEDF.dtype)]

    def group(e, made):
        return over_blocks_with_gradients(num_rows, entry(ends_E, (e,)), entry(sizes_E, (e,)), block, made, (layer, e))

    return jax.lax.fori_loop(0, sizes_E.shape[0], group, (None, [dw_LEDF]))[1][0]
