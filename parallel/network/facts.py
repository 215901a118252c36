"""A recording, understood: each file parsed, or the reason why it could not be."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from parallel.network.formats import FormatError, assignments
from parallel.network.host import (
    Acs,
    Driver,
    Gpu,
    parse_acs,
    parse_driver,
    parse_gpus,
    parse_interfaces,
    parse_iommu,
    parse_kernel,
    parse_locked_memory,
    parse_may_lock,
    parse_modules,
    parse_virtual,
)
from parallel.network.nccl_log import NcclLog, parse_nccl_log
from parallel.network.nccl_variables import Settings, read_settings
from parallel.network.nics import Port, parse_ports
from parallel.network.recording import Recording
from parallel.network.topology import Topology, parse_topology

T = TypeVar("T")


@dataclass(frozen=True)
class Facts:
    """What is known of a node; None for what is not, and then `unknown` says why, by file.

    gpus: empty where nvidia-smi ran and found none.
    virtual: the kind of virtual machine, "" on bare metal.
    acs: None also where lspci was not allowed to look.
    """

    gpus: tuple[Gpu, ...] | None
    topology: Topology | None
    ports: dict[str, Port] | None
    modules: frozenset[str] | None
    driver: Driver | None
    kernel: tuple[int, int] | None
    command_line: str | None
    iommu: frozenset[str] | None
    acs: Acs | None
    virtual: str | None
    locked_memory: float | None
    may_lock: bool | None
    interfaces: dict[str, str] | None
    settings: Settings | None
    log: NcclLog | None
    unknown: dict[str, str]


def understand(recording: Recording) -> Facts:
    """Parses every file. Damage is kept as a reason, never raised: what can be told is told."""
    unknown: dict[str, str] = {}

    def parsed(name: str, parse: Callable[[str], T]) -> T | None:
        text = recording.texts.get(name)
        if text is None:
            unknown[name] = recording.why_missing(name)
            return None
        try:
            return parse(text)
        except FormatError as error:
            unknown[name] = f"{name}: {error}"
            return None

    about = recording.texts.get("about.txt", "")
    host = next((line.split(":", 1)[1].strip() for line in about.splitlines() if line.startswith("host:")), None)
    gpus = parsed("nvidia-smi-gpus.txt", parse_gpus)
    return Facts(
        gpus=gpus,
        topology=parsed("nvidia-smi-topo.txt", parse_topology),
        ports=parsed("infiniband.txt", parse_ports),
        modules=parsed("modules.txt", parse_modules),
        driver=parsed("driver.txt", parse_driver),
        kernel=parsed("kernel.txt", parse_kernel),
        command_line=parsed("cmdline.txt", str.strip),
        iommu=parsed("iommu.txt", parse_iommu),
        acs=parsed("lspci.txt", parse_acs),
        virtual=parsed("machine.txt", parse_virtual),
        locked_memory=parsed("limits.txt", parse_locked_memory),
        may_lock=parsed("status.txt", parse_may_lock),
        interfaces=parsed("interfaces.txt", parse_interfaces),
        settings=parsed("variables.txt", lambda text: read_settings(assignments(text))),
        log=parsed("nccl.log", lambda text: parse_nccl_log(text, gpus or (), host)),
        unknown=unknown,
    )
