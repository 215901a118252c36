"""The GPU network, looked after: python -m parallel.network --help"""

import argparse
import os
import sys
from pathlib import Path
from typing import get_args

from rich.console import Console

from parallel.distributed import DistributedError, detect, initialize, leave
from parallel.mesh import MeshConfig, MeshError, parse_mesh
from parallel.network.bench import measure_links, summarize
from parallel.network.bench_report import BenchProgress, parse_sizes, print_links, print_measurements
from parallel.network.cluster import Cluster, ClusterError, Fabric
from parallel.network.collect import collect
from parallel.network.collectives import COLLECTIVES
from parallel.network.diagnose import diagnose
from parallel.network.environment import shell
from parallel.network.links import write_links
from parallel.network.recording import (
    Recording,
    RecordingError,
    check_new_folder,
    read_recording,
    write_recording,
)
from parallel.network.report import as_json, print_diagnosis

_DOCTOR_CODES = {"yes": 0, "partly": 1, "no": 1, "unknown": 4}
_NO_GPU = 3
_DOCTOR = """\
Tells whether GPUDirect RDMA will be used on this node, and if not, why not and what to do: network cards that read and
write the GPUs' memory themselves, with no copy through the host. It reads nvidia-smi, /sys, /proc and NCCL's variables,
and where there are two GPUs runs a small all-reduce for NCCL's own log. Nothing is changed.
"""
_DOCTOR_EPILOG = """\
examples:
  python -m parallel.network doctor
  python -m parallel.network doctor --record node17           # keep what was read, to send it to someone
  python -m parallel.network doctor --from node17 --json
  python -m parallel.network doctor --nccl-log job.log        # proof from a run of your own, with NCCL_DEBUG=INFO

exit codes: 0 it will be used for all GPUs · 1 not, or only for some · 2 a mistake in arguments or recording ·
3 there is no GPU here · 4 it cannot be told
"""

_ENV = """\
Prints shell lines that set NCCL's variables and XLA's flags for a cluster, each with its reason.
"""
_ENV_EPILOG = """\
examples:
  eval "$(python -m parallel.network env --nodes 64)"
  python -m parallel.network env --nodes 4 --fabric roce --nics 4 --rate 200 --interface bond0
  python -m parallel.network env --nodes 2 --fabric ethernet --no-gpudirect --nics 1 --rate 25 --pcie

exit codes: 0 printed · 2 a mistake in the arguments
"""

