"""Findings on the node as a whole: NCCL's variables, IOMMU and ACS, limits, and what could not be looked at."""

from collections.abc import Mapping, Sequence

from parallel.network.facts import Facts
from parallel.network.findings import Finding, Rail, Severity
from parallel.network.nccl_variables import LEVELS, Settings, matches
from parallel.network.rails import fabric_ports
from parallel.network.registration import LEAST_LOCKED_MEMORY, too_little_locked_memory

_VARIABLES = "environment, nccl.conf"
_WHAT_FOR = {
    "nvidia-smi-gpus.txt": "the GPUs",
    "nvidia-smi-topo.txt": "how far the network cards are from the GPUs",
    "infiniband.txt": "the network cards and their links",
    "modules.txt": "whether nvidia_peermem is loaded",
    "driver.txt": "the NVIDIA driver, and so whether there is DMA-BUF",
    "kernel.txt": "the kernel, and so whether there is DMA-BUF",
    "cmdline.txt": "the kernel's command line",
    "iommu.txt": "whether the IOMMU translates",
    "lspci.txt": "whether ACS detours peer-to-peer traffic",
    "machine.txt": "whether this is a virtual machine",
    "limits.txt": "the limit on locked memory",
    "status.txt": "whether the process may lock memory beyond its limit",
    "interfaces.txt": "the network interfaces",
    "variables.txt": "NCCL's variables",
    "nccl.log": "what NCCL does in fact",
}
_REMEDIES = {
    "nccl.log": "run an all-reduce with NCCL_DEBUG=INFO and give what it printed: --nccl-log FILE",
    "lspci.txt": "run as root: `sudo lspci -vvv`",
}


def check_variables(facts: Facts, rails: Sequence[Rail]) -> list[Finding]:
    """NCCL variables that take RDMA away, or that NCCL does not understand."""
    settings = facts.settings
    if settings is None:
        return []
    found = _check_off(settings) + _check_level(settings) + _check_cards(facts, settings)
    variables = settings.variables
    if settings.read is False:
        text = "NCCL_NET_GDR_READ=0: what a GPU sends is staged through the host; only receiving is direct"
        found.append(_variable("warning", text, "unset it"))
    if not settings.pxn and any(rail.verdict != "yes" for rail in rails):
        text = "NCCL_PXN_DISABLE=1: a GPU whose own card is unusable cannot go through a neighbour's"
        found.append(_variable("warning", text, "unset it: NVLink to a neighbour's card is the better detour"))
    if variables.get("NCCL_P2P_DISABLE") == "1":
        text = "NCCL_P2P_DISABLE=1: GPUs of this node do not use NVLink among themselves"
        found.append(_variable("warning", text, "unset it"))
    wanted = variables.get("NCCL_SOCKET_IFNAME")
    if wanted and facts.interfaces is not None and not any(matches(wanted, name) for name in facts.interfaces):
        text = f"NCCL_SOCKET_IFNAME={wanted} fits no interface of this node ({', '.join(sorted(facts.interfaces))})"
        found.append(_variable("problem", text, "name one that reaches the other nodes, or unset it"))
    if not found:
        known = ", ".join(f"{name}={value}" for name, value in variables.items()) or "none is set"
        found.append(Finding("ok", "variables", f"nothing in NCCL's variables is in the way ({known})", _VARIABLES))
    return found


def check_pcie(facts: Facts) -> list[Finding]:
    """ACS and the IOMMU, which send peer-to-peer traffic through the CPU's root complex."""
    found = []
    if facts.acs is not None and facts.acs.redirecting:
        places = ", ".join(facts.acs.redirecting[:4]) + (" …" if len(facts.acs.redirecting) > 4 else "")
        count = f"ACS redirects peer-to-peer traffic at {len(facts.acs.redirecting)} PCI bridges ({places})"
        if facts.virtual:
            found.append(Finding("ok", "ACS", f"{count}, as a virtual machine needs it", "lspci -vvv"))
        else:
            remedy = (
                "turn it off in the BIOS (IO virtualization, VT-d), or at each boot: "
                "`setpci -s BRIDGE ECAP_ACS+0x6.w=0000` for each bridge above a GPU or its card"
            )
            text = f"{count}: transfers climb to the CPU and back, slower, and may hang"
            found.append(Finding("warning", "ACS", text, "lspci -vvv", remedy))
    elif facts.acs is not None:
        found.append(Finding("ok", "ACS", f"no PCI bridge of {facts.acs.bridges} redirects", "lspci -vvv"))
    elif "lspci.txt" not in facts.unknown:
        text = "lspci was not allowed to read whether ACS is on"
        found.append(Finding("unknown", "ACS", text, "lspci -vvv", _REMEDIES["lspci.txt"]))
    if facts.iommu is not None and facts.virtual == "":
        found.append(_iommu(facts))
    return found


