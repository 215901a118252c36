"""Rows by gathering: every device receives all rows and keeps those of its own buckets; results are summed home.

The simplest transport, with which the others are compared. It sends each row to every device of the group. Bytes are
counted as if each device sent its rows to each other one directly, whatever way the collective takes.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from parallel.exchange.group import Group, Traffic
from parallel.exchange.route import block_rows, bucket_order
from parallel.rows import exclusive_sum, take_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GatheredRoute:
    """
    counts_E: i32, rows in each of this device's own buckets.
    source_S, target: i32, the place among all P · R rows of each row in bucket order, and the inverse.
    """

    counts_E: jax.Array
    source_S: jax.Array
    target: jax.Array
    group: Group = field(metadata={"static": True})

    def forth(self, rows_RD: jax.Array) -> jax.Array:
        rows_PRD = jax.lax.all_gather(rows_RD, self.group.axis, axis_index_groups=self.group.index_groups)
        return take_rows(rows_PRD.reshape(-1, rows_RD.shape[1]), self.source_S)

    def back(self, rows_SD: jax.Array) -> jax.Array:
        """Each place has one device that adds something other than zero, so the sum is exact."""
        rows_PRD = take_rows(rows_SD, self.target).reshape(self.group.size, -1, rows_SD.shape[1])
        return jax.lax.psum_scatter(rows_PRD, self.group.axis, axis_index_groups=self.group.index_groups)

    def rows_forth(self) -> Traffic:
        return self.group.evenly(self.target.size // self.group.size)

    def rows_back(self) -> Traffic:
        return self.rows_forth()

    def tables(self) -> Traffic:
        return self.group.evenly(self.counts_E.size * self.group.size * self.counts_E.dtype.itemsize)


def lay_route(counts_E: jax.Array, num_rows: int, group: Group, limit: int) -> GatheredRoute:
    """See `route.LayRoute`."""
    own = counts_E.size // group.size
    counts_PE = group.told(counts_E)
    first_PE = exclusive_sum(counts_PE) + num_rows * jnp.arange(group.size, dtype=jnp.int32)[:, None]
    first_PE, counts_PE = (
        jax.lax.dynamic_slice_in_dim(x, group.position() * own, own, axis=1) for x in (first_PE, counts_PE)
    )
    size = group.size * block_rows(num_rows, counts_E.size, group, limit)
    source_S, target = bucket_order(first_PE, counts_PE, group.size * num_rows, size)
    return GatheredRoute(counts_PE.sum(0), source_S, target, group)
