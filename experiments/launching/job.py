"""What a job file says, whichever system it is for: how many machines, their devices, and the command."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from moe.model.config import ConfigError
from parallel.distributed import DEVICES
from parallel.mesh import MeshConfig


@dataclass(frozen=True)
class Job:
    """
    name: of the job.
    nodes: machines.
    processes_per_node: of each machine, which share its devices evenly.
    gpus_per_node: of each machine; 0 for CPU.
    cpu_devices: virtual devices of each process where there are no GPUs.
    restarts: after failures; each goes on from the last checkpoint.
    environment: variables for every process, for NCCL's settings for example.
    run: the arguments of experiments.run, the experiment's file first.

    Raises ConfigError where a number is too small, or the devices do not divide.
    """

    name: str
    run: Sequence[str]
    nodes: int = 1
    processes_per_node: int = 1
    gpus_per_node: int = 8
    cpu_devices: int = 0
    restarts: int = 3
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = {"nodes": 1, "processes_per_node": 1, "gpus_per_node": 0, "cpu_devices": 0, "restarts": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{_flag(name)} {getattr(self, name)}: give at least {bound}")
        if self.cpu_devices and self.gpus_per_node:
            raise ConfigError(f"--cpu-devices {self.cpu_devices} is for jobs without GPUs: give --gpus-per-node 0 too")
        if not self.cpu_devices and not self.gpus_per_node:
            raise ConfigError("--gpus-per-node 0: give --cpu-devices, the virtual devices of each process")
        if self.gpus_per_node % self.processes_per_node:
            raise ConfigError(
                f"--gpus-per-node {self.gpus_per_node} does not divide over --processes-per-node "
                f"{self.processes_per_node}: each process takes as many"
            )

    @property
    def processes(self) -> int:
        return self.nodes * self.processes_per_node

    @property
    def devices(self) -> int:
        """Over all machines."""
        return self.nodes * (self.gpus_per_node or self.processes_per_node * self.cpu_devices)

    @property
    def variables(self) -> dict[str, str]:
        """For every process: those of the devices, and what the user gave."""
        cpu = {"JAX_PLATFORMS": "cpu", DEVICES: str(self.cpu_devices)} if self.cpu_devices else {}
        return {**cpu, **self.environment}

    def check(self, mesh: MeshConfig) -> None:
        """
        Raises:
            ConfigError: the mesh has more devices than the machines, or fewer.
        """
        if mesh.num_devices != self.devices:
            per_node = (
                f"--gpus-per-node {self.gpus_per_node}"
                if self.gpus_per_node
                else f"--processes-per-node {self.processes_per_node} x --cpu-devices {self.cpu_devices}"
            )
            raise ConfigError(
                f"--nodes {self.nodes} x {per_node} are {self.devices} devices, and the mesh {mesh.text} has "
                f"{mesh.num_devices}: change one, with --set mesh.data=... behind the experiment's file for example"
            )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
