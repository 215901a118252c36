"""Tokens to rows sorted by bucket, and back: gathers in both directions, forward and backward."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from parallel.rows import inverse_places, no_gradient, search_method, take_rows


class RowOrder(NamedTuple):
    """Where each of the A·K choices of A tokens stands when all are sorted by bucket. Dropped ones come last, and R may
    be too small for them.

    token_R: i32, the token of the row at r.
    row_AK: i32, the row of a token's k-th choice; the inverse of `token_R`.
    counts_E: i32, rows of each bucket. Their sum is below R where choices were dropped.
    """

    token_R: jax.Array
    row_AK: jax.Array
    counts_E: jax.Array


def sort_rows(buckets_AK: jax.Array, num_buckets: int, most: int | None = None) -> RowOrder:
    """Orders choices by bucket, and by token within a bucket.

    Args:
        buckets_AK: i32, the bucket of each choice; `num_buckets` for a choice that was dropped.
        num_buckets: E.
        most: rows that the buckets can have together, where that is known: R = min(A·K, most).
    """
    num_choices = buckets_AK.shape[1]
    buckets_R = buckets_AK.reshape(-1)
    choice_R = jnp.argsort(buckets_R, stable=True).astype(jnp.int32)
    row_AK = inverse_places(choice_R, buckets_R.size).reshape(buckets_AK.shape)
    ends_E = jnp.searchsorted(
        buckets_R[choice_R], jnp.arange(num_buckets), side="right", method=search_method(num_buckets)
    )
    return RowOrder(choice_R[:most] // num_choices, row_AK, jnp.diff(ends_E.astype(jnp.int32), prepend=0))


@jax.custom_vjp
def rows_of_tokens(x_AD: jax.Array, order: RowOrder) -> jax.Array:
    """Each token's vector once for each of its choices, sorted by bucket.

    Returns:
        rows_RD, of x's dtype. The gradient of a token is the sum over its K rows, gathered in float32.
    """
    return x_AD[order.token_R]


def _rows_forward(x_AD: jax.Array, order: RowOrder):
    return rows_of_tokens(x_AD, order), order


def _rows_backward(order: RowOrder, drows_RD: jax.Array):
    dx_AD = take_rows(drows_RD, order.row_AK).astype(jnp.float32).sum(1).astype(drows_RD.dtype)
    return dx_AD, jax.tree.map(no_gradient, order)


rows_of_tokens.defvjp(_rows_forward, _rows_backward)


def weights_of_rows(weights_AK: jax.Array, order: RowOrder) -> jax.Array:
    """weights_R, of the choice that stands at each row."""
    return weights_AK.reshape(-1)[inverse_places(order.row_AK.reshape(-1), order.token_R.size)]


@jax.custom_vjp
def sum_of_rows(rows_RD: jax.Array, order: RowOrder) -> jax.Array:
    """y[a] = Σ_k rows[row of choice (a, k)], summed in float32: `tokens_of_rows` with weights of 1, for which the
    backward pass needs no rows.

    Args:
        rows_RD: zero for dropped choices.

    Returns:
        y_AD, of the rows' dtype.
    """
    return take_rows(rows_RD, order.row_AK).astype(jnp.float32).sum(1).astype(rows_RD.dtype)


sum_of_rows.defvjp(
    lambda rows_RD, order: (sum_of_rows(rows_RD, order), order),
    lambda order, dy_AD: (dy_AD[order.token_R], jax.tree.map(no_gradient, order)),
)


@jax.custom_vjp
def tokens_of_rows(rows_RD: jax.Array, weights_AK: jax.Array, order: RowOrder) -> jax.Array:
    """y[a] = Σ_k weights[a, k] · rows[row of choice (a, k)], summed in float32.

    Args:
        rows_RD: the buckets' outputs, sorted by bucket; zero for dropped choices.
        weights_AK: f32.

    Returns:
        y_AD, of the rows' dtype.
    """
    return jnp.einsum("AKD,AK->AD", take_rows(rows_RD, order.row_AK).astype(jnp.float32), weights_AK).astype(
        rows_RD.dtype
    )


def _tokens_forward(rows_RD: jax.Array, weights_AK: jax.Array, order: RowOrder):
    return tokens_of_rows(rows_RD, weights_AK, order), (rows_RD, weights_AK, order)


def _tokens_backward(saved, dy_AD: jax.Array):
    rows_RD, weights_AK, order = saved
    drows_RD = dy_AD[order.token_R].astype(jnp.float32) * weights_of_rows(weights_AK, order)[:, None]
    dweights_AK = jnp.einsum("AKD,AD->AK", take_rows(rows_RD, order.row_AK), dy_AD, preferred_element_type=jnp.float32)
    return drows_RD.astype(rows_RD.dtype), dweights_AK.astype(weights_AK.dtype), jax.tree.map(no_gradient, order)


tokens_of_rows.defvjp(_tokens_forward, _tokens_backward)
