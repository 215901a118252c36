"""What the node itself says: kernel, driver, modules, IOMMU and ACS, virtualization, limits. One parser a file."""

import re
from dataclasses import dataclass

from parallel.network.formats import FormatError, path_values, plain_lines

_CAP_IPC_LOCK = 1 << 14
_ACS_REDIRECTS = ("ReqRedir+", "CmpltRedir+")


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi names it; `bus` is its PCI address as the number that NCCL prints, or None."""

    index: int
    name: str
    bus: int | None


@dataclass(frozen=True)
class Driver:
    """The NVIDIA kernel driver: its version, and whether it is the open one."""

    version: str
    open: bool

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])


@dataclass(frozen=True)
class Acs:
    """How many PCI bridges there are, and which of them send peer-to-peer traffic up to the CPU."""

    bridges: int
    redirecting: tuple[str, ...]


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """GPUs from nvidia-smi --query-gpu=index,name,pci.bus_id --format=csv,noheader; none where it says so.

    Raises:
        FormatError: a line of another form.
    """
    lines = [line for line in plain_lines(text) if line.strip()]
    if lines[0].startswith("No devices were found"):
        return ()
    return tuple(_gpu(number, line) for number, line in enumerate(lines, 1))


def parse_modules(text: str) -> frozenset[str]:
    """Names of the loaded kernel modules, from /proc/modules.

    Raises:
        FormatError: a line of another form.
    """
    names = set()
    for number, line in enumerate(plain_lines(text), 1):
        if not line.strip():
            continue
        words = line.split()
        if len(words) < 3 or not words[1].isdecimal():
            raise FormatError(f"line {number}, {line[:60]!r}: expected a module's name, size and users")
        names.add(words[0])
    return frozenset(names)


def parse_driver(text: str) -> Driver:
    """The driver from /proc/driver/nvidia/version.

    Raises:
        FormatError: no line of the kernel module's version.
    """
    for line in plain_lines(text):
        if found := re.search(r"NVIDIA UNIX.*Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", line):
            return Driver(found[1], open="Open Kernel Module" in line)
    raise FormatError("holds no line 'NVRM version: NVIDIA UNIX … Kernel Module … VERSION'")


def parse_kernel(text: str) -> tuple[int, int]:
    """The kernel's version, (5, 15), from /proc/sys/kernel/osrelease.

    Raises:
        FormatError: it does not begin with two numbers.
    """
    found = re.match(r"\s*(\d+)\.(\d+)", text)
    if not found:
        raise FormatError(f"{text[:40]!r}: expected a kernel version such as 5.15.0-91-generic")
    return int(found[1]), int(found[2])


def parse_iommu(text: str) -> frozenset[str]:
    """Kinds of the IOMMU groups' domains: empty where there is no IOMMU, {"identity"} where it does not translate.

    Raises:
        FormatError: a line of another form.
    """
    return frozenset(value.strip() for value in path_values(text).values())


def parse_acs(text: str) -> Acs | None:
    """Which PCI bridges redirect peer-to-peer traffic, from lspci -vvv; None where lspci was not allowed to look.

    With ACS's request or completion redirect on, a transfer from a GPU to a network card below the same switch climbs
    to the CPU's root complex and back (NCCL's troubleshooting guide, PCI Access Control Services).

    Raises:
        FormatError: no device in it.
    """
    device, bridges, redirecting, denied, seen = "", 0, [], False, False
    for line in plain_lines(text):
        if found := re.match(r"((?:[0-9a-f]{4}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f]) (.+)", line):
            device, seen = found[1], True
            bridges += "PCI bridge" in found[2]
        elif "access denied" in line:
            denied = True
        elif "ACSCtl:" in line and any(word in line for word in _ACS_REDIRECTS):
            redirecting.append(device)
    if not seen:
        raise FormatError("holds no device such as '17:00.0 PCI bridge: …'")
    return None if denied else Acs(bridges, tuple(redirecting))


def parse_virtual(text: str) -> str:
    """The virtual machine that this is, in words; "" on bare metal.

    Raises:
        FormatError: a line of another form, or none on the CPU's flag.
    """
    values = path_values(text)
    if "/proc/cpuinfo" not in values:
        raise FormatError("holds no line /proc/cpuinfo:hypervisor or /proc/cpuinfo:no hypervisor")
    if values["/proc/cpuinfo"] != "hypervisor":
        return ""
    words = (values.get(f"/sys/class/dmi/id/{name}", "").strip() for name in ("sys_vendor", "product_name"))
    return " ".join(filter(None, words)) or "of an unknown kind"


def parse_locked_memory(text: str) -> float:
    """The soft limit on locked memory in bytes, infinity where there is none, from /proc/self/limits.

    Raises:
        FormatError: no such line.
    """
    found = re.search(r"^Max locked memory\s+(unlimited|\d+)\s", text, re.MULTILINE)
    if not found:
        raise FormatError("holds no line 'Max locked memory'")
    return float("inf") if found[1] == "unlimited" else float(found[1])


def parse_may_lock(text: str) -> bool:
    """Whether the process may lock memory beyond its limit (CAP_IPC_LOCK), from /proc/self/status.

    Raises:
        FormatError: no such line.
    """
    found = re.search(r"^CapEff:\s*([0-9a-fA-F]+)\s*$", text, re.MULTILINE)
    if not found:
        raise FormatError("holds no line 'CapEff:'")
    return bool(int(found[1], 16) & _CAP_IPC_LOCK)


def parse_interfaces(text: str) -> dict[str, str]:
    """States of the network interfaces by name, such as {"eth0": "up"}.

    Raises:
        FormatError: a line of another form.
    """
    return {path.split("/")[4]: value.strip() for path, value in path_values(text).items() if path.count("/") >= 5}


def _gpu(number: int, line: str) -> Gpu:
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) < 3 or not cells[0].isdecimal():
        raise FormatError(f"line {number}, {line[:60]!r}: expected index, name and PCI address")
    bus = re.fullmatch(r"([0-9A-Fa-f]+):([0-9A-Fa-f]{2}):([0-9A-Fa-f]{2})\.([0-9A-Fa-f])", cells[2])
    if not bus:
        raise FormatError(f"line {number}: {cells[2]!r} is no PCI address such as 00000000:1B:00.0")
    domain, number_of_bus, slot, function = (int(part, 16) for part in bus.groups())
    return Gpu(int(cells[0]), cells[1], domain << 20 | number_of_bus << 12 | slot << 4 | function)
