"""Rows by ragged all-to-all: only rows that exist cross the wire, whatever the routing.

On GPUs the rows travel by XLA's own operation. XLA:CPU has none, so there it is emulated (`emulated`), with the same
result: the choice is made by the platform for which the program is lowered. Bytes are those of XLA's operation, on
every platform.

The receive buffer is as large as that of the padded all-to-all, S = P · block: its size must be known at compilation,
and any smaller one would overflow for some routing. It costs memory, but no bytes on the wire.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from parallel.exchange.group import Group, Traffic
from parallel.exchange.route import block_rows, bucket_order
from parallel.rows import exclusive_sum, take_rows


class Chunks(NamedTuple):
    """What one device sends to and receives from each of the P members of its group, in rows. All i32.

    sent_from_P, sent_P: where the chunk for member p begins here, and how long it is.
    sent_to_P: where it begins at member p.
    received_P: how long the chunk from member p is.
    """

    sent_from_P: jax.Array
    sent_P: jax.Array
    sent_to_P: jax.Array
    received_P: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RaggedRoute:
    """
    counts_E: i32, rows in each of this device's own buckets.
    out, home: the chunks of the journey there and of the one back.
    source_S, target_S: i32, the place among the received rows of each row in bucket order, and the inverse.
    num_rows: R.
    """

    counts_E: jax.Array
    out: Chunks
    home: Chunks
    source_S: jax.Array
    target_S: jax.Array
    num_rows: int = field(metadata={"static": True})
    group: Group = field(metadata={"static": True})

    def forth(self, rows_RD: jax.Array) -> jax.Array:
        received_SD = ragged_all_to_all(rows_RD, self.source_S.size, self.out, self.group)
        return take_rows(received_SD, self.source_S)

    def back(self, rows_SD: jax.Array) -> jax.Array:
        return ragged_all_to_all(take_rows(rows_SD, self.target_S), self.num_rows, self.home, self.group)

    def rows_forth(self) -> Traffic:
        return self.group.traffic(self.out.sent_P)

    def rows_back(self) -> Traffic:
        return self.group.traffic(self.home.sent_P)

    def tables(self) -> Traffic:
        return self.group.evenly(self.counts_E.size * self.group.size * self.counts_E.dtype.itemsize)


def lay_route(counts_E: jax.Array, num_rows: int, group: Group, limit: int) -> RaggedRoute:
    """See `route.LayRoute`."""
    me, own = group.position(), counts_E.size // group.size
    counts_PE = group.told(counts_E)
    # From member p to member q. Each sender's rows stand by receiver, each receiver's by sender, without gaps.
    sizes_PQ = counts_PE.reshape(group.size, group.size, own).sum(2)
    begins_at_sender_PQ, begins_at_receiver_PQ = exclusive_sum(sizes_PQ, 1), exclusive_sum(sizes_PQ, 0)
    sent_P, received_P = sizes_PQ[me], sizes_PQ[:, me]
    out = Chunks(begins_at_sender_PQ[me], sent_P, begins_at_receiver_PQ[me], received_P)
    home = Chunks(begins_at_receiver_PQ[:, me], received_P, begins_at_sender_PQ[:, me], sent_P)

    counts_PE = jax.lax.dynamic_slice_in_dim(counts_PE, me * own, own, axis=1)
    first_PE = exclusive_sum(counts_PE.reshape(-1)).reshape(counts_PE.shape)
    size = group.size * block_rows(num_rows, counts_E.size, group, limit)
    source_S, target_S = bucket_order(first_PE, counts_PE, size, size)
    return RaggedRoute(counts_PE.sum(0), out, home, source_S, target_S, num_rows, group)


def ragged_all_to_all(rows_RD: jax.Array, size: int, chunks: Chunks, group: Group) -> jax.Array:
    """Each device's chunks at their places in the receivers' arrays of `size` rows, and zeros elsewhere."""
    received_SD = jnp.zeros((size, rows_RD.shape[1]), rows_RD.dtype)

    def by_xla(rows_RD, received_SD, chunks: Chunks):
        return jax.lax.ragged_all_to_all(
            rows_RD, received_SD, *chunks, axis_name=group.axis, axis_index_groups=group.index_groups
        )

    def by_gathering(rows_RD, received_SD, chunks: Chunks):
        return emulated(rows_RD, received_SD, chunks, group)

    return jax.lax.platform_dependent(rows_RD, received_SD, chunks, cpu=by_gathering, default=by_xla)


def emulated(rows_RD: jax.Array, received_SD: jax.Array, chunks: Chunks, group: Group) -> jax.Array:
    """What `jax.lax.ragged_all_to_all` gives, by gathering all rows and keeping those that are sent here."""
    rows_PRD, chunks_P = (
        jax.tree.map(lambda x: jax.lax.all_gather(x, group.axis, axis_index_groups=group.index_groups), given)
        for given in (rows_RD, chunks)
    )
    from_P1, sent_P1, to_P1, _ = (x[:, group.position(), None] for x in chunks_P)
    place_PR = jnp.arange(rows_RD.shape[0], dtype=jnp.int32) - from_P1
    target_PR = jnp.where((place_PR >= 0) & (place_PR < sent_P1), to_P1 + place_PR, received_SD.shape[0])
    return received_SD.at[target_PR].set(rows_PRD, mode="drop")
