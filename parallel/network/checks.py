"""Findings on the paths of the GPUs' traffic: network cards, distances, the way into the GPU's memory, NCCL's log."""

from collections import Counter
from collections.abc import Sequence

from parallel.network.facts import Facts
from parallel.network.findings import Finding, Rail
from parallel.network.nccl_log import NcclLog
from parallel.network.rails import fabric_ports
from parallel.network.registration import peer_module, why_no_dma_buf
from parallel.network.topology import DISTANCE_IN_WORDS

_TOPOLOGY = "nvidia-smi topo -m"
_SYSFS = "/sys/class/infiniband"
_LOG = "NCCL's log"


def check_gpus(facts: Facts) -> list[Finding]:
    """How many GPUs there are, and whether those can do it at all."""
    found = []
    for name, count in Counter(gpu.name for gpu in facts.gpus or ()).items():
        if "GeForce" in name:
            text = f"{count} x {name}: GeForce cards do not offer GPUDirect RDMA"
            found.append(Finding("problem", "GPUs", text, "nvidia-smi", "none: use a data-centre or professional GPU"))
        else:
            found.append(Finding("ok", "GPUs", f"{count} x {name}", "nvidia-smi"))
    return found


def check_links(facts: Facts) -> list[Finding]:
    """Whether there are RDMA network cards, up and at the same rate."""
    if facts.ports is None:
        return []
    if not facts.ports:
        remedy = "install a ConnectX-class card and its driver (`modprobe mlx5_ib`), or expose it to the container"
        return [Finding("problem", "network cards", "there is no RDMA network card", _SYSFS, remedy)]
    ports = fabric_ports(facts)
    down = [port for port in ports.values() if not port.active]
    found = [
        Finding(
            "problem", "link", f"{port.device} is {port.state.lower()} (physical state {port.physical})",
            f"{_SYSFS}/{port.device}/ports/{port.number}/state",
            f"look at cable and switch port; `ibstat {port.device}`; `mlxlink -d {port.device}` tells why; "
            "on InfiniBand a port that stays INIT waits for a subnet manager",
        )
        for port in down
    ]  # fmt: skip
    up = [port for port in ports.values() if port.active]
    fastest = max((port.rate for port in up), default=0.0)
    found += [
        Finding(
            "warning", "link rate", f"{port.device} runs at {port.rate:g} Gb/s, others at {fastest:g}",
            f"{_SYSFS}/{port.device}/ports/{port.number}/rate",
            "a collective is as slow as its slowest rail: look at cable, transceiver and the switch port's setting",
        )
        for port in up
        if port.rate < fastest
    ]  # fmt: skip
    if up and not found:
        rates = f"{len(up)} x {fastest:g} Gb/s {up[0].kind}, all up"
        aside = sorted(facts.ports.keys() - ports.keys())
        found.append(
            Finding("ok", "link", rates + (f"; not for the GPUs: {', '.join(aside)}" if aside else ""), _SYSFS)
        )
    return found


def check_roce(facts: Facts) -> list[Finding]:
    """On Ethernet: whether there is an address of RoCE version 2, and NCCL_IB_GID_INDEX, where set, names one."""
    wanted = (facts.settings.variables if facts.settings else {}).get("NCCL_IB_GID_INDEX")
    found = []
    for port in fabric_ports(facts).values():
        if port.link_layer != "Ethernet" or not port.active:
            continue
        if not port.roce_v2:
            text = f"{port.device} has no GID of type RoCE v2"
            remedy = "give its network interface an IP address; `show_gids` must then list one of type RoCE v2"
        elif wanted is not None and wanted.isdecimal() and int(wanted) not in port.roce_v2:
            text = f"NCCL_IB_GID_INDEX={wanted} is no RoCE v2 GID of {port.device}: those are {_list(port.roce_v2)}"
            remedy = f"unset NCCL_IB_GID_INDEX (NCCL 2.21 and later finds it), or set {port.roce_v2[-1]}"
        else:
            continue
        found.append(Finding("problem", "RoCE", text, f"{_SYSFS}/{port.device}/ports/{port.number}/gid_attrs", remedy))
    return found


def check_distances(facts: Facts, rails: Sequence[Rail]) -> list[Finding]:
    """Whether each GPU has a card below its own PCIe switch."""
    if facts.topology is None or facts.settings is None:
        return []
    by_distance: dict[str, list[Rail]] = {}
    for rail in rails:
        if rail.distance is not None:
            by_distance.setdefault(rail.distance, []).append(rail)
    near = sum(len(by_distance.pop(distance, ())) for distance in ("PIX", "PXB"))
    if near and not by_distance:
        return [Finding("ok", "distance", f"each of {near} GPUs has a card below its PCIe switches", _TOPOLOGY)]
    return [
        Finding(
            "warning" if facts.settings.near_enough(distance) else "problem", "distance",
            f"the nearest card of {_list([f'GPU{rail.gpu}' for rail in those])} is {distance} away: between them is "
            + DISTANCE_IN_WORDS[distance]
            + _numa(facts, those),
            _TOPOLOGY, _nearer(facts),
        )
        for distance, those in by_distance.items()
    ]  # fmt: skip


