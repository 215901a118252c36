"""The exchange in one step: a row for each choice of a token, sent straight to the bucket's owner."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from parallel.exchange import route as routes
from parallel.exchange.group import Group, Traffic
from parallel.exchange.route import LayRoute
from parallel.exchange.wire import WireFormat, bytes_of_row
from parallel.sort_rows import rows_of_tokens, sort_rows, sum_of_rows, tokens_of_rows, weights_of_rows


class Arrived(NamedTuple):
    """Rows of the buckets that this device owns.

    rows_SD: sorted by bucket; rows after the last bucket's are padding.
    counts_E: i32, rows in each of this device's own buckets.
    gates_S: f32, by which each row's result is to be multiplied before `bring_back`, which then takes plain sums; None
        where that multiplies.
    ticket: by which the exchange's `bring_back` finds the way home.
    forward: bytes that this device sends to others in `send` and `bring_back`.
    backward: the same for the gradients of both.
    """

    rows_SD: jax.Array
    counts_E: jax.Array
    gates_S: jax.Array | None
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
    weighs_before: whether results are multiplied by their weights before `bring_back`.
    """

    lay_route: LayRoute
    group: Group
    num_buckets: int
    limit: int
    wire: WireFormat | None
    weighs_before: bool

    def send(self, x_AD: jax.Array, buckets_AK: jax.Array, weights_AK: jax.Array) -> Arrived:
        """See parallel/exchange."""
        with jax.named_scope("dispatch"):
            order = sort_rows(buckets_AK, self.num_buckets, self.num_buckets * self.limit)
            rows_RD = rows_of_tokens(x_AD, order)
        with jax.named_scope("exchange"):
            route = self.lay_route(order.counts_E, rows_RD.shape[0], self.group, self.limit)
            rows_SD = routes.send(rows_RD, route, self.wire)
            gates_S = None
            if self.weighs_before:
                gates_S = routes.send(weights_of_rows(weights_AK, order)[:, None], route)[:, 0]
        there, back = route.rows_forth(), route.rows_back()
        bytes_of_rows = (there + back) * bytes_of_row(x_AD.shape[1], self.wire)
        of_gate = weights_AK.dtype.itemsize if self.weighs_before else 0
        return Arrived(
            rows_SD,
            route.counts_E,
            gates_S,
            ticket=(order, route, weights_AK),
            forward=bytes_of_rows + there * of_gate + route.tables(),
            backward=bytes_of_rows + back * of_gate,
        )

    def bring_back(self, y_SD: jax.Array, arrived: Arrived) -> jax.Array:
        """See parallel/exchange."""
        order, route, weights_AK = arrived.ticket
        with jax.named_scope("exchange"):
            y_RD = routes.bring_back(y_SD, route, self.wire)
        with jax.named_scope("combine"):
            return sum_of_rows(y_RD, order) if self.weighs_before else tokens_of_rows(y_RD, weights_AK, order)
