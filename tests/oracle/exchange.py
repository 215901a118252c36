"""What an exchange must deliver, with loops."""

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
