"""How the processes of one run find each other, how they begin, and how one of them ends.

A process learns of the others from, in this order:

    flags           --coordinator, --processes and --process of a command
    variables       LEVERAGE_COORDINATOR, LEVERAGE_PROCESSES and LEVERAGE_PROCESS, which experiments.launch sets; in an
                    indexed Kubernetes Job the last one is JOB_COMPLETION_INDEX
    Slurm           SLURM_STEP_NUM_TASKS, SLURM_PROCID and SLURM_STEP_NODELIST, which srun sets; process 0 runs on the
                    first machine of the list, and LEVERAGE_COORDINATOR says so where its name does not lead there

and is alone where there is none of these. What they do together later on stands in parallel/together.py.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import jax

HEARTBEAT_SECONDS = 30
"""A process that is silent for so long is taken for dead, and the runtime ends the others."""
ARRIVAL_SECONDS = 300
"""All processes have to be there so long after the first."""
LOST = 3
"""Exit code of a process that ends because another one is gone."""
STOPPED = (0, 130, 143)
"""Exit codes of a process that ended as it should: done, or stopped by SIGINT or SIGTERM after saving."""

COORDINATOR, COUNT, INDEX, DEVICES = (
    "LEVERAGE_COORDINATOR",
    "LEVERAGE_PROCESSES",
    "LEVERAGE_PROCESS",
    "LEVERAGE_DEVICES",
)
_SLURM_PORTS = range(20000, 30000)


class DistributedError(RuntimeError):
    """Processes that cannot find each other, or do not fit together: names the variable, the value and the remedy."""


@dataclass(frozen=True)
class Processes:
    """
    coordinator: "host:port" at which process 0 listens; empty for one process.
    count: of processes. index: of this one, from 0.
    devices: of this process where the platform is CPU, as virtual ones; None for its share of the mesh.
    """

    coordinator: str = ""
    count: int = 1
    index: int = 0
    devices: int | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise DistributedError(f"{self.count} processes: give at least 1")
        if not 0 <= self.index < self.count:
            raise DistributedError(
                f"process {self.index} of {self.count} processes: counted from 0, so give 0 to {self.count - 1}"
            )
        if self.devices is not None and self.devices < 1:
            raise DistributedError(f"{DEVICES}={self.devices}: give each process at least 1 device")
        if self.count > 1 and not re.fullmatch(r"\S+:\d+", self.coordinator):
            raise DistributedError(
                f"coordinator {self.coordinator!r}: give the machine of process 0 and a free port there, such as "
                "node-0:12345"
            )


def detect(
    environ: Mapping[str, str],
    *,
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
) -> Processes:
    """The processes of this run: from the arguments if any is given, else from the environment's variables.

    Raises:
        DistributedError: something is missing or no number, or the index is none of the count.
    """
    flags = {"--coordinator": coordinator, "--processes": count, "--process": index}
    missing = [name for name, value in flags.items() if value is None]
    devices = _number(environ, DEVICES) if environ.get(DEVICES) else None
    if count is not None and index is not None and coordinator is not None:
        return Processes(coordinator, count, index, devices)
    if len(missing) < len(flags):
        raise DistributedError(f"without {' and '.join(missing)}: give all of {', '.join(flags)}, or none of them")
    if environ.get(COUNT):
        return _from_variables(environ, devices)
    if environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _from_slurm(environ, devices)
    return Processes(devices=devices)


def _from_variables(environ: Mapping[str, str], devices: int | None) -> Processes:
    count = _number(environ, COUNT)
    if count == 1:
        return Processes(devices=devices)
    by = INDEX if environ.get(INDEX) else "JOB_COMPLETION_INDEX"
    if not environ.get(by):
        raise DistributedError(
            f"{COUNT}={count} without {INDEX}: set it to this process's number, 0 to {count - 1}, or start the "
            "processes as an indexed Kubernetes Job, which sets JOB_COMPLETION_INDEX"
        )
    if not environ.get(COORDINATOR):
        raise DistributedError(
            f"{COUNT}={count} without {COORDINATOR}: set it to the machine of process 0 and a free port there, such as "
            "node-0:12345"
        )
    return Processes(environ[COORDINATOR], count, _number(environ, by), devices)


def _from_slurm(environ: Mapping[str, str], devices: int | None) -> Processes:
    count, index = _number(environ, "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_PROCID")
    if environ.get(COORDINATOR):
        return Processes(environ[COORDINATOR], count, index, devices)
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise DistributedError(
            f"SLURM_STEP_NUM_TASKS={count} without SLURM_STEP_NODELIST: start the processes with srun, or set "
            f"{COORDINATOR} to the machine of process 0 and a free port there"
        )
    # Jobs and steps that share a machine differ in one of the two numbers, and so in the port.
    number = _number(environ, "SLURM_JOB_ID") + 101 * int(environ.get("SLURM_STEP_ID", "0"))
    port = _SLURM_PORTS[number % len(_SLURM_PORTS)]
    return Processes(f"{node_names(nodes)[0]}:{port}", count, index, devices)


def node_names(text: str) -> list[str]:
    """The machines of a Slurm node list: "a[01-03,07],b2" is a01, a02, a03, a07, b2.

    Raises:
        DistributedError: a bracket or a range that has no end.
    """
    names: list[str] = []
    # Commas between nodes, and not those within brackets.
    for part in re.split(r",(?![^\[]*\])", text):
        if not re.fullmatch(r"[^\[\],\s]+|[^\[\],\s]*(\[[\d,-]+\][^\[\],\s]*)+", part):
            raise DistributedError(f"node list {text!r}: cannot read {part!r}; expected a form such as a[01-03,07],b2")
        found = [""]
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", part):
            choices = [literal] if literal else [number for span in ranges.split(",") for number in _span(text, span)]
            found = [name + choice for name in found for choice in choices]
        names += found
    return names


def _span(text: str, span: str) -> list[str]:
    first, _, last = span.partition("-")
    last = last or first
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) and span.count("-") <= 1):
        raise DistributedError(f"node list {text!r}: cannot read the range {span!r}; expected a form such as 01-03")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdecimal():
        raise DistributedError(f"{name}={text!r}: give a whole number")
    return int(text)


def initialize(processes: Processes, mesh_devices: int) -> None:
    """Connects this process with the others, and waits for them. Call it before JAX has started.

    On CPU each process gets its `devices` as virtual ones, and collectives go over Gloo; GPUs use NCCL, and a process
    sees all GPUs that its machine shows it. One process alone needs nothing.

    Args:
        mesh_devices: that the run's mesh needs, over all processes.

    Raises:
        DistributedError: this process cannot join the others. One that waits for them in vain for `ARRIVAL_SECONDS`
            is aborted by the runtime, which experiments.launch puts into words.
    """
    if processes.count == 1:
        return
    jax.config.update("jax_num_cpu_devices", processes.devices or max(1, mesh_devices // processes.count))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    host = processes.coordinator.rpartition(":")[0]
    try:
        jax.distributed.initialize(
            processes.coordinator,
            processes.count,
            processes.index,
            cluster_detection_method="deactivate",
            initialization_timeout=ARRIVAL_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            # Processes of one machine need not be reachable from another.
            coordinator_bind_address=processes.coordinator if host in ("127.0.0.1", "localhost") else None,
        )
    except RuntimeError as error:
        told = str(error).strip().splitlines()[0]
        raise DistributedError(
            f"process {processes.index} of {processes.count} cannot join the others at {processes.coordinator} ({told})"
        ) from error


def leave(main: Callable[[], int]) -> NoReturn:
    """Runs a command and ends the process with its exit code.

    Where JAX connects several processes, its own exit waits for all of them. So a process that failed, whose others
    may wait for it in turn, ends without.
    """
    try:
        code = main()
    except BaseException as error:
        if not jax.distributed.is_initialized() or isinstance(error, SystemExit):
            raise
        traceback.print_exc()
        _exit_at_once(130 if isinstance(error, KeyboardInterrupt) else 1)
    if code not in STOPPED and jax.distributed.is_initialized():
        _exit_at_once(code)
    sys.exit(code)


def _exit_at_once(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
