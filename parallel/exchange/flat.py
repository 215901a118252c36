"""The exchange in one step: a row for each choice of a token, sent straight to the bucket's owner."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from parallel.exchange import route as routes
from parallel.exchange.group import Group, Traffic
from parallel.exchange.route import LayRoute
from parallel.exchange.wire import WireFormat, bytes_of_row
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
    wire: format of the rows while they travel; None where they stay.
    """

    lay_route: LayRoute
    group: Group
    num_buckets: int
    limit: int
    wire: WireFormat | None

    def send(self, x_AD: jax.Array, buckets_AK: jax.Array, weights_AK: jax.Array) -> Arrived:
        """See parallel/exchange."""
        with jax.named_scope("dispatch"):
            order = sort_rows(buckets_AK, self.num_buckets, self.num_buckets * self.limit)
            rows_RD = rows_of_tokens(x_AD, order)
        with jax.named_scope("exchange"):
            route = self.lay_route(order.counts_E, rows_RD.shape[0], self.group, self.limit)
            rows_SD = routes.send(rows_RD, route, self.wire)
        bytes_of_rows = (route.rows_forth() + route.rows_back()) * bytes_of_row(x_AD.shape[1], self.wire)
        ticket = (order, route, weights_AK)
        return Arrived(rows_SD, route.counts_E, ticket, bytes_of_rows + route.tables(), bytes_of_rows)

    def bring_back(self, y_SD: jax.Array, arrived: Arrived) -> jax.Array:
        """See parallel/exchange."""
        order, route, weights_AK = arrived.ticket
        with jax.named_scope("exchange"):
            y_RD = routes.bring_back(y_SD, route, self.wire)
        with jax.named_scope("combine"):
            return tokens_of_rows(y_RD, weights_AK, order)
