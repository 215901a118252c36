"""Starts an experiment in several processes: here, or as a job file for Slurm or Kubernetes.

    python -m experiments.launch local --processes 4 --devices 2 experiments/tiny.py [arguments of experiments.run]
    python -m experiments.launch slurm --nodes 64 --output job.sbatch experiments/hunyuan_large.py
    python -m experiments.launch kubernetes --nodes 64 --image IMAGE --claim CLAIM --output job.json FILE.py

What each process writes is kept in RUN/logs. Exit codes of `local` are those of experiments.run.
"""

import argparse
import os
import shlex
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments import run
from experiments.launching import kubernetes, slurm
from experiments.launching.job import Job
from experiments.launching.supervise import Ended, Member, supervise
from moe.model.config import ConfigError
from moe.train.run_folder import LOGS, refuse_foreign
from parallel.distributed import COORDINATOR, COUNT, INDEX, detect

_MISTAKE = 2


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given)
    try:
        return options.carry_out(options, shlex.join(["python", "-m", "experiments.launch", *given]))
    except run.MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        return _MISTAKE
    except OSError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1


def _local(options: argparse.Namespace, command: str) -> int:
    """All processes on this machine, over virtual CPU devices."""
    if min(options.processes, options.devices) < 1:
        raise ConfigError(f"--processes {options.processes} --devices {options.devices}: give at least 1 of each")
    job = Job("local", _run(options), 1, options.processes, 0, options.devices, options.restarts)
    experiment, folder = run.asked(run.parser().parse_args(job.run))
    if experiment.mesh.num_devices != job.devices:
        raise ConfigError(
            f"--processes {options.processes} x --devices {options.devices} are {job.devices} devices, and the mesh "
            f"{experiment.mesh.text} has {experiment.mesh.num_devices}: change one, with --set mesh.data=... behind "
            "the experiment's file for example"
        )

    def members() -> list[Member]:
        coordinator = f"127.0.0.1:{_free_port()}"
        common = {**os.environ, **job.variables, COORDINATOR: coordinator, COUNT: str(job.processes)}
        return [Member(i, _command(job.run), {**common, INDEX: str(i)}) for i in range(job.processes)]

    return _watch(members, folder, job.processes, job.restarts, command)


def _node(options: argparse.Namespace, command: str) -> int:
    """This machine's process of a job; Slurm or Kubernetes says which one it is, and starts it again."""
    arguments = _run(options)
    _, folder = run.asked(run.parser().parse_args(arguments))
    processes = detect(os.environ)
    member = Member(processes.index, _command(arguments), os.environ)
    return _watch(lambda: [member], folder, processes.count, 0, "")


def _slurm(options: argparse.Namespace, command: str) -> int:
    job = _job(options)
    text = slurm.job_file(job, command=command, python=options.python, options=_pairs("--sbatch", options.sbatch))
    return _written(options.output, text, "sbatch")


def _kubernetes(options: argparse.Namespace, command: str) -> int:
    job = _job(options)
    resources = _pairs("--resource", options.resource)
    text = kubernetes.job_file(
        job, image=options.image, claim=options.claim, python=options.python, resources=resources
    )
    return _written(options.output, text, "kubectl apply -f")


def _watch(members: Callable[[], list[Member]], folder: Path, count: int, restarts: int, again: str) -> int:
    """Supervises one start after the other, until one ends as it should or none is left.

    Args:
        members: makes those of one start; they are all or some of the run's `count` processes.
        again: the command that goes on; empty where someone else starts the processes again.
    """
    refuse_foreign(folder)
    for attempt in range(restarts + 1):
        started = members()
        ended = supervise(started, folder / LOGS, partial(print, flush=True))
        if ended.culprit is None:
            return ended.code
        if ended.code == _MISTAKE:
            print(ended.told, file=sys.stderr)
            return ended.code
        _tell(ended, folder, count, len(started))
        if attempt == restarts or ended.signal:
            if again:
                print(f"to go on: {again}", file=sys.stderr)
            return ended.code
        print(f"restart {attempt + 1} of {restarts}", file=sys.stderr, flush=True)
    raise AssertionError("the last attempt returns")


def _tell(ended: Ended, folder: Path, count: int, here: int) -> None:
    """What happened, and what is kept."""
    if ended.told:
        print(ended.told, file=sys.stderr)
    kept = sorted(path for path in (folder / "checkpoints").glob("*") if path.name.isdecimal())
    which = f"the checkpoint of step {int(kept[-1].name)}" if kept else "no checkpoint, for none was written yet"
    others = f"; the others were ended within {ended.seconds:.1f} s" if here > 1 else ""
    print(
        f"failed: process {ended.culprit} of {count} {ended.how}{others}. Kept: {which}; what the processes wrote is "
        f"in {folder / LOGS}",
        file=sys.stderr,
        flush=True,
    )


