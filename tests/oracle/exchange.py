"""What an exchange must deliver, and what it sends, with loops."""

from collections.abc import Callable

import numpy as np


def arrivals(rows_PRD: np.ndarray, counts_PE: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each device: the rows of its own buckets, by bucket, then by sender, then by place; and rows per bucket.

    Args:
        rows_PRD: each device's rows, sorted by bucket.
        counts_PE: how many rows of each device belong to each of all E buckets.
    """
    num_devices, num_buckets = counts_PE.shape
    own = num_buckets // num_devices
    delivered = []
    for device in range(num_devices):
        rows, counts = [], []
        for bucket in range(device * own, (device + 1) * own):
            before = len(rows)
            for sender in range(num_devices):
                start = counts_PE[sender, :bucket].sum()
                rows.extend(rows_PRD[sender, start : start + counts_PE[sender, bucket]])
            counts.append(len(rows) - before)
        delivered.append((np.array(rows).reshape(len(rows), rows_PRD.shape[2]), np.array(counts)))
    return delivered


def sums(x_AD: np.ndarray, buckets_AK: np.ndarray, weights_AK: np.ndarray, scale_ED: np.ndarray) -> np.ndarray:
    """Σ_k weight · scale of the bucket · x, where bucket E adds nothing."""
    y_AD = np.zeros(x_AD.shape)
    for a, k in np.ndindex(buckets_AK.shape):
        if buckets_AK[a, k] < len(scale_ED):
            y_AD[a] += weights_AK[a, k] * scale_ED[buckets_AK[a, k]] * x_AD[a]
    return y_AD


def flat_rows(buckets_PAK: np.ndarray, num_buckets: int, node_size: int) -> tuple[float, float]:
    """Rows that a device sends in the mean, inside its node and across, with one row for each choice."""
    num_devices = len(buckets_PAK)
    inside = across = 0
    for (sender, _, _), bucket in np.ndenumerate(buckets_PAK):
        owner = bucket // (num_buckets // num_devices)
        if owner < num_devices and owner != sender:
            near = owner // node_size == sender // node_size
            inside, across = inside + near, across + (not near)
    return inside / num_devices, across / num_devices


def hierarchical_rows(buckets_PAK: np.ndarray, num_buckets: int, node_size: int) -> tuple[float, float]:
    """The same, with a row along the rail for each node, and from where it lands one for each device."""
    num_devices = len(buckets_PAK)
    inside = across = 0
    for sender, token in np.ndindex(buckets_PAK.shape[:2]):
        owners = {bucket // (num_buckets // num_devices) for bucket in buckets_PAK[sender, token]} - {num_devices}
        inside += sum(owner % node_size != sender % node_size for owner in owners)
        across += len({owner // node_size for owner in owners} - {sender // node_size})
    return inside / num_devices, across / num_devices


def rounded_sums(
    x_D: np.ndarray,
    choices: list[tuple[int, float]],
    scale_ED: np.ndarray,
    own: list[int],
    rounded: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """As `sums` for one token, whose row is rounded when it leaves for each step, and each member's sum when it leaves
    for home.

    Args:
        choices: (bucket, weight) of those that were not dropped.
        own: how many buckets each member owns in each step; none where all steps are done.
    """
    if not own:
        return sum((weight * scale_ED[bucket] * x_D for bucket, weight in choices), np.zeros(len(x_D)))
    y_D = np.zeros(len(x_D))
    for member in {bucket // own[0] for bucket, _ in choices}:
        there = [choice for choice in choices if choice[0] // own[0] == member]
        y_D += rounded(rounded_sums(rounded(x_D), there, scale_ED, own[1:], rounded))
    return y_D
