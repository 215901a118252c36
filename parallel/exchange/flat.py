"""The exchange in one step: a row for each choice of a token, sent straight to the bucket's owner."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.typing import DTypeLike

from parallel.exchange import route as routes
from parallel.exchange.group import Group, Traffic
from parallel.exchange.route import LayRoute
from parallel.sort_rows import rows_of_tokens, sort_rows, tokens_of_rows


class Arrived(NamedTuple):
    """Rows of the buckets that this device owns.

    rows_SD: sorted by bucket; rows after the last bucket's are padding.
    counts_E: i32, rows in each of this device's own buckets.
    ticket: by which the exchange's `bring_back` finds the way home.
    forward: bytes that this device sends to others in `send` and `bring_back`.
    backward: the same for the gradients of both.
    """

    rows_SD: jax.Array
    counts_E: jax.Array
    ticket: Any
    forward: Traffic
    backward: Traffic


@dataclass(frozen=True)
class Flat:
    """
    lay_route: the transport.
    group: the devices over which the buckets are shared out.
    num_buckets: E.
    limit: no bucket counts more rows than this on any one device.
    wire: number format of the rows while they travel.
    """

    lay_route: LayRoute
    group: Group
    num_buckets: int
    limit: int
    wire: DTypeLike

    def send(self, x_AD: jax.Array, buckets_AK: jax.Array, weights_AK: jax.Array) -> Arrived:
        """See parallel/exchange."""
        with jax.named_scope("dispatch"):
            order = sort_rows(buckets_AK, self.num_buckets, self.num_buckets * self.limit)
            rows_RD = for_wire(rows_of_tokens(x_AD, order), self.wire, self.group)
        with jax.named_scope("exchange"):
            route = self.lay_route(order.counts_E, rows_RD.shape[0], self.group, self.limit)
            rows_SD = routes.send(rows_RD, route).astype(x_AD.dtype)
        bytes_of_rows = (route.rows_forth() + route.rows_back()) * bytes_of_row(rows_RD)
        ticket = (order, route, weights_AK)
        return Arrived(rows_SD, route.counts_E, ticket, bytes_of_rows + route.tables(), bytes_of_rows)

    def bring_back(self, y_SD: jax.Array, arrived: Arrived) -> jax.Array:
        """See parallel/exchange."""
        order, route, weights_AK = arrived.ticket
        with jax.named_scope("exchange"):
            y_RD = routes.bring_back(for_wire(y_SD, self.wire, self.group), route).astype(y_SD.dtype)
        with jax.named_scope("combine"):
            return tokens_of_rows(y_RD, weights_AK, order)


def bytes_of_row(rows_RD: jax.Array) -> int:
    return rows_RD.shape[1] * rows_RD.dtype.itemsize


def for_wire(rows_RD: jax.Array, wire: DTypeLike, group: Group) -> jax.Array:
    """Rows in the format in which they travel. Rows that stay keep theirs."""
    return rows_RD.astype(wire) if group.size > 1 else rows_RD