def _job(options: argparse.Namespace) -> Job:
    """
    Raises:
        ConfigError: the mesh does not cover the job's devices, or the experiment's settings do not fit.
    """
    arguments = _run(options)
    experiment, _ = run.asked(run.parser().parse_args(arguments))
    job = Job(
        options.name or experiment.name.replace("_", "-").lower(),
        arguments,
        options.nodes,
        options.processes_per_node,
        options.gpus_per_node,
        options.cpu_devices,
        options.restarts,
        _pairs("--env", options.env),
    )
    job.check(experiment.mesh)
    return job


def _run(options: argparse.Namespace) -> list[str]:
    """The arguments of experiments.run."""
    return [options.experiment, *options.arguments]


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "experiments.run", *arguments]


def _pairs(flag: str, texts: list[str]) -> dict[str, str]:
    for text in texts:
        if not text.partition("=")[0]:
            raise ConfigError(f"{flag} {text!r}: give NAME=VALUE")
    return {name: value for name, _, value in (text.partition("=") for text in texts)}


def _written(output: str, text: str, submit: str) -> int:
    Path(output).write_text(text, "utf-8")
    print(f"wrote {output}; start it with: {submit} {output}")
    return 0


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.launch",
        description="Starts an experiment in several processes. What follows the experiment's file goes to "
        "experiments.run.",
        epilog="exit codes of local and node: those of experiments.run",
    )
    ways = parser.add_subparsers(required=True, metavar="local|slurm|kubernetes|node")

    local = _way(ways, "local", _local, "start the processes on this machine, over virtual CPU devices")
    local.add_argument("--processes", type=int, required=True, metavar="N", help="how many")
    local.add_argument("--devices", type=int, required=True, metavar="N", help="virtual CPU devices of each")
    local.add_argument(
        "--restarts", type=int, default=0, metavar="N", help="start again from the last checkpoint so often (0)"
    )
    _experiment(local)

    batch = _way(ways, "slurm", _slurm, "write a batch file for sbatch")
    _cluster(batch, python=sys.executable)
    batch.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of sbatch: --sbatch partition=h20",
    )
    _experiment(batch)

    pods = _way(ways, "kubernetes", _kubernetes, "write an indexed Job and its Service for kubectl")
    _cluster(pods, python="python3")
    pods.add_argument("--image", required=True, help="holds this project as its working directory")
    pods.add_argument("--claim", required=True, help="a PersistentVolumeClaim (ReadWriteMany) for runs and tokens")
    pods.add_argument(
        "--resource", action="append", default=[], metavar="NAME=VALUE", help="of each pod: --resource rdma/hca=8"
    )
    _experiment(pods)

    node = _way(ways, "node", _node, "within a job: start this machine's process and watch over it")
    _experiment(node)
    return parser


def _way(ways: Any, name: str, carry_out: Callable[..., int], what: str) -> argparse.ArgumentParser:
    way = ways.add_parser(name, help=what, description=what)
    way.set_defaults(carry_out=carry_out)
    return way


def _cluster(way: argparse.ArgumentParser, *, python: str) -> None:
    way.add_argument("--nodes", type=int, required=True, metavar="N", help="machines")
    way.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="of each machine (8)")
    way.add_argument(
        "--processes-per-node", type=int, default=1, metavar="N", help="of each machine, sharing its GPUs (1)"
    )
    way.add_argument(
        "--cpu-devices", type=int, default=0, metavar="N", help="virtual devices of each process, for --gpus-per-node 0"
    )
    way.add_argument("--restarts", type=int, default=3, metavar="N", help="after failures (3)")
    way.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable for every process")
    way.add_argument("--name", help="of the job; by default the experiment's")
    way.add_argument("--python", default=python, metavar="PATH", help=f"the interpreter there ({Path(python).name})")
    way.add_argument("--output", required=True, metavar="FILE", help="to write")


def _experiment(way: argparse.ArgumentParser) -> None:
    way.add_argument("experiment", help="a Python file that defines `experiment = Experiment(...)`")
    way.add_argument("arguments", nargs=argparse.REMAINDER, help="of experiments.run: --steps, --set, --run-dir, ...")


if __name__ == "__main__":
    sys.exit(main())