_BENCH = """\
Times all-to-all, all-gather, reduce-scatter and all-reduce over the axes of a mesh, against the size of the message,
and fits time = latency + bytes sent / bandwidth for links inside a node and across nodes. Bytes sent by each of P
devices for a message of S bytes: S (P-1)/P, and twice that for all-reduce.
"""
_BENCH_EPILOG = """\
examples:
  python -m parallel.network bench --mesh data=2,expert=4                      # 8 GPUs, or virtual CPU devices
  python -m parallel.network bench --mesh expert=8 --sizes 64K,1M,16M,256M --output links.json
  for each process I of 2, on its own node:
  python -m parallel.network bench --mesh data=2,expert=8 --coordinator node0:1234 --processes 2 --process I

exit codes: 0 measured · 1 the run failed, or some times give no fit · 2 a mistake in the arguments
"""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (RecordingError, ClusterError, MeshError, DistributedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1


def _doctor(options: argparse.Namespace) -> int:
    recording = _recording(options)
    diagnosis = diagnose(recording)
    code = _DOCTOR_CODES[diagnosis.verdict] if diagnosis.gpus else _NO_GPU
    if options.json:
        print(as_json(diagnosis, code))
    else:
        print_diagnosis(diagnosis, _console())
    return code


def _recording(options: argparse.Namespace) -> Recording:
    log = None
    if options.nccl_log is not None:
        if not options.nccl_log.is_file():
            raise RecordingError(f"--nccl-log {options.nccl_log}: no such file")
        log = options.nccl_log.read_text("utf-8", "replace")
    if options.folder is not None:
        recording = read_recording(options.folder)
        return recording if log is None else recording.with_log(log)
    if options.record is not None:
        check_new_folder(options.record)
    print("reading the node; a small all-reduce may take a minute", file=sys.stderr)
    recording = collect(log)
    if options.record is not None:
        write_recording(recording, options.record)
        print(f"recorded in {options.record}", file=sys.stderr)
    return recording


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m parallel.network",
        description="The GPU network: is GPUDirect RDMA used, which settings use it well, how fast is it.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_doctor(commands)
    _add_env(commands)
    _add_bench(commands)
    return parser


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "doctor", help="whether GPUDirect RDMA will be used on this node, and why not", description=_DOCTOR,
        epilog=_DOCTOR_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    source = command.add_mutually_exclusive_group()
    source.add_argument("--from", dest="folder", type=Path, metavar="FOLDER", help="judge a recording, not this node")
    source.add_argument("--record", type=Path, metavar="FOLDER", help="also keep what was read in a new folder")
    command.add_argument("--nccl-log", type=Path, metavar="FILE", help="what NCCL printed in a run of your own")
    command.add_argument("--json", action="store_true", help="the answer as JSON, for programs")
    command.set_defaults(run=_doctor)


def _console() -> Console:
    # Where the output is no terminal, rich would break lines at 80 columns.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def _env(options: argparse.Namespace) -> int:
    print(
        shell(
            Cluster(
                nodes=options.nodes,
                gpus_per_node=options.gpus,
                nics_per_node=options.nics if options.nics is not None else options.gpus,
                nic_rate=options.rate,
                fabric=options.fabric,
                gpudirect=not options.no_gpudirect,
                gpu_link="pcie" if options.pcie else "nvlink",
                nic_names=tuple(filter(None, options.cards.split(","))),
                interface=options.interface,
                prefetch=not options.no_prefetch,
            )
        ),
        end="",
    )
    return 0


def _add_env(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "env", help="NCCL's variables and XLA's flags for a cluster, each with its reason", description=_ENV,
        epilog=_ENV_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.add_argument("--nodes", type=int, required=True, metavar="N")
    command.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs of a node (8)")
    command.add_argument("--nics", type=int, metavar="N", help="network cards of a node for the GPUs (as many as GPUs)")
    command.add_argument("--rate", type=float, default=400, metavar="GBITS", help="Gb/s of a card per direction (400)")
    command.add_argument("--fabric", choices=get_args(Fabric), default="infiniband", help="(infiniband)")
    command.add_argument("--no-gpudirect", action="store_true", help="stage through the host; needed for ethernet")
    command.add_argument("--pcie", action="store_true", help="GPUs of a node are joined by PCIe, not NVLink")
    command.add_argument("--cards", default="", metavar="NAME,…", help="the GPUs' cards, such as mlx5_0,mlx5_1")
    command.add_argument("--interface", default="", metavar="NAME", help="over which processes find each other: eth0")
    command.add_argument("--no-prefetch", action="store_true", help="gather one layer at a time: saves GPU memory")
    command.set_defaults(run=_env)


def _bench(options: argparse.Namespace) -> int:
    try:
        config, sizes = parse_mesh(options.mesh), parse_sizes(options.sizes)
    except ValueError as error:
        raise MeshError(str(error)) from error
    axes = _axes(config, options.axis)
    processes = detect(os.environ, coordinator=options.coordinator, count=options.processes, index=options.process)
    if config.num_devices % processes.count:
        raise MeshError(f"{config.num_devices} devices do not divide over {processes.count} processes")
    initialize(processes, config.num_devices)
    silent = processes.index > 0
    with BenchProgress(len(axes) * len(COLLECTIVES) * len(sizes), silent) as progress:
        measured, hosts = measure_links(config, axes, sizes, options.repeats, progress)
    if silent:
        return 0
    print_measurements(measured, _console())
    links, failures = summarize(config, measured, hosts)
    print_links(links, _console())
    if options.output is not None:
        write_links(links, options.output)
        print(f"wrote {options.output}")
    for failure in failures:
        print(f"no fit: {failure}; the measurements and the other fits are kept", file=sys.stderr)
    return 1 if failures else 0


def _axes(config: MeshConfig, wanted: list[str] | None) -> list[str]:
    several = [axis for axis, size in config.sizes.items() if size > 1]
    for axis in wanted or ():
        if axis not in several:
            raise MeshError(f"--axis {axis}: give an axis of more than one device ({', '.join(several) or 'none has'})")
    if not several:
        raise MeshError("--mesh: no axis has more than one device; give, for example, data=2,expert=4")
    return wanted or several


def _add_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "bench", help="times of collectives, and latency and bandwidth fitted to them", description=_BENCH,
        epilog=_BENCH_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.add_argument("--mesh", required=True, metavar="AXIS=N,…", help="devices along each axis: data=2,expert=4")
    command.add_argument("--axis", action="append", metavar="AXIS", help="only this one; may be given several times")
    command.add_argument("--sizes", default="16K,64K,256K,1M,4M,16M", metavar="SIZE,…", help="(%(default)s)")
    command.add_argument(
        "--repeats", type=_positive, default=7, metavar="N", help="times of which the median counts (7)"
    )
    command.add_argument("--output", type=Path, metavar="FILE", help="where to write the links, as JSON for planning")
    command.add_argument("--coordinator", metavar="HOST:PORT", help="of several processes: where process 0 listens")
    command.add_argument("--processes", type=_positive, metavar="N", help="how many there are")
    command.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    command.set_defaults(run=_bench)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


if __name__ == "__main__":
    leave(main)
