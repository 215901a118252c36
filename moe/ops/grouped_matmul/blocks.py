"""Blocks of a group's rows, on CPU: how high they are, how a loop goes over them, and what is multiplied in one.

Trip counts follow `sizes_E`, so the work is that of the rows that exist, whatever R and E are: a group's first block
has the least of a few heights that holds what the tallest ones leave.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe.ops.bits import as_bits, from_bits
from moe.ops.grouped_matmul.in_stack import InStack
from moe.ops.matmul import operand
from moe.ops.places import entry, slice_of, with_entry, with_slice

HEIGHTS = (32, 64, 96, 128, 192, 256)
"""Of blocks, in rows. A product of fewer rows spends its time on laying out the matrix."""

Block = Callable[[int, jax.Array, Any], Any]
"""Takes a block's height, the first of the group's rows in it and what was made so far, and makes more of that."""


def tallest_blocks(num_rows: int, size: jax.Array) -> tuple[int, jax.Array]:
    """The tallest block's height, and how many such a group has behind its first block, which has the rest."""
    tallest = min(HEIGHTS[-1], num_rows)
    return tallest, jax.lax.div(jnp.maximum(size - 1, 0), tallest)


def over_blocks(num_rows: int, start: jax.Array, size: jax.Array, block: Block, made: Any) -> Any:
    """What `block` makes of the rows [start, start + size), `made` to begin with."""
    heights = sorted({min(height, num_rows) for height in HEIGHTS})
    tallest, full = tallest_blocks(num_rows, size)
    rest = size - full * tallest
    # Loops of one turn or none, for a conditional would copy what was made so far.
    for least, height in zip((0, *heights), heights, strict=False):
        times = ((rest > least) & (rest <= height)).astype(jnp.int32) + (full if height == tallest else 0)
        made = jax.lax.fori_loop(0, times, lambda i, made, h=height, first=start: block(h, first + i * h, made), made)
        start += times * height
    return made


def over_blocks_with_gradients(
    num_rows: int,
    end: jax.Array,
    size: jax.Array,
    block: Callable[[int, jax.Array, jax.Array, Any], tuple[Any, list[jax.Array]]],
    made: tuple[Any, list[jax.Array]],
    place: tuple[Any, ...],
) -> tuple[Any, list[jax.Array]]:
    """As `over_blocks`, of the rows [end - size, end), each block of which adds to gradients of the group's matrices.

    Args:
        block: takes its height, its first row, the row after its last one and what was made so far. It gives more of
            that, and its shares dw_DF.
        made: what was made so far, and the stacks dw_LEDF, which are zero at `place`.

    Returns:
        what was made, and the stacks with the sums of shares at `place`.
    """
    tallest, full = tallest_blocks(num_rows, size)
    full_from = end - full * tallest

    def put_in(dw_LEDF: list[jax.Array], dw_DF: list[jax.Array]) -> list[jax.Array]:
        pairs = zip(dw_LEDF, dw_DF, strict=True)
        return [with_entry(all_, dw, place) for all_, dw in pairs]

    def write(height, row, made):
        before, dw_LEDF = made
        after, dw_DF = block(height, row, full_from, before)
        return after, put_in(dw_LEDF, dw_DF)

    def add(i, made):
        before, sum_DF = made
        after, dw_DF = block(tallest, full_from + i * tallest, end, before)
        return after, [one + other for one, other in zip(sum_DF, dw_DF, strict=True)]

    def add_full(_, made):
        before, dw_LEDF = made
        sum_DF = [entry(all_, place) for all_ in dw_LEDF]
        after, sum_DF = jax.lax.fori_loop(0, full, add, (before, sum_DF))
        return after, put_in(dw_LEDF, sum_DF)

    # Most groups have fewer rows than the tallest block: their gradient is written once, and added to nothing.
    made = over_blocks(num_rows, end - size, size - full * tallest, write, made)
    if num_rows == tallest:
        return made
    return jax.lax.fori_loop(0, (full > 0).astype(jnp.int32), add_full, made)


def take(x_RD: jax.Array, height: int, row: jax.Array, axis: int = 0) -> tuple[jax.Array, jax.Array]:
    """The rows from `row` on, or the last ones, and the first's number."""
    first = jnp.minimum(row, x_RD.shape[axis] - height)
    return from_bits(slice_of(as_bits(x_RD), first, height, axis), x_RD.dtype), first


def belong(first: jax.Array, height: int, row: jax.Array, end: jax.Array) -> jax.Array:
    """bool_b, which rows of the block that was taken from `first` on are those of [row, end)."""
    rows_b = first + jnp.arange(height, dtype=jnp.int32)
    return (rows_b >= row) & (rows_b < end)


def put(all_RF: jax.Array, first: jax.Array, block_bF: jax.Array, mine_b: jax.Array) -> jax.Array:
    """all_RF, of bits, with those rows of the block that are `mine_b`."""
    before_bF = slice_of(all_RF, first, len(mine_b))
    kept_bF = jnp.where(mine_b[:, None], as_bits(block_bF), before_bF)
    return with_slice(all_RF, kept_bF, first)


def multiply(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int, dtype: DTypeLike) -> jax.Array:
    dims = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(operand(a), operand(b), dims, preferred_element_type=summed_in(dtype)).astype(dtype)


def summed_in(dtype: DTypeLike) -> DTypeLike:
    """At least float32 for floats, for which see moe/ops/matmul.py."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def matrix(w_EDF: jax.Array | InStack, e: jax.Array, dtype: DTypeLike) -> jax.Array:
    """That of group e, i32[]."""
    if isinstance(w_EDF, InStack):
        return w_EDF.matrix(e, dtype)
    return from_bits(entry(as_bits(w_EDF), (e,)), w_EDF.dtype)
