"""Rows travel to the device that owns their bucket, and back: the contract, and the backends that keep it.

All functions run inside `jax.shard_map`, on one device's part. The buckets (for a mixture of experts: the experts) are
shared out evenly over one mesh axis or the product of several, outermost first, in order: with E buckets over P
devices, device p owns buckets p·E/P onwards.

    arrived = send(rows_RD, counts_E, axis, limit)        rows sorted by bucket → rows of this device's own buckets
    rows_RD = bring_back(rows_SD, arrived, axis)          results → the places from which their rows came

Every backend gives the same rows in the same order (by bucket, then by sending device, then by place) with the same
gradients, whatever the counts: none for a device, all for one bucket, fewer rows than R.

| backend  | how | bytes |
|---|---|---|
| padded   | one all-to-all of blocks as large as the fullest could be | (P-1) blocks of `limit`·E/P rows |
| gathered | every device receives all rows, keeps its own | (P-1) · R rows; simplest, for checking and for tiny axes |
"""

from types import ModuleType
from typing import Literal

from parallel.exchange import gathered, padded
from parallel.exchange.arrived import Arrived

__all__ = ["Arrived", "Backend", "backend"]

Backend = Literal["padded", "gathered"]


def backend(name: Backend) -> ModuleType:
    """The module of a backend: `send`, `bring_back` and `bytes_sent`.

    Raises:
        ValueError: there is none of that name.
    """
    backends = {"padded": padded, "gathered": gathered}
    if name not in backends:
        raise ValueError(f"execution.exchange={name!r}: give one of {', '.join(backends)}")
    return backends[name]