def check_machine(facts: Facts) -> list[Finding]:
    """Virtual or not, and the limit on locked memory."""
    found = []
    if facts.virtual:
        text = f"this is a virtual machine ({facts.virtual}): the PCIe tree that it shows may not be the host's"
        remedy = "ask the cloud for its NCCL topology file, and set NCCL_TOPO_FILE to it"
        given = facts.settings is not None and "NCCL_TOPO_FILE" in facts.settings.variables
        found.append(
            Finding("ok" if given else "warning", "machine", text, "/sys/class/dmi/id", "" if given else remedy)
        )
    too_little = too_little_locked_memory(facts)
    if facts.locked_memory is None or too_little is None:
        return found
    size = "unlimited" if facts.locked_memory == float("inf") else f"{facts.locked_memory / 1024:,.0f} KiB"
    if too_little:
        remedy = (
            "`* soft memlock unlimited` and `* hard memlock unlimited` in /etc/security/limits.conf; under Slurm "
            "LimitMEMLOCK=infinity for slurmd; in a container --ulimit memlock=-1"
        )
        text = f"only {size} may be locked, and NCCL pins {LEAST_LOCKED_MEMORY >> 20} MiB and more: it will stop with "
        text += "'ibv_reg_mr failed: Cannot allocate memory'"
        found.append(Finding("problem", "locked memory", text, "/proc/self/limits", remedy))
    else:
        beyond = " and may be exceeded (CAP_IPC_LOCK)" if facts.may_lock else ""
        found.append(Finding("ok", "locked memory", f"the limit is {size}{beyond}", "/proc/self/limits"))
    return found


def check_unknown(unknown: Mapping[str, str]) -> list[Finding]:
    """What could not be looked at, and why."""
    return [
        Finding("unknown", "not known", f"{what}: {unknown[name]}", name, _REMEDIES.get(name, ""))
        for name, what in _WHAT_FOR.items()
        if name in unknown
    ]


def _check_off(settings: Settings) -> list[Finding]:
    found = []
    if settings.rdma_off:
        text = f"{settings.rdma_off} turns RDMA off: NCCL uses TCP sockets"
        found.append(
            _variable("problem", text, f"unset {settings.rdma_off.split('=')[0]}, or take it out of nccl.conf")
        )
    if settings.plugin:
        text = f"{settings.plugin}: a plugin carries the traffic, by rules of its own"
        found.append(_variable("unknown", text, "look for its name in NCCL's log: --nccl-log FILE"))
    if not settings.dma_buf:
        found.append(_variable("warning", "NCCL_DMABUF_ENABLE=0 forbids DMA-BUF", "unset it"))
    return found


def _check_level(settings: Settings) -> list[Finding]:
    text = settings.variables.get("NCCL_NET_GDR_LEVEL")
    if text is None:
        return []
    if settings.level is None:
        message = f"NCCL_NET_GDR_LEVEL={text} means nothing to NCCL, which ignores it"
        return [_variable("warning", message, "give LOC, PIX, PXB, PHB or SYS (NODE counts as PHB), or unset it")]
    if LEVELS.index(settings.level) < LEVELS.index("PXB"):
        never = not settings.near_enough("PIX")
        message = f"NCCL_NET_GDR_LEVEL={text} " + ("forbids GPUDirect RDMA" if never else "allows it at PIX only")
        return [_variable("problem" if never else "warning", message, "unset it (PXB), or give PXB")]
    return []


def _check_cards(facts: Facts, settings: Settings) -> list[Finding]:
    wanted = settings.variables.get("NCCL_IB_HCA")
    fabric = fabric_ports(facts)
    aside = sorted(n for n, p in (facts.ports or {}).items() if n not in fabric and p.active)
    if not wanted and aside and fabric:
        text = f"NCCL_IB_HCA is not set, so NCCL may also use {', '.join(aside)}, which is no GPU's own card"
        return [_variable("warning", text, f"NCCL_IB_HCA=={','.join(sorted(fabric))}")]
    if not wanted:
        return []
    left_out = sorted(n for n, port in fabric.items() if not settings.uses_device(n, port.number))
    if not left_out:
        return []
    prefix = "" if "=" in wanted[:2] else "; without '=' a name is a prefix: mlx5_1 takes in mlx5_10 as well"
    text = f"NCCL_IB_HCA={wanted} leaves out {', '.join(left_out)}, own card of a GPU"
    return [_variable("problem", text, f"unset it, or name them too{prefix}")]


def _iommu(facts: Facts) -> Finding:
    kinds = sorted(facts.iommu or ())
    if not kinds or kinds == ["identity"]:
        return Finding("ok", "IOMMU", "it does not translate" if kinds else "it is off", "/sys/kernel/iommu_groups")
    asked = [word for word in (facts.command_line or "").split() if "iommu" in word]
    return Finding(
        "warning", "IOMMU", "it translates addresses of devices (" + ", ".join([*kinds, *asked]) + "): peer-to-peer "
        "traffic goes through the CPU's root complex", "/sys/kernel/iommu_groups, /proc/cmdline",
        "boot with iommu=pt, or turn it off where no virtual machines are needed",
    )  # fmt: skip


def _variable(severity: Severity, text: str, remedy: str) -> Finding:
    return Finding(severity, "variables", text, _VARIABLES, remedy)
