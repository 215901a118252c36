"""A cluster, described: what `env` needs to know to choose NCCL's variables and XLA's flags."""

from dataclasses import dataclass
from typing import Literal, get_args

Fabric = Literal["infiniband", "roce", "ethernet"]
GpuLink = Literal["nvlink", "pcie"]

NVLINK_RATE = 450e9
"""Bytes/s per direction of an H20, H100 or H200 [NVIDIA's datasheets]; A800 and H800 have less."""
PCIE_RATE = 32e9
"""Bytes/s per direction of PCIe 4 x16."""


class ClusterError(ValueError):
    """A description that is no cluster: names the field, the value, and what would do."""


@dataclass(frozen=True)
class Cluster:
    """
    nodes, gpus_per_node, nics_per_node: whole numbers; nics_per_node counts the GPUs' cards, not those for management.
    nic_rate: Gb/s of one card per direction.
    fabric: "infiniband", "roce" (RDMA over Ethernet) or "ethernet" (TCP).
    gpudirect: whether GPUDirect RDMA is to be used (`doctor` tells whether it can be).
    gpu_link: how GPUs of a node are joined, "nvlink" or "pcie".
    nic_names: the cards' names, such as mlx5_0; none leaves the choice to NCCL.
    prefetch: whether XLA gathers a layer's weights while the layer before computes, which has two layers' in memory.
    interface: the network interface over which NCCL's processes find each other; "" leaves the choice to NCCL.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    nics_per_node: int = 8
    nic_rate: float = 400
    fabric: Fabric = "infiniband"
    gpudirect: bool = True
    gpu_link: GpuLink = "nvlink"
    nic_names: tuple[str, ...] = ()
    interface: str = ""
    prefetch: bool = True

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "nics_per_node"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ClusterError(f"{name}={value!r}: give a whole number, at least 1")
        if not self.nic_rate > 0:
            raise ClusterError(f"nic_rate={self.nic_rate!r}: give Gb/s, such as 400")
        for name, allowed in (("fabric", get_args(Fabric)), ("gpu_link", get_args(GpuLink))):
            if getattr(self, name) not in allowed:
                raise ClusterError(f"{name}={getattr(self, name)!r}: give one of {', '.join(allowed)}")
        if self.gpudirect and self.fabric == "ethernet":
            raise ClusterError(
                "gpudirect=True with fabric='ethernet': TCP has no RDMA; give gpudirect=False, or fabric='roce' where "
                "the cards and switches do RDMA over Ethernet"
            )
        if self.nic_names and len(self.nic_names) != self.nics_per_node:
            raise ClusterError(
                f"nic_names={','.join(self.nic_names)}: {len(self.nic_names)} for nics_per_node={self.nics_per_node}"
            )

    @property
    def rdma(self) -> bool:
        return self.fabric != "ethernet"

    @property
    def gpu_rate(self) -> float:
        """Bytes/s per direction that a GPU has to itself: of the network, or within a single node of its link."""
        if self.nodes == 1:
            return NVLINK_RATE if self.gpu_link == "nvlink" else PCIE_RATE
        return self.nic_rate * 1e9 / 8 * self.nics_per_node / self.gpus_per_node
