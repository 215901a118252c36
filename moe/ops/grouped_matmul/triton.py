"""The grouped product for NVIDIA GPUs: Pallas kernels through Triton, with a table from tiles to experts.

Rows are cut into blocks. A block that holds rows of several experts becomes several tiles, each of which computes and
stores its own expert's rows only, so nothing is padded or copied; there are at most R/block + E tiles.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from parallel.platform import platform, shared_memory
from parallel.rows import bucket_of_place

_WIDTHS = (128, 64, 32, 16)
_WIDEST = 256
LOWEST, HIGHEST = 16, 128
"""Rows of a tile."""
_NARROWEST = 32
_STAGES = 3
_PARAMETERS = plgpu.CompilerParams(num_warps=8, num_stages=_STAGES)
_PROGRAMS = 128
"""Tiles with rows in them below which they are narrow, so that most of a GPU's multiprocessors have one."""
_TOGETHER = 8
"""Blocks of rows that are computed side by side, so that they find an expert's columns in the second-level cache."""


def triton_matmul(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """See `moe.ops.grouped_matmul.grouped_matmul`.

    Raises:
        ValueError: the platform is not a GPU, or D or F is no multiple of 16.
    """
    if platform() != "gpu":
        raise ValueError(
            f'grouped_matmul backend "triton" needs an NVIDIA GPU, this is {platform()}: use "blocked" or "auto"'
        )
    return triton_kernels(x_RD, w_EDF, sizes_E, False)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def triton_kernels(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, interpret: bool) -> jax.Array:
    """The product, unguarded: compiled for a GPU where there is none, and with `interpret` tested on CPU."""
    return _rows_product(x_RD, w_EDF, sizes_E, interpret, transpose_w=False)


def _forward(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, interpret: bool):
    return triton_kernels(x_RD, w_EDF, sizes_E, interpret), (x_RD, w_EDF, sizes_E)


def _backward(interpret: bool, saved, dy_RF: jax.Array):
    x_RD, w_EDF, sizes_E = saved
    dx_RD = _rows_product(dy_RF, w_EDF, sizes_E, interpret, transpose_w=True)
    return dx_RD, _weights_product(x_RD, dy_RF, sizes_E, interpret), None


triton_kernels.defvjp(_forward, _backward)


def width(size: int) -> int:
    """The widest block that divides an axis.

    Raises:
        ValueError: none does.
    """
    for width in _WIDTHS:
        if size % width == 0:
            return width
    raise ValueError(f'grouped_matmul backend "triton": a width of {size} is no multiple of 16, use "ragged"')


def height(num_rows: int, num_experts: int) -> int:
    """Rows of a tile: a power of two from `LOWEST` to `HIGHEST`, enough for an expert's rows in the mean. In decoding
    these are few, and a higher tile would multiply zeros."""
    mean = -(-num_rows // num_experts)
    return min(HIGHEST, max(LOWEST, 1 << (mean - 1).bit_length()))


def columns_of_tile(size: int, bytes_of_row: int, available: int) -> int:
    """Columns of an output's tile: 256 where these divide the axis, and where what is loaded at a time for the highest
    tile fits into the shared memory; else at most 128.

    Args:
        bytes_of_row: loaded at a time for each row and each column. available: `parallel.platform.shared_memory`.
    """
    fits = _STAGES * (HIGHEST + _WIDEST) * bytes_of_row <= available
    return _WIDEST if fits and size % _WIDEST == 0 else width(size)


def narrow(wide: int, deep: int, size: int, depth: int, in_use: int) -> tuple[int, int]:
    """Columns of a tile, and numbers along the sum that are loaded at a time, where experts have few rows, as in
    decoding. The product then takes as long as its matrices take to be read: by as many multiprocessors as can be, each
    of which asks for as many bytes at a time as with a wide tile.

    Args:
        wide, deep: of many rows. size, depth: of the axes. in_use: tiles with rows, at most, for each block of columns.
    """
    while wide > _NARROWEST and in_use * size // wide < _PROGRAMS:
        wide //= 2
    deeper = deep * max(1, 128 // max(wide, _NARROWEST))
    return wide, deeper if depth % deeper == 0 else deep


def depth_of_load(size: int, itemsize: int) -> int:
    """Numbers along the axis that is summed over, loaded at a time: at most 128 bytes."""
    return min(width(size), 128 // itemsize)


def tiles(sizes_E: jax.Array, num_rows: int, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """i32 by tile: its expert, its first row, and the row after its last one (at most the first: an idle tile).

    Args:
        rows: of each block, and so at most of each tile.
    """
    num_tiles = pl.cdiv(num_rows, rows) + sizes_E.shape[0] - 1
    ends_E = jnp.cumsum(sizes_E.astype(jnp.int32))
    starts_E = ends_E - sizes_E
    first_block_E = starts_E // rows
    blocks_E = jnp.where(sizes_E > 0, (ends_E - 1) // rows - first_block_E + 1, 0)
    tiles_until_E = jnp.cumsum(blocks_E)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    expert = bucket_of_place(tiles_until_E, tile)
    block = first_block_E[expert] + tile - (tiles_until_E - blocks_E)[expert]
    start = jnp.maximum(starts_E[expert], block * rows)
    end = jnp.where(tile < tiles_until_E[-1], jnp.minimum(ends_E[expert], (block + 1) * rows), start)
    return expert, start.astype(jnp.int32), end.astype(jnp.int32)


def place_of_program(num_tiles: int, num_columns: int) -> tuple[jax.Array, jax.Array]:
    """Inside a kernel with a grid of num_tiles * num_columns: the program's tile of rows, and its block of columns.
    `_TOGETHER` tiles walk along the columns side by side."""
    program, each = pl.program_id(0), _TOGETHER * num_columns
    first = program // each * _TOGETHER
    beside = jnp.minimum(num_tiles - first, _TOGETHER)
    return first + program % each % beside, program % each // beside


def block_of_tile(start: jax.Array, end: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Inside a kernel: the first row of the block of `rows` in which a tile lies, and bool [rows, 1], which of its rows
    are the tile's."""
    first = start // rows * rows
    place = first + jnp.arange(rows)
    return first, ((place >= start) & (place < end))[:, None]


def _rows_product(
    x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, interpret: bool, *, transpose_w: bool
) -> jax.Array:
    """Each row times its expert's matrix, or the matrix's transpose. The padding is one group more, of zeros: to write
    them afterwards would take another pass over the result."""
    (num_rows, depth), out, itemsize = x_RD.shape, w_EDF.shape[1 if transpose_w else 2], x_RD.dtype.itemsize
    num_experts = sizes_E.shape[0]
    deep, high = depth_of_load(depth, itemsize), height(num_rows, num_experts)
    wide = columns_of_tile(out, deep * itemsize, shared_memory())
    if high == LOWEST:
        wide, deep = narrow(wide, deep, out, depth, min(num_rows, num_experts))
    padded = jnp.append(sizes_E, num_rows - sizes_E.sum())
    expert_X, start_X, end_X = tiles(padded, num_rows, high)
    grid = expert_X.size, out // wide

    def kernel(expert_X, start_X, end_X, x_RD, w_EDF, y_RF):
        tile, column = place_of_program(*grid)
        expert, start, end = expert_X[tile], start_X[tile], end_X[tile]
        first, mine = block_of_tile(start, end, high)
        rows, columns = pl.ds(first, high), pl.ds(column * wide, wide)

        def add(i, sum_RF):
            inner = pl.ds(i * deep, deep)
            x = plgpu.load(x_RD.at[rows, inner], mask=mine, other=0)
            w = plgpu.load(w_EDF.at[expert, columns, inner] if transpose_w else w_EDF.at[expert, inner, columns])
            return sum_RF + plgpu.dot(x, w, trans_b=transpose_w, allow_tf32=False)

        zeros_RF = jnp.zeros((high, wide), jnp.float32)

        @pl.when((start < end) & (expert < num_experts))
        def _():
            sum_RF = jax.lax.fori_loop(0, depth // deep, add, zeros_RF)
            plgpu.store(y_RF.at[rows, columns], sum_RF.astype(y_RF.dtype), mask=mine)

        @pl.when((start < end) & (expert == num_experts))
        def _():
            plgpu.store(y_RF.at[rows, columns], zeros_RF.astype(y_RF.dtype), mask=mine)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((num_rows, out), x_RD.dtype),
        grid=(math.prod(grid),),
        compiler_params=_PARAMETERS,
        interpret=interpret,
        name="grouped_matmul_rows",
    )(expert_X, start_X, end_X, x_RD, w_EDF)


def _weights_product(x_RD: jax.Array, dy_RF: jax.Array, sizes_E: jax.Array, interpret: bool) -> jax.Array:
    """[E, D, F] in x's format: the product of each expert's rows of x, transposed, and of dy."""
    D, F, E, itemsize = x_RD.shape[1], dy_RF.shape[1], sizes_E.shape[0], x_RD.dtype.itemsize
    high = 128 // itemsize
    deep, wide = width(D), columns_of_tile(F, high * itemsize, shared_memory())
    ends_E = jnp.cumsum(sizes_E.astype(jnp.int32))

    def kernel(starts_E, ends_E, x_RD, dy_RF, dw_EDF):
        column, row, expert = pl.program_id(0) * wide, pl.program_id(1) * deep, pl.program_id(2)
        start, end = starts_E[expert], ends_E[expert]

        def add(i, sum_DF):
            first = start + i * high
            mine = (first + jnp.arange(high) < end)[:, None]
            rows = pl.ds(first, high)
            x = plgpu.load(x_RD.at[rows, pl.ds(row, deep)], mask=mine, other=0)
            dy = plgpu.load(dy_RF.at[rows, pl.ds(column, wide)], mask=mine, other=0)
            return sum_DF + plgpu.dot(x, dy, trans_a=True, allow_tf32=False)

        sum_DF = jax.lax.fori_loop(0, pl.cdiv(end - start, high), add, jnp.zeros((deep, wide), jnp.float32))
        dw_EDF[expert, pl.ds(row, deep), pl.ds(column, wide)] = sum_DF.astype(dw_EDF.dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((E, D, F), x_RD.dtype),
        grid=(F // wide, D // deep, E),
        compiler_params=_PARAMETERS,
        interpret=interpret,
        name="grouped_matmul_weights",
    )((ends_E - sizes_E).astype(jnp.int32), ends_E, x_RD, dy_RF)
