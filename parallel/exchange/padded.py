"""Exchange by one all-to-all of equal blocks, each as large as the fullest could be: exact for any routing.

A block holds min(R, limit · E/P) rows. With capacity-limited routing `limit` is the capacity, and nothing is wasted
beyond it; with dropless routing a block must hold all R rows, so (P-1)/P of the wire carries padding at even load.
"""

import jax
import jax.numpy as jnp

from parallel.exchange.arrived import Arrived, bucket_order, exclusive_sum
from parallel.rows import inverse_places, permute_rows


def send(rows_RD: jax.Array, counts_E: jax.Array, axis: str | tuple[str, ...], limit: int) -> Arrived:
    """Sends rows, sorted by bucket, to their buckets' owners.

    Args:
        rows_RD: bucket e owns the next counts_E[e] rows; rows after the last bucket stay behind.
        counts_E: i32.
        axis: the mesh axis, or the product of several, over which the E buckets are shared out.
        limit: no bucket counts more rows than this on any one device.

    Returns:
        Arrived with S = P · block rows.
    """
    num_devices = jax.lax.axis_size(axis)
    num_rows = rows_RD.shape[0]
    counts_PE = counts_E.reshape(num_devices, -1)
    block = block_rows(num_rows, counts_PE.shape[1], limit)

    starts_P = exclusive_sum(counts_PE.sum(1))[:, None]
    places_PC = jnp.arange(block, dtype=jnp.int32)[None, :]
    packed = jnp.where(places_PC < counts_PE.sum(1, keepdims=True), starts_P + places_PC, num_rows).reshape(-1)
    unpacked_R = inverse_places(packed, num_rows)
    blocks_PCD = permute_rows(rows_RD, packed, unpacked_R).reshape(num_devices, block, -1)

    blocks_PCD = jax.lax.all_to_all(blocks_PCD, axis, 0, 0)
    counts_PE = jax.lax.all_to_all(counts_PE, axis, 0, 0)
    source_S, target = bucket_order(exclusive_sum(counts_PE), counts_PE, block, num_devices * block)
    rows_SD = permute_rows(blocks_PCD.reshape(num_devices * block, -1), source_S, target)
    return Arrived(rows_SD, counts_PE.sum(0), (source_S, target, packed, unpacked_R))


def bring_back(rows_SD: jax.Array, arrived: Arrived, axis: str | tuple[str, ...]) -> jax.Array:
    """Results of the rows that `send` delivered, at the places from which they came; zeros for rows never sent.

    Returns:
        rows_RD, of rows_SD's dtype.
    """
    source_S, target, packed, unpacked_R = arrived.ticket
    num_devices = jax.lax.axis_size(axis)
    blocks_PCD = permute_rows(rows_SD, target, source_S).reshape(num_devices, -1, rows_SD.shape[1])
    blocks_PCD = jax.lax.all_to_all(blocks_PCD, axis, 0, 0)
    return permute_rows(blocks_PCD.reshape(packed.size, -1), unpacked_R, packed)


def bytes_sent(num_rows: int, width: int, itemsize: int, num_buckets: int, num_devices: int, limit: int) -> int:
    """Bytes that one device sends to others in one `send`, and again in one `bring_back`."""
    block = block_rows(num_rows, num_buckets // num_devices, limit)
    return (num_devices - 1) * block * width * itemsize


def block_rows(num_rows: int, buckets_per_device: int, limit: int) -> int:
    """Rows of one block."""
    return min(num_rows, buckets_per_device * limit)