def check_registration(facts: Facts) -> list[Finding]:
    """nvidia_peermem or DMA-BUF."""
    module, obstacle = peer_module(facts), why_no_dma_buf(facts)
    if module:
        return [Finding("ok", "GPU memory", f"{module} is loaded", "/proc/modules")]
    if facts.modules is None:
        return []
    if obstacle is None:
        if facts.driver is None or facts.kernel is None:
            return []
        if facts.log is not None and False in facts.log.supported.values():
            text = (
                f"nvidia_peermem is not loaded, and NCCL finds no DMA-BUF, which the driver {facts.driver.version} has"
            )
            remedy = "`modprobe nvidia_peermem`, or a newer driver of the network card: it lacks DMA-BUF"
            return [Finding("problem", "GPU memory", text, f"/proc/modules, {_LOG}", remedy)]
        text = f"nvidia_peermem is not loaded, and not needed: the open driver {facts.driver.version} offers DMA-BUF"
        return [Finding("ok", "GPU memory", text, "/proc/modules, /proc/driver/nvidia/version")]
    proven = facts.log is not None and any(facts.log.supported.values())
    return [
        Finding(
            "warning" if proven else "problem", "GPU memory", f"nvidia_peermem is not loaded, and {obstacle}",
            "/proc/modules, /proc/driver/nvidia/version",
            "`modprobe nvidia_peermem`, and its name in a file under /etc/modules-load.d/ for the next boot (where it "
            "fails with 'Invalid argument', install the NVIDIA driver again after the network card's)",
        )
    ]  # fmt: skip


def check_log(facts: Facts, rails: Sequence[Rail]) -> list[Finding]:
    """What NCCL did: direct or staged, over the own card or another, and its warnings."""
    if facts.log is None:
        return []
    log, found = facts.log, list[Finding]()
    if log.network == "Socket":
        remedy = "see the other findings; NCCL takes sockets where it finds no usable RDMA card"
        found.append(Finding("problem", "NCCL", "NCCL chose TCP sockets, not RDMA", _LOG, remedy))
    impossible = [name for name, possible in log.supported.items() if not possible]
    if impossible:
        text = f"NCCL finds GPUDirect RDMA impossible with {_list(impossible)}"
        found.append(Finding("problem", "NCCL", text, _LOG, "see the finding on GPU memory"))
    for rail in rails:
        others = log.devices_of(rail.gpu) - {rail.nic}
        if rail.nic is not None and others and not log.between(rail.gpu, rail.nic):
            text = f"GPU{rail.gpu} is connected over {_list(sorted(others))}, not over its own card {rail.nic}"
            found.append(Finding("warning", "NCCL", text, _LOG, f"see what keeps NCCL from {rail.nic}"))
    for message in log.warnings[:3]:
        found.append(Finding("warning", "NCCL", f"NCCL warns: {message}", _LOG, "see NCCL's troubleshooting guide"))
    return [*found, _connections(log)]


def _connections(log: NcclLog) -> Finding:
    """How NCCL's connections over the network travel."""
    total, direct, relayed = (
        len(log.connections),
        sum(connection.direct for connection in log.connections),
        sum(connection.relay for connection in log.connections),
    )
    read_in = f"{_LOG}, version {log.version}" if log.version else _LOG
    if not total:
        text = "the log shows no connection over the network, so it proves nothing"
        remedy = "give the log of an all-reduce over two nodes: --nccl-log FILE"
        return Finding("unknown", "NCCL", text, read_in, remedy)
    aside = f", {relayed} through a neighbour GPU's card (PXN)" if relayed else ""
    if direct == total:
        return Finding("ok", "NCCL", f"{total} connections over the network, all direct (GDRDMA){aside}", read_in)
    text = f"{total} connections over the network, {direct} of them direct (GDRDMA){aside}"
    return Finding("problem", "NCCL", text, read_in, "see the other findings")


def _numa(facts: Facts, rails: Sequence[Rail]) -> str:
    """On which NUMA nodes GPUs and cards are, where all of them say the same."""
    assert facts.topology is not None
    ports = facts.ports or {}
    places = {(facts.topology.numa.get(rail.gpu), ports[rail.nic].numa) for rail in rails if rail.nic in ports}
    if len(places) != 1 or None in next(iter(places)):
        return ""
    gpu, nic = next(iter(places))
    return f" (NUMA node {gpu} to {nic})"


def _nearer(facts: Facts) -> str:
    if facts.virtual:
        return (
            "the virtual machine hides the host's PCIe tree: set NCCL_TOPO_FILE to the topology file that the cloud "
            "provides (and expect NCCL's log to say GDRDMA); NCCL_NET_GDR_LEVEL=PHB or SYS forces it without"
        )
    return (
        "move the card to a slot below the GPU's PCIe switch; NCCL_NET_GDR_LEVEL=PHB (same socket) or SYS (any) allows "
        "it all the same: measure, it is often slower than staging through the host"
    )


def _list(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))
