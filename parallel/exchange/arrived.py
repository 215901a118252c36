"""What a device holds after rows were sent to it, and how rows of several senders are brought into bucket order."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from parallel.rows import inverse_places


class Arrived(NamedTuple):
    """Rows of the buckets that this device owns.

    rows_SD: sorted by bucket, then by sending device; zeros after the last one.
    counts_E: i32, rows in each of this device's own buckets.
    ticket: index arrays by which the backend's `bring_back` finds the way home.
    """

    rows_SD: jax.Array
    counts_E: jax.Array
    ticket: tuple[jax.Array, ...]


def exclusive_sum(x: jax.Array, axis: int = -1) -> jax.Array:
    """The sum of all earlier entries along `axis`."""
    return jnp.cumsum(x, axis) - x


def bucket_order(first_PE: jax.Array, counts_PE: jax.Array, stride: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Brings rows of P senders, held in one flat array of P·stride places, into bucket order.

    Args:
        first_PE: i32, place (within its sender's part) of the first row of sender p for own bucket e.
        counts_PE: i32, how many follow.
        stride: places of one sender's part.
        size: S, places of the result; at least the number of rows.

    Returns:
        source_S: i32, the flat place of the row at s, P·stride after the last row.
        target: i32[P·stride], the inverse; S for places whose row is not for this device.
    """
    num_senders = counts_PE.shape[0]
    counts_EP = counts_PE.T.reshape(-1)
    ends_EP = jnp.cumsum(counts_EP)
    places_S = jnp.arange(size, dtype=jnp.int32)
    run_S = jnp.minimum(jnp.searchsorted(ends_EP, places_S, side="right"), counts_EP.size - 1)
    flat_first_EP = (first_PE + stride * jnp.arange(num_senders, dtype=jnp.int32)[:, None]).T.reshape(-1)
    source_S = flat_first_EP[run_S] + places_S - (ends_EP - counts_EP)[run_S]
    source_S = jnp.where(places_S < ends_EP[-1], source_S, num_senders * stride).astype(jnp.int32)
    return source_S, inverse_places(source_S, num_senders * stride)
