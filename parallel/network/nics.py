"""The RDMA network cards under /sys/class/infiniband: state, rate and kind of each port."""

import re
from dataclasses import dataclass

from parallel.network.formats import FormatError, path_values

_PATH = re.compile(r"/sys/class/infiniband/([^/]+)/(.+)")
_PORT = re.compile(r"ports/(\d+)/(.+)")


@dataclass(frozen=True)
class Port:
    """One port of a network card.

    state: ACTIVE, DOWN, INIT or ARMED; `physical` is what the cable says: LinkUp, Polling, Disabled ...
    rate: Gb/s per direction.
    link_layer: "InfiniBand", or "Ethernet" (then RDMA is RoCE).
    numa: the NUMA node, or None where it is not told.
    roce_v2: indices of the GIDs of type RoCE v2, for Ethernet.
    """

    device: str
    number: int
    state: str
    physical: str
    rate: float
    link_layer: str
    numa: int | None
    roce_v2: tuple[int, ...]

    @property
    def active(self) -> bool:
        return self.state == "ACTIVE"

    @property
    def kind(self) -> str:
        """InfiniBand or RoCE."""
        return "RoCE" if self.link_layer == "Ethernet" else self.link_layer

    def __str__(self) -> str:
        # A link that is down reports a rate that means nothing.
        return f"{self.rate:g} Gb/s {self.kind} up" if self.active else f"{self.kind} {self.state.lower()}"


def parse_ports(text: str) -> dict[str, Port]:
    """The first port of every device (recent cards have one port a device), by device.

    Raises:
        FormatError: a line that is not from there, or a device with no whole port.
    """
    devices: dict[str, dict[str, str]] = {}
    for path, value in path_values(text).items():
        found = _PATH.fullmatch(path)
        if not found:
            raise FormatError(f"{path!r}: expected paths under /sys/class/infiniband")
        devices.setdefault(found[1], {})[found[2]] = value
    return {device: _port(device, values) for device, values in devices.items()}


def _port(device: str, values: dict[str, str]) -> Port:
    numbers = sorted({int(found[1]) for path in values if (found := _PORT.fullmatch(path))})
    if not numbers:
        raise FormatError(f"{device} has no ports")
    number = numbers[0]

    def attribute(name: str) -> str:
        value = values.get(f"ports/{number}/{name}")
        if value is None:
            raise FormatError(f"{device}: ports/{number}/{name} is not there")
        return value

    rate = re.match(r"\s*([\d.]+)\s*Gb/sec", attribute("rate"))
    if not rate:
        raise FormatError(f"{device}: ports/{number}/rate is {attribute('rate')!r}; expected, for example, 400 Gb/sec")
    numa = values.get("device/numa_node", "-1")
    return Port(
        device=device,
        number=number,
        state=_after_colon(device, "state", attribute("state")),
        physical=_after_colon(device, "phys_state", values.get(f"ports/{number}/phys_state", "?: unknown")),
        rate=float(rate[1]),
        link_layer=attribute("link_layer").strip(),
        numa=int(numa) if numa.isdecimal() else None,
        roce_v2=_roce_v2(number, values),
    )


def _after_colon(device: str, name: str, value: str) -> str:
    """ "4: ACTIVE" → "ACTIVE"."""
    _, colon, word = value.partition(":")
    if not colon:
        raise FormatError(f"{device}: {name} is {value!r}; expected a number and a word, such as '4: ACTIVE'")
    return word.strip()


def _roce_v2(number: int, values: dict[str, str]) -> tuple[int, ...]:
    types = re.compile(rf"ports/{number}/gid_attrs/types/(\d+)")
    found = [(types.fullmatch(path), value) for path, value in values.items()]
    return tuple(sorted(int(match[1]) for match, value in found if match and value.strip() == "RoCE v2"))
