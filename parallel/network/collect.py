"""Collects a recording from this machine. Nothing is changed on it, and every refusal is kept as a reason."""

import glob
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from parallel.network.recording import FORMAT, Recording

_COMMAND_SECONDS = 60
_ALL_REDUCE_SECONDS = 240
_INFINIBAND = "/sys/class/infiniband"
_INFINIBAND_FILES = (
    "ports/*/state",
    "ports/*/phys_state",
    "ports/*/rate",
    "ports/*/link_layer",
    "ports/*/gid_attrs/types/*",
    "device/numa_node",
    "device/uevent",
)
_CONFIGURATION_FILES = (Path("~/.nccl.conf"), Path("/etc/nccl.conf"))

Got = tuple[str, None] | tuple[None, str]
"""A text, or the reason why there is none."""


def collect(nccl_log: str | None = None) -> Recording:
    """Reads the machine; where it has two GPUs or more, runs a small all-reduce for NCCL's log (up to minutes).

    Args:
        nccl_log: a log of NCCL to take instead, from a run of the user's own.
    """
    gpus = _command("nvidia-smi", "--query-gpu=index,name,pci.bus_id", "--format=csv,noheader")
    got = {
        "about.txt": _got(
            f"format: {FORMAT}\nhost: {socket.gethostname()}\ntaken: {time.strftime('%FT%TZ', time.gmtime())}\n"
        ),
        "nvidia-smi-gpus.txt": gpus,
        "nvidia-smi-topo.txt": _command("nvidia-smi", "topo", "-m"),
        "infiniband.txt": _infiniband(),
        "modules.txt": _file("/proc/modules"),
        "driver.txt": _file("/proc/driver/nvidia/version"),
        "kernel.txt": _file("/proc/sys/kernel/osrelease"),
        "cmdline.txt": _file("/proc/cmdline"),
        "iommu.txt": _got(_listing(glob.glob("/sys/kernel/iommu_groups/*/type")) or "# no group: there is no IOMMU\n"),
        "lspci.txt": _lspci(),
        "machine.txt": _machine(),
        "limits.txt": _file("/proc/self/limits"),
        "status.txt": _file("/proc/self/status"),
        "interfaces.txt": _got(_listing(glob.glob("/sys/class/net/*/operstate"))),
        "variables.txt": _got(_variables()),
        "nccl.log": _got(nccl_log) if nccl_log is not None else _all_reduce(gpus[0] or ""),
    }
    return Recording(
        texts={name: text for name, (text, _) in got.items() if text is not None},
        missing={name: reason for name, (_, reason) in got.items() if reason is not None},
    )


def _got(text: str) -> Got:
    return text, None


def _file(path: str) -> Got:
    try:
        return Path(path).read_text("utf-8", "replace"), None
    except OSError as error:
        return None, f"{path}: {error.strerror}"


def _command(*words: str) -> Got:
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=_COMMAND_SECONDS)
    except FileNotFoundError:
        return None, f"{words[0]} is not installed"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"`{' '.join(words)}`: {error}"
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        return None, f"`{' '.join(words)}` ended with {done.returncode}: {said[0] if said else 'it said nothing'}"
    return done.stdout, None


def _listing(paths: Iterable[str]) -> str:
    """What `grep -H . PATHS` prints; files that refuse (as empty GIDs do) are left out."""
    lines = []
    for path in sorted(paths):
        text, _ = _file(path)
        lines += [f"{path}:{line}\n" for line in (text or "").splitlines() if line]
    return "".join(lines)


def _infiniband() -> Got:
    if not os.path.isdir(_INFINIBAND):
        return _got(f"# {_INFINIBAND} does not exist: no RDMA driver is loaded\n")
    paths = [path for name in _INFINIBAND_FILES for path in glob.glob(f"{_INFINIBAND}/*/{name}")]
    return _got(_listing(paths) or f"# {_INFINIBAND} is empty\n")


def _lspci() -> Got:
    text, reason = _command("lspci", "-vvv")
    if text is None:
        return None, reason or ""
    kept = (line for line in text.splitlines() if line[:1].strip() or "ACSCtl:" in line or "access denied" in line)
    return _got("\n".join(kept) + "\n")


def _machine() -> Got:
    text, reason = _file("/proc/cpuinfo")
    if text is None:
        return None, reason or ""
    flag = "hypervisor" if re.search(r"^flags\s*:.*\bhypervisor\b", text, re.MULTILINE) else "no hypervisor"
    names = [f"/sys/class/dmi/id/{name}" for name in ("sys_vendor", "product_name")]
    return _got(f"/proc/cpuinfo:{flag}\n" + _listing(names))


def _variables() -> str:
    text = "# environment\n" + "".join(
        f"{name}={value}\n" for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")
    )
    for file in _CONFIGURATION_FILES:
        if (found := _file(str(file.expanduser()))[0]) is not None:
            text += f"# {file}\n{found.rstrip()}\n"
    return text


def _all_reduce(gpus: str) -> Got:
    """NCCL's log of a small all-reduce over this node's GPUs, forced onto the network.

    Without NVLink and shared memory NCCL must go through the network cards, also within a node.
    """
    count = sum(bool(line.strip()) for line in gpus.splitlines())
    if count < 2:
        return None, "an all-reduce needs two GPUs on this node"
    environment = os.environ | {
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_SUBSYS": "INIT,NET,ENV",
        "NCCL_P2P_DISABLE": "1",
        "NCCL_SHM_DISABLE": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    environment.pop("NCCL_DEBUG_FILE", None)
    command = [sys.executable, "-m", "parallel.network.all_reduce"]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=_ALL_REDUCE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return None, f"the small all-reduce did not end within {_ALL_REDUCE_SECONDS} s"
    text = done.stdout + done.stderr
    if "NCCL INFO" not in text:
        said = text.strip().splitlines()
        return None, f"the small all-reduce printed no log of NCCL: {said[-1] if said else 'it said nothing'}"
    return text, None
