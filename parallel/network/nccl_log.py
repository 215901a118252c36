"""What NCCL prints with NCCL_DEBUG=INFO: the only proof of how bytes travel.

A connection that bypasses the host reads `… [send] via NET/IB/3/GDRDMA`; without the last word it is staged through the
host's memory (NCCL, src/transport/net.cc). `NET/IB/3(5)` is one that goes through NVLink to GPU 5 first (PXN).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from parallel.network.formats import FormatError, plain_lines
from parallel.network.host import Gpu

_LINE = re.compile(r"(?:(\S+?):\d+:\d+ )?\[\d+\] NCCL (INFO|WARN) (.*)")
_CHANNEL = re.compile(
    r"Channel \d+(?:/\d+)? : \d+\[(\w+)\] -> \d+\[(\w+)\] \[(send|receive)\] "
    r"via NET/([\w-]+)/(\d+)(?:\((\d+)\))?(/GDRDMA)?"
)
_DEVICE = re.compile(r"\[(\d+)\]\s*([\w-]+):(\d+)/(IB|RoCE)")


@dataclass(frozen=True)
class Connection:
    """A connection of this node's `gpu` with another over network card number `device` of the list `devices`.

    direct: GPUDirect RDMA; relay: it goes through a neighbour GPU.
    """

    gpu: int
    sends: bool
    network: str
    device: int
    direct: bool
    relay: bool


@dataclass(frozen=True)
class NcclLog:
    """What the log says.

    network: "IB", "Socket" or a plugin's name, as NCCL chose; None where it does not say.
    devices: names of the network cards by NCCL's number.
    supported: by card's name, whether NCCL found GPUDirect RDMA possible with it.
    warnings: texts of the lines NCCL WARN.
    """

    version: str | None
    network: str | None
    devices: dict[int, str]
    supported: dict[str, bool]
    connections: tuple[Connection, ...]
    warnings: tuple[str, ...]

    def between(self, gpu: int, device: str) -> tuple[Connection, ...]:
        """Connections of a GPU over a card."""
        return tuple(c for c in self.connections if c.gpu == gpu and self.devices.get(c.device) == device)

    def devices_of(self, gpu: int) -> frozenset[str]:
        """Cards over which a GPU is connected."""
        return frozenset(self.devices[c.device] for c in self.connections if c.gpu == gpu and c.device in self.devices)


def parse_nccl_log(text: str, gpus: Sequence[Gpu] = (), host: str | None = None) -> NcclLog:
    """Reads a log, of which only the lines of `host` count where it is among the hosts that wrote it.

    Args:
        gpus: this node's, by which a GPU's PCI address (NCCL before 2.19 prints that) becomes its index.

    Raises:
        FormatError: no line of NCCL's.
    """
    lines = [found.groups() for line in plain_lines(text) if (found := _LINE.search(line))]
    if not lines:
        raise FormatError("holds no line of NCCL; run the program with NCCL_DEBUG=INFO")
    if host is not None and any(where == host for where, _, _ in lines):
        lines = [line for line in lines if line[0] in (host, None)]
    infos = [message for _, kind, message in lines if kind == "INFO"]
    version = re.search(r"NCCL version (\S+)", text)
    network = _first(r"(?:Using network|Initialized NET plugin) (\S+)", infos)
    return NcclLog(
        version=version[1] if version else None,
        network=network,
        devices=_devices(infos),
        supported={
            name: word == "Enabled" for word, name in _all(r"GPU Direct RDMA (\w+) for HCA \d+ '([^']+)'", infos)
        },
        connections=tuple(_connections(infos, gpus)),
        warnings=tuple(dict.fromkeys(message for _, kind, message in lines if kind == "WARN")),
    )


def _devices(infos: list[str]) -> dict[int, str]:
    found: dict[int, str] = {}
    for message in infos:
        if message.startswith("NET/IB : Using"):
            found |= {int(number): name for number, name, _, _ in _DEVICE.findall(message)}
    return found


def _connections(infos: list[str], gpus: Sequence[Gpu]) -> list[Connection]:
    found = []
    for match in filter(None, map(_CHANNEL.search, infos)):
        source, target, direction, network, device, relay, direct = match.groups()
        gpu = _gpu(source if direction == "send" else target, gpus)
        if gpu is not None:
            sends = direction == "send"
            found.append(Connection(gpu, sends, network, int(device), direct is not None, relay is not None))
    return found


def _gpu(text: str, gpus: Sequence[Gpu]) -> int | None:
    """A GPU's index from what stands in brackets: the index, or the PCI address in hexadecimal."""
    by_bus = [gpu.index for gpu in gpus if gpu.bus is not None and f"{gpu.bus:x}" == text.lower()]
    if by_bus:
        return by_bus[0]
    return int(text) if text.isdecimal() else None


def _first(pattern: str, messages: list[str]) -> str | None:
    found = _all(pattern, messages)
    return found[0][0] if found else None


def _all(pattern: str, messages: list[str]) -> list[tuple[str, ...]]:
    return [match.groups() for message in messages for match in re.finditer(pattern, message)]
