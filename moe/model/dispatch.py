"""Dispatch and combine: tokens become rows sorted by expert, and the experts' rows become tokens again."""

from typing import NamedTuple

import jax

from moe.ops.sort_rows import RowOrder, rows_of_tokens, sort_rows, tokens_of_rows


class Dispatched(NamedTuple):
    """Rows ready for the exchange.

    rows_RD: R = A·K rows sorted by expert; rows of dropped choices come last and belong to none.
    order: the way back.
    """

    rows_RD: jax.Array
    order: RowOrder


def dispatch(x_AD: jax.Array, experts_AK: jax.Array, num_experts: int) -> Dispatched:
    """Copies each token's vector into a row for each of its choices, and sorts the rows by expert.

    Args:
        experts_AK: i32, E for a dropped choice.
    """
    order = sort_rows(experts_AK, num_experts)
    return Dispatched(rows_of_tokens(x_AD, order), order)


def combine(rows_RD: jax.Array, weights_AK: jax.Array, dispatched: Dispatched) -> jax.Array:
    """Sums each token's rows with the router's weights. Rows of dropped choices must be zero.

    Returns:
        y_AD, of the rows' dtype, summed in float32.
    """
    return tokens_of_rows(rows_RD, weights_AK, dispatched.order)
