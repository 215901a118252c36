"""A route: how rows sorted by bucket travel to the devices that own the buckets, and the same way back.

A transport lays a route from the counts; then any array of rows travels by it. `send` and `bring_back` are transposes
of one another, since each row goes to one place and comes home from there. So each is the gradient of the other, for
every transport, and XLA's own gradients of its collectives are not needed. A wire in 8 bits rounds values and gradients
alike as they leave; the rounding itself counts as the identity.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp

from parallel.exchange.group import Group, Traffic
from parallel.exchange.wire import WireFormat, carry
from parallel.rows import bucket_of_place, inverse_places, no_gradient


class Route(Protocol):
    """What a transport lays. It is a pytree of i32 tables."""

    @property
    def counts_E(self) -> jax.Array:
        """i32, rows in each of this device's own buckets."""
        ...

    def forth(self, rows_RD: jax.Array) -> jax.Array:
        """Rows of this device's own buckets, S of them: by bucket, then by sending device, then by place there."""
        ...

    def back(self, rows_SD: jax.Array) -> jax.Array:
        """The transpose."""
        ...

    def rows_forth(self) -> Traffic:
        """Rows that this device sends to others in `forth`."""
        ...

    def rows_back(self) -> Traffic:
        """Rows that it sends in `back`."""
        ...

    def tables(self) -> Traffic:
        """Bytes that it sent to lay the route."""
        ...


LayRoute = Callable[[jax.Array, int, Group, int], Route]
"""(counts_E, num_rows, group, limit) → Route, for rows of which bucket e owns the next counts_E[e]; rows after the last
bucket stay behind. The E buckets are shared out evenly over the group, in order. No bucket counts more than `limit`."""


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def send(rows_RD: jax.Array, route: Route, wire: WireFormat | None = None) -> jax.Array:
    """Rows to their buckets' owners, in the wire's format while they travel; None for their own.

    Returns:
        rows_SD, zeros after the last row.
    """
    return carry(rows_RD, route.forth, wire)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def bring_back(rows_SD: jax.Array, route: Route, wire: WireFormat | None = None) -> jax.Array:
    """Rows that stand where `send` delivered, at the places from which those came; zeros for rows never sent.

    Returns:
        rows_RD.
    """
    return carry(rows_SD, route.back, wire)


def _send_gradient(wire: WireFormat | None, route: Route, drows_SD: jax.Array):
    return carry(drows_SD, route.back, wire, gradient=True), jax.tree.map(no_gradient, route)


def _bring_back_gradient(wire: WireFormat | None, route: Route, drows_RD: jax.Array):
    return carry(drows_RD, route.forth, wire, gradient=True), jax.tree.map(no_gradient, route)


send.defvjp(lambda rows_RD, route, wire: (carry(rows_RD, route.forth, wire), route), _send_gradient)
bring_back.defvjp(lambda rows_SD, route, wire: (carry(rows_SD, route.back, wire), route), _bring_back_gradient)


def block_rows(num_rows: int, num_buckets: int, group: Group, limit: int) -> int:
    """The most rows that one device can have for one other.

    P such blocks bound what a device can receive, so no routing overflows the S = P · block rows of its buffer.
    """
    return min(num_rows, num_buckets // group.size * limit)


def bucket_order(first_PE: jax.Array, counts_PE: jax.Array, num_places: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Brings rows of P senders, held in one flat array, into bucket order.

    Args:
        first_PE: i32, place in the flat array of the first row of sender p for own bucket e.
        counts_PE: i32, how many follow.
        num_places: of the flat array.
        size: S, places of the result; at least the number of rows.

    Returns:
        source_S: i32, the flat place of the row at s, `num_places` after the last row.
        target: i32[num_places], the inverse; S for places whose row is not for this device.
    """
    counts_EP = counts_PE.T.reshape(-1)
    ends_EP = jnp.cumsum(counts_EP)
    places_S = jnp.arange(size, dtype=jnp.int32)
    run_S = bucket_of_place(ends_EP, places_S)
    source_S = first_PE.T.reshape(-1)[run_S] + places_S - (ends_EP - counts_EP)[run_S]
    source_S = jnp.where(places_S < ends_EP[-1], source_S, num_places).astype(jnp.int32)
    return source_S, inverse_places(source_S, num_places)
