"""The grouped products in 8 bits for NVIDIA GPUs: Pallas kernels through Triton, with scales applied in the inner loop.

The tiles are those of `moe.ops.grouped_matmul.triton`. Tensor cores take 8-bit operands only with what is summed over
in the last axis of both (PTX ISA, wgmma: a transposed operand is for 16 bits alone); laid out otherwise, Triton turns
each tile in registers, and a product took five times as long on an H200 (experiments/LOG.md).

Each block's sum is scaled and added in float32, on the ordinary cores (DeepSeek-V3, arXiv 2412.19437 §3.3.2); where no
scale lies along what is summed over, all of it is one block.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from moe.ops.grouped_matmul.triton import block_of_tile, height, place_of_program, tiles, width
from moe.ops.scaled.quantize import BLOCK
from moe.ops.scaled.triton_dot import dot

_PARAMETERS = plgpu.CompilerParams(num_warps=8, num_stages=3)


def rows_kernel(
    x_RD: jax.Array,
    scales_RS: jax.Array,
    w_EDF: jax.Array,
    scales_ESF: jax.Array,
    sizes_E: jax.Array,
    contract_w: int,
    dtype: DTypeLike,
    interpret: bool,
) -> jax.Array:
    """Each row times its expert's matrix, or with contract_w=1 the matrix's transpose. The padding is left unwritten.

    Args:
        scales_RS, scales_ESF: f32, of the S parts into which D is cut evenly (F stands for what is not summed over).

    Returns:
        `dtype` [R, F].
    """
    (num_rows, depth), parts, out = x_RD.shape, scales_RS.shape[1], scales_ESF.shape[2]
    deep, wide, high = width(depth // parts), width(out), height(num_rows, sizes_E.shape[0])
    steps = depth // parts // deep
    expert_X, start_X, end_X = tiles(sizes_E, num_rows, high)
    grid = expert_X.size, out // wide

    def kernel(expert_X, start_X, end_X, x_RD, scales_RS, w_EDF, scales_ESF, y_RF):
        tile, column = place_of_program(*grid)
        expert, start, end = expert_X[tile], start_X[tile], end_X[tile]
        first, mine = block_of_tile(start, end, high)
        rows, columns = pl.ds(first, high), pl.ds(column * wide, wide)

        def product(i):
            inner = pl.ds(i * deep, deep)
            x = plgpu.load(x_RD.at[rows, inner], mask=mine, other=jnp.zeros((), x_RD.dtype))
            w = plgpu.load(w_EDF.at[expert, columns, inner] if contract_w else w_EDF.at[expert, inner, columns])
            return dot(x, w, trans_b=bool(contract_w))

        def part(s):
            sum_RF = _sum(steps, lambda i: product(s * steps + i))
            scales_R1 = plgpu.load(scales_RS.at[rows, pl.ds(s, 1)], mask=mine, other=0)
            return sum_RF.astype(jnp.float32) * scales_R1 * scales_ESF[expert, pl.ds(s, 1), columns]

        @pl.when(start < end)
        def _():
            plgpu.store(y_RF.at[rows, columns], _sum(parts, part).astype(y_RF.dtype), mask=mine)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((num_rows, out), dtype),
        grid=(math.prod(grid),),
        compiler_params=_PARAMETERS,
        interpret=interpret,
        name="scaled_grouped_matmul_rows",
    )(expert_X, start_X, end_X, x_RD, scales_RS, w_EDF, scales_ESF)


def weights_kernel(
    x_DR: jax.Array,
    scales_SD: jax.Array,
    dy_FR: jax.Array,
    scales_SF: jax.Array,
    sizes_E: jax.Array,
    dtype: DTypeLike,
    interpret: bool,
) -> jax.Array:
    """The product of each expert's rows of x, transposed, and of dy. Both are given with the rows along the last axis.

    Args:
        scales_SD, scales_SF: f32, of each BLOCK rows, counted from the first of all; or one for all rows.

    Returns:
        `dtype` [E, D, F].
    """
    D, F, E = x_DR.shape[0], dy_FR.shape[0], sizes_E.shape[0]
    deep, wide = width(D), width(F)
    ends_E = jnp.cumsum(sizes_E.astype(jnp.int32))

    def kernel(starts_E, ends_E, x_DR, scales_SD, dy_FR, scales_SF, dw_EDF):
        column, row, expert = pl.program_id(0) * wide, pl.program_id(1) * deep, pl.program_id(2)
        start, end = starts_E[expert], ends_E[expert]
        inner, columns = pl.ds(row, deep), pl.ds(column, wide)

        def product(i):
            place = i * BLOCK + jnp.arange(BLOCK)
            mine = ((place >= start) & (place < end))[None, :]
            rows = pl.ds(i * BLOCK, BLOCK)
            x = plgpu.load(x_DR.at[inner, rows], mask=mine, other=jnp.zeros((), x_DR.dtype))
            dy = plgpu.load(dy_FR.at[columns, rows], mask=mine, other=jnp.zeros((), dy_FR.dtype))
            return dot(x, dy, trans_b=True)

        def scaled(sum_DF, s):
            scales_D1 = scales_SD[s, inner][:, None]
            return sum_DF.astype(jnp.float32) * scales_D1 * scales_SF[s, columns][None, :]

        blocks = start // BLOCK, pl.cdiv(end, BLOCK)
        if scales_SD.shape[0] == 1:
            zeros_DF = jnp.zeros((deep, wide), jnp.int32 if x_DR.dtype == jnp.int8 else jnp.float32)
            sum_DF = scaled(jax.lax.fori_loop(*blocks, lambda i, sum_DF: sum_DF + product(i), zeros_DF), 0)
        else:
            zeros_DF = jnp.zeros((deep, wide), jnp.float32)
            sum_DF = jax.lax.fori_loop(*blocks, lambda i, sum_DF: sum_DF + scaled(product(i), i), zeros_DF)
        dw_EDF[expert, inner, columns] = sum_DF.astype(dw_EDF.dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((E, D, F), dtype),
        grid=(F // wide, D // deep, E),
        compiler_params=_PARAMETERS,
        interpret=interpret,
        name="scaled_grouped_matmul_weights",
    )((ends_E - sizes_E).astype(jnp.int32), ends_E, x_DR, scales_SD, dy_FR, scales_SF)


def _sum(count: int, term: Callable[[jax.Array | int], jax.Array]) -> jax.Array:
    """term(0) + … + term(count - 1)."""
    if count == 1:
        return term(0)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(term, 0))
    return jax.lax.fori_loop(0, count, lambda i, total: total + term(i), zeros)
