"""NCCL's variables and XLA's flags for a described cluster, each with its reason.

Sources: NCCL's user guide, Environment Variables; JAX's GPU performance tips; NVIDIA's JAX-Toolbox, GPU performance.
A variable whose value is NCCL's default is stated only where an inherited one would take RDMA away.
"""

import math
from dataclasses import dataclass

from parallel.network.cluster import Cluster

LATENCY = {True: 20e-6, False: 10e-6}
"""Seconds that a collective costs before the first byte, across nodes and within one: an assumption, of the order that
nccl-tests prints for small messages. `bench` measures the cluster's own."""
LATENCY_SHARE = 0.02
"""Of a combined collective's time; the combine thresholds are the bytes at which it is reached."""


@dataclass(frozen=True)
class Setting:
    """NAME=value in the environment, or an XLA flag --name=value."""

    name: str
    value: str
    reason: str


def nccl_variables(cluster: Cluster) -> tuple[Setting, ...]:
    """NCCL's variables; none for a single node, where no network is used."""
    if cluster.nodes == 1:
        return ()
    chosen = []
    if cluster.interface:
        reason = "processes find each other over it; '=' makes the name exact"
        chosen.append(Setting("NCCL_SOCKET_IFNAME", "=" + cluster.interface, reason))
    return tuple(chosen + (_rdma(cluster) + _relays(cluster) if cluster.rdma else _sockets(cluster)))


_PREFETCH = (
    Setting(
        "xla_gpu_enable_pipelined_all_gather", "true",
        "a scan's next layer is gathered while this one computes (costs one layer's weights in memory)",
    ),
    Setting(
        "xla_gpu_enable_pipelined_reduce_scatter", "true",
        "a layer's gradients are scattered while the next layer's are computed",
    ),
    Setting(
        "xla_gpu_enable_while_loop_unrolling", "WHILE_LOOP_UNROLLING_DOUBLE_BUFFER",
        "unrolls a scan by two, so that a pipelined collective needs no copy of its buffer",
    ),
)  # fmt: skip
"""Flags by which a scan's exchanges run beside the layer before."""
_GATHERED_AT_ONCE = 4 << 30
"""Bytes of weights up to which the gathers of a scan's turn are one collective, where the turn before computes beside
it. The scheduler has one collective under way at a time: of many gathers only the last would run beside arithmetic."""


def xla_flags(cluster: Cluster) -> tuple[Setting, ...]:
    """XLA's flags that overlap the exchange with arithmetic and size its messages."""
    threshold = str(combine_threshold(cluster))
    size = f"{combine_threshold(cluster) >> 20} MiB, at which latency is {LATENCY_SHARE:.0%} of a collective's time"
    gathers = (
        (str(_GATHERED_AT_ONCE), "combines what the scan's next layer gathers: one collective hides behind this layer")
        if cluster.prefetch
        else (threshold, f"combines gathers up to {size}")
    )
    return (
        Setting(
            "xla_gpu_enable_latency_hiding_scheduler", "true",
            "collectives run beside arithmetic (check gradients after a change of jaxlib: this scheduler had bugs "
            "with ragged all-to-all)",
        ),
        Setting(
            "xla_gpu_enable_highest_priority_async_stream", "true",
            "a collective that is ready does not wait behind arithmetic",
        ),
        *(_PREFETCH if cluster.prefetch else ()),
        Setting("xla_gpu_all_gather_combine_threshold_bytes", *gathers),
        Setting("xla_gpu_reduce_scatter_combine_threshold_bytes", threshold, f"combines scatters up to {size}"),
        Setting("xla_gpu_all_reduce_combine_threshold_bytes", threshold, f"combines reductions up to {size}"),
    )  # fmt: skip


def combine_threshold(cluster: Cluster) -> int:
    """Bytes, a power of two, at which the latency is LATENCY_SHARE of the time: latency · rate / share."""
    wanted = LATENCY[cluster.nodes > 1] * cluster.gpu_rate / LATENCY_SHARE
    return 1 << max(20, round(math.log2(wanted)))


