"""The exchange in steps: a token goes once to each member of a group that wants it, and on from there.

The hierarchical exchanges take two: along the rail to each node, then inside the node to each device. So a token
crosses a node's border once, however many of its buckets are there. Its choices and their weights travel with it: the
copies are made where the buckets are, results are weighed and summed there, and one row for each token and member comes
back. A rail joins the devices that hold the same place in each node; each has its own NIC.
"""

from dataclasses import dataclass
from typing import Union

import jax
import jax.numpy as jnp

from parallel.exchange import route as routes
from parallel.exchange.flat import Arrived, Flat
from parallel.exchange.group import Group
from parallel.exchange.route import LayRoute
from parallel.exchange.wire import WireFormat, bytes_of_row
from parallel.sort_rows import rows_of_tokens, sort_rows, sum_of_rows

LARGEST_EXACT = 2**24
"""Up to here float32 holds every whole number."""


@dataclass(frozen=True)
class Stepwise:
    """
    lay_route, group: this step's transport, and its devices.
    within: the next step, in which each member's own buckets are shared out further.
    num_buckets, limit, wire: as in Flat.
    """

    lay_route: LayRoute
    group: Group
    within: Union["Stepwise", Flat]
    num_buckets: int
    limit: int
    wire: WireFormat | None

    def __post_init__(self) -> None:
        assert self.num_buckets < LARGEST_EXACT, "bucket numbers travel as float32"

    def send(self, x_AD: jax.Array, buckets_AK: jax.Array, weights_AK: jax.Array) -> Arrived:
        """See parallel/exchange."""
        num_members, own = self.group.size, self.within.num_buckets
        with jax.named_scope("dispatch"):
            order = sort_rows(distinct(buckets_AK // own, num_members), num_members)
            rows_RD = rows_of_tokens(x_AD, order)
            # From 1, since places to which no row was sent hold zeros.
            notes_A2K = jnp.concatenate([weights_AK, buckets_AK.astype(weights_AK.dtype) + 1], axis=1)
            notes_R2K = rows_of_tokens(notes_A2K, order)
        with jax.named_scope("exchange"):
            limit = min(x_AD.shape[0], own * self.limit)
            route = self.lay_route(order.counts_E, rows_RD.shape[0], self.group, limit)
            x_GD = routes.send(rows_RD, route, self.wire)
            weights_GK, numbers_GK = jnp.split(routes.send(notes_R2K, route), 2, axis=1)
        buckets_GK = numbers_GK.astype(jnp.int32) - 1
        here_GK = buckets_GK // own == self.group.position()
        arrived = self.within.send(x_GD, jnp.where(here_GK, buckets_GK % own, own), weights_GK)

        there, back, notes = route.rows_forth(), route.rows_back(), notes_R2K.shape[1] * notes_R2K.dtype.itemsize
        bytes_of_rows = (there + back) * bytes_of_row(x_AD.shape[1], self.wire)
        return arrived._replace(
            ticket=(arrived, order, route),
            forward=arrived.forward + bytes_of_rows + there * notes + route.tables(),
            backward=arrived.backward + bytes_of_rows + back * notes,
        )

    def bring_back(self, y_SD: jax.Array, arrived: Arrived) -> jax.Array:
        """See parallel/exchange. A member's sum is rounded to the wire's format, the sum over members is in float32."""
        arrived, order, route = arrived.ticket
        y_GD = self.within.bring_back(y_SD, arrived)
        with jax.named_scope("exchange"):
            y_RD = routes.bring_back(y_GD, route, self.wire)
        with jax.named_scope("combine"):
            return sum_of_rows(y_RD, order)


def distinct(members_AK: jax.Array, num_members: int) -> jax.Array:
    """Each token's members of the group, each named once; `num_members` stands for none.

    Returns:
        i32, [A, min(K, num_members)].
    """
    sorted_AK = jnp.sort(members_AK, axis=1)
    again_AK = jnp.diff(sorted_AK, axis=1, prepend=-1) == 0
    return jnp.sort(jnp.where(again_AK, num_members, sorted_AK), axis=1)[:, :num_members]
