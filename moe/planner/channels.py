"""The links of a described cluster as planning sees them: latency and bandwidth, derived from chip and cluster.

time = latency + bytes that a device sends / bandwidth. What was measured on the cluster itself (`python -m
parallel.network bench`) takes the place of what is derived here.
"""

from dataclasses import dataclass

from moe.planner.chips import Chip
from moe.planner.work import Transfer
from parallel.network.cluster import Cluster
from parallel.network.environment import LATENCY
from parallel.network.links import LinkClass, Links

SHARED_ROOT = 0.5
"""Of a PCIe slot's rate, what a GPU has for its neighbours: two GPUs share a root port of the usual server of 8."""
STAGED = 0.5
"""Of a PCIe slot's rate, what staging leaves: on its way to the host's memory and out again each byte takes the port
that a GPU and its network card share twice in the same direction (what is sent by the GPU, what is received by the
card)."""
STAGED_CHUNK = 512 * 1024
"""Bytes that NCCL copies at a time: a step of its buffer of 4 MiB (NCCL user guide, NCCL_BUFFSIZE; 8 steps)."""
PROXY = 5e-6
"""Seconds of NCCL's thread on the host for one staged message: an assumption."""


@dataclass(frozen=True)
class Channel:
    """
    latency: seconds before the first byte.
    bandwidth: bytes/s that one device sends; receiving goes on beside it.
    how: the way in words, with what is modelled about it.
    """

    latency: float
    bandwidth: float
    how: str


@dataclass(frozen=True)
class Channels:
    """inside: to the GPUs of the same node; across: to other nodes; host: to the host's memory."""

    inside: Channel
    across: Channel
    host: Channel


def channels(chip: Chip, cluster: Cluster) -> Channels:
    """What each GPU has to itself when all of a node send at once. Peak rates: the share of them that a collective
    reaches is in `efficiency.py`."""
    host = Channel(LATENCY[False], chip.pcie_rate, f"PCIe, {chip.pcie_rate / 1e9:g} GB/s")
    return Channels(_inside(chip, cluster), _across(chip, cluster), host)


def _inside(chip: Chip, cluster: Cluster) -> Channel:
    if chip.link == "nvlink" and cluster.gpu_link == "nvlink":
        return Channel(LATENCY[False], chip.link_rate, f"NVLink, {chip.link_rate / 1e9:g} GB/s")
    rate = SHARED_ROOT * chip.pcie_rate
    return Channel(LATENCY[False], rate, f"PCIe, two GPUs on a root port: {rate / 1e9:g} GB/s each (modelled)")


def _across(chip: Chip, cluster: Cluster) -> Channel:
    card = cluster.nic_rate * 1e9 / 8 * cluster.nics_per_node / cluster.gpus_per_node
    latency = LATENCY[True]
    if cluster.gpudirect:
        rate = min(card, chip.pcie_rate)
        return Channel(latency, rate, f"GPUDirect RDMA, {rate / 1e9:g} GB/s a GPU")
    rate = min(card, STAGED * chip.pcie_rate)
    latency += 2 * (STAGED_CHUNK / chip.pcie_rate + PROXY)
    return Channel(latency, rate, f"staged through the host's memory: {rate / 1e9:g} GB/s a GPU (modelled)")


_MEASURED = {
    "all-gather": "all_gather",
    "all-reduce": "all_reduce",
    "reduce-scatter": "reduce_scatter",
    "all-to-all": "all_to_all",
    "ragged-all-to-all": "all_to_all",
    "collective-permute": "all_to_all",
}
"""As which collective of `parallel.network.links` a transfer was measured."""


def measured(links: Links | None, transfer: Transfer, link: LinkClass) -> Channel | None:
    """The fit of the nearest number of devices; None where there is no such measurement."""
    collective = _MEASURED.get(transfer.kind)
    fits = [each for each in links.links if (each.collective, each.link) == (collective, link)] if links else []
    if not fits:
        return None
    fit = min(fits, key=lambda each: abs(each.devices - transfer.devices))
    return Channel(fit.latency, fit.bandwidth, f"measured over {fit.devices} devices")
