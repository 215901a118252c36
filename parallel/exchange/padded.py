"""Rows by one all-to-all of equal blocks, each as large as the fullest could be: exact for any routing.

A block holds min(R, limit · E/P) rows. With capacity-limited routing `limit` is the capacity, and nothing is wasted
beyond it; with dropless routing a block must hold all R rows, so (P-1)/P of the wire carries padding at even load.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from parallel.exchange.group import Group, Traffic
from parallel.exchange.route import block_rows, bucket_order
from parallel.rows import exclusive_sum, inverse_places, take_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PaddedRoute:
    """
    counts_E: i32, rows in each of this device's own buckets.
    packed, unpacked_R: i32, the row at each place of the P blocks, and the inverse.
    source_S, target: i32, the place in the received blocks of each row in bucket order, and the inverse.
    """

    counts_E: jax.Array
    packed: jax.Array
    unpacked_R: jax.Array
    source_S: jax.Array
    target: jax.Array
    group: Group = field(metadata={"static": True})

    def forth(self, rows_RD: jax.Array) -> jax.Array:
        return take_rows(self._swap(take_rows(rows_RD, self.packed)), self.source_S)

    def back(self, rows_SD: jax.Array) -> jax.Array:
        return take_rows(self._swap(take_rows(rows_SD, self.target)), self.unpacked_R)

    def rows_forth(self) -> Traffic:
        return self.group.evenly(self.packed.size // self.group.size)

    def rows_back(self) -> Traffic:
        return self.rows_forth()

    def tables(self) -> Traffic:
        return self.group.evenly(self.counts_E.size * self.counts_E.dtype.itemsize)

    def _swap(self, rows_SD: jax.Array) -> jax.Array:
        blocks_PCD = rows_SD.reshape(self.group.size, -1, rows_SD.shape[1])
        return self.group.all_to_all(blocks_PCD).reshape(rows_SD.shape)


def lay_route(counts_E: jax.Array, num_rows: int, group: Group, limit: int) -> PaddedRoute:
    """See `route.LayRoute`."""
    counts_PE = counts_E.reshape(group.size, -1)
    block = block_rows(num_rows, counts_E.size, group, limit)
    starts_P = exclusive_sum(counts_PE.sum(1))[:, None]
    places_PC = jnp.arange(block, dtype=jnp.int32)[None, :]
    packed = jnp.where(places_PC < counts_PE.sum(1, keepdims=True), starts_P + places_PC, num_rows).reshape(-1)

    counts_PE = group.all_to_all(counts_PE)
    first_PE = exclusive_sum(counts_PE) + block * jnp.arange(group.size, dtype=jnp.int32)[:, None]
    source_S, target = bucket_order(first_PE, counts_PE, packed.size, packed.size)
    return PaddedRoute(counts_PE.sum(0), packed, inverse_places(packed, num_rows), source_S, target, group)