def shell(cluster: Cluster) -> str:
    """The settings as lines for a shell: export NAME="value"  # reason."""
    lines = [_describe(cluster)]
    variables = nccl_variables(cluster)
    if not variables:
        lines.append("# one node: no network is used, and NCCL finds NVLink or PCIe by itself")
    lines += [f'export {each.name}="{each.value}"  # {each.reason}' for each in variables]
    if variables:
        lines.append(
            "# proof: with NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET,ENV, connections must read " + _proof(cluster)
        )
    lines.append("")
    for flag in xla_flags(cluster):
        lines.append(f'XLA_FLAGS="${{XLA_FLAGS:-}} --{flag.name}={flag.value}"  # {flag.reason}')
    return "\n".join([*lines, "export XLA_FLAGS", ""])


def _rdma(cluster: Cluster) -> list[Setting]:
    chosen = [Setting("NCCL_IB_DISABLE", "0", "RDMA is on (the default, stated against an inherited 1)")]
    if cluster.nic_names:
        names = "=" + ",".join(cluster.nic_names)
        chosen.append(Setting("NCCL_IB_HCA", names, "the GPUs' cards and no others; '=' makes the names exact"))
    if cluster.gpudirect:
        chosen += [
            Setting("NCCL_NET_GDR_LEVEL", "PXB", "GPUDirect RDMA where only PCIe switches lie between GPU and card"),
            Setting(
                "NCCL_NET_GDR_READ", "1", "also for what a GPU sends (on some PCIe platforms NCCL would stage that)"
            ),
            Setting("NCCL_DMABUF_ENABLE", "1", "DMA-BUF where nvidia_peermem is not loaded (the default, stated)"),
        ]
    else:
        chosen.append(Setting("NCCL_NET_GDR_LEVEL", "LOC", "never GPUDirect RDMA: staged through the host"))
    if cluster.fabric == "roce":
        chosen += [
            Setting("NCCL_IB_ROCE_VERSION_NUM", "2", "routable RoCE; NCCL 2.21 and later then finds the GID itself"),
            Setting("NCCL_IB_QPS_PER_CONNECTION", "4", "several flows, so that equal-cost routes are shared evenly"),
        ]
    return chosen


def _relays(cluster: Cluster) -> list[Setting]:
    """Traffic through a neighbour's card."""
    if cluster.gpu_link == "pcie" or cluster.nics_per_node == 1:
        return [Setting("NCCL_PXN_DISABLE", "1", "no NVLink to a neighbour's card: each GPU uses its own")]
    chosen = [
        Setting(
            "NCCL_PXN_DISABLE", "0", "over NVLink to the GPU whose card is on the target's rail (the default, stated)"
        ),
        Setting("NCCL_P2P_PXN_LEVEL", "2", "so for all-to-all too: a node's rows for a rail leave in one message"),
    ]
    if cluster.nics_per_node == cluster.gpus_per_node:
        chosen.append(Setting("NCCL_CROSS_NIC", "0", "a ring stays on its rail: between rails the way is longer"))
    return chosen


def _sockets(cluster: Cluster) -> list[Setting]:
    chosen = [Setting("NCCL_IB_DISABLE", "1", "TCP sockets: no RDMA on this network")]
    if cluster.nic_rate >= 100:
        chosen += [
            Setting("NCCL_SOCKET_NTHREADS", "4", "one thread cannot fill 100 Gb/s"),
            Setting("NCCL_NSOCKS_PERTHREAD", "4", "nor can one connection (their product is at most 64)"),
        ]
    return chosen


def _proof(cluster: Cluster) -> str:
    if not cluster.rdma:
        return "via NET/Socket/n"
    return "via NET/IB/n/GDRDMA" if cluster.gpudirect else "via NET/IB/n"


def _describe(cluster: Cluster) -> str:
    gpus = f"# {cluster.nodes} node{'s' * (cluster.nodes > 1)} of {cluster.gpus_per_node} GPUs ({cluster.gpu_link})"
    if cluster.nodes == 1:
        return gpus
    cards = f"{cluster.nics_per_node} x {cluster.nic_rate:g} Gb/s {cluster.fabric}"
    return f"{gpus}, {cards}: {cluster.gpu_rate / 1e9:g} GB/s a GPU and direction"
