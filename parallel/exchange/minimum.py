"""The least that any exchange can send for a given routing."""

import numpy as np


def least_rows(buckets_PAK: np.ndarray, num_buckets: int, node_size: int) -> tuple[float, float]:
    """Rows that a device sends in the mean, one way: the least across nodes, and with that the least inside.

    Each device that owns one of a token's buckets must get the token, unless it has it. So a token crosses once to
    each other node that it wants; there it lands on a device that wants it, and goes on to the others that do.

    Args:
        buckets_PAK: the choices of each device's tokens; E for a dropped one.
        num_buckets: E, shared out evenly over the P devices.
        node_size: devices of one node.
    """
    num_devices = len(buckets_PAK)
    owners_PAK = buckets_PAK // (num_buckets // num_devices)
    devices_P = np.arange(num_devices)
    wanted_PAP = (owners_PAK[..., None] == devices_P).any(2)
    wanted_PAP &= devices_P[:, None, None] != devices_P
    nodes_PAN = wanted_PAP.reshape(*wanted_PAP.shape[:2], -1, node_size).any(3)
    other_PN = (devices_P // node_size)[:, None] != np.arange(num_devices // node_size)
    across = (nodes_PAN & other_PN[:, None]).sum()
    return float(wanted_PAP.sum() - across) / num_devices, float(across) / num_devices
