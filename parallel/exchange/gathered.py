"""Exchange by gathering: every device receives all rows and keeps those of its own buckets; results are summed home.

The simplest backend, with which the others are compared. It sends each row to every device of the axis.
"""

import jax

from parallel.exchange.arrived import Arrived, bucket_order, exclusive_sum
from parallel.exchange.padded import block_rows
from parallel.rows import permute_rows


def send(rows_RD: jax.Array, counts_E: jax.Array, axis: str | tuple[str, ...], limit: int) -> Arrived:
    """As `padded.send`, with the same result."""
    num_devices = jax.lax.axis_size(axis)
    num_rows = rows_RD.shape[0]
    own = counts_E.size // num_devices
    block = block_rows(num_rows, own, limit)

    rows_PRD = jax.lax.all_gather(rows_RD, axis)
    counts_PE = jax.lax.all_gather(counts_E, axis)
    mine = jax.lax.axis_index(axis) * own
    first_PE = jax.lax.dynamic_slice_in_dim(exclusive_sum(counts_PE), mine, own, axis=1)
    counts_PE = jax.lax.dynamic_slice_in_dim(counts_PE, mine, own, axis=1)
    source_S, target = bucket_order(first_PE, counts_PE, num_rows, num_devices * block)
    rows_SD = permute_rows(rows_PRD.reshape(num_devices * num_rows, -1), source_S, target)
    return Arrived(rows_SD, counts_PE.sum(0), (source_S, target))


def bring_back(rows_SD: jax.Array, arrived: Arrived, axis: str | tuple[str, ...]) -> jax.Array:
    """As `padded.bring_back`. Each place has one device that adds something other than zero, so the sum is exact."""
    source_S, target = arrived.ticket
    num_devices = jax.lax.axis_size(axis)
    rows_PRD = permute_rows(rows_SD, target, source_S).reshape(num_devices, -1, rows_SD.shape[1])
    return jax.lax.psum_scatter(rows_PRD, axis)


def bytes_sent(num_rows: int, width: int, itemsize: int, num_buckets: int, num_devices: int, limit: int) -> int:
    """Bytes that one device sends to others in one `send`, and again in one `bring_back`."""
    del num_buckets, limit
    return (num_devices - 1) * num_rows * width * itemsize
