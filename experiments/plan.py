"""Plans an experiment without a GPU: python -m experiments.plan experiments/hunyuan_large.py --chip h20 --nodes 64

Compiles the experiment's own step for the chip and reports memory, arithmetic, exchanges and the predicted time.

Exit codes: 0 planned, and it fits · 1 XLA or the disk refused · 2 a mistake in arguments or settings · 3 planned, and
it does not fit.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from experiments.experiment import Experiment
from experiments.overrides import parse_changes
from experiments.run import definitions, experiment_in
from experiments.summary import escaped
from moe.model.config import ConfigError
from moe.planner.chips import CHIPS, Chip, ChipError, chip_named
from moe.planner.compile import CompileError
from moe.planner.job import Job, Kind
from moe.planner.kernels import CountError
from moe.planner.plan import Plan, make_plan
from moe.planner.plan_json import plan_values
from moe.planner.plan_report import pictures_of, report_of
from moe.planner.report_html import html
from moe.planner.report_text import print_report
from moe.planner.target import TargetError
from moe.train.run_folder import write_atomically
from parallel.layout import LayoutError
from parallel.mesh import MeshError
from parallel.network.cluster import Cluster, ClusterError, Fabric
from parallel.network.links import LinksError, read_links

MISTAKES = (ConfigError, MeshError, LayoutError, ChipError, ClusterError, LinksError)
FAILURES = (CompileError, CountError, OSError)
DOES_NOT_FIT = 3


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = parser().parse_args(arguments)
    console, errors = consoles()
    try:
        defined, experiment = asked(options)
        chip = asked_chip(options.chip, defined)
        cluster = asked_cluster(options, defined, experiment, chip)
        plan = planned(options, job_of(experiment, options.kind), chip, cluster, errors)
        report = report_of(plan, experiment.name)
        print_report(report, console)
        if options.json is not None:
            write_atomically(options.json, json.dumps(plan_values(plan, experiment.name), indent=1))
        if options.html is not None:
            write_atomically(options.html, html(report, pictures_of(plan)))
    except MISTAKES as error:
        errors.print(f"[bold red]error:[/] {escaped(error)}")
        return 2
    except FAILURES as error:
        errors.print(f"[bold red]failed:[/] {escaped(error)}")
        return 1
    return 0 if plan.fits else DOES_NOT_FIT


def consoles() -> tuple[Console, Console]:
    """For results, and for errors and what goes on. Where the output is no terminal, rich would break lines at 80."""
    return (
        Console(highlight=False, width=None if sys.stdout.isatty() else 160),
        Console(stderr=True, highlight=False, soft_wrap=True),
    )


def asked(options: argparse.Namespace) -> tuple[Mapping[str, Any], Experiment]:
    """What the experiment's file defines, and the experiment with the arguments' changes.

    Raises:
        ConfigError: there is none, or a change does not fit.
    """
    path = Path(options.experiment)
    defined = definitions(path)
    as_written = experiment_in(defined, path)
    return defined, as_written.vary(parse_changes(as_written, options.set))


def asked_chip(name: str | None, defined: Mapping[str, Any]) -> Chip:
    """The chip of this name, where the file's own goes before the known ones; without a name the file's own.

    Raises:
        ChipError: there is none.
    """
    own = defined.get("chip")
    if own is not None and not isinstance(own, Chip):
        raise ChipError(f"chip={own!r} in the experiment's file: give a Chip (moe/planner/chips.py)")
    if own is not None and name in (None, own.name):
        return own
    if name is None:
        raise ChipError(f"no chip: give --chip, one of {', '.join(CHIPS)}, or define `chip = Chip(...)` in the file")
    return chip_named(name)


def asked_cluster(
    options: argparse.Namespace, defined: Mapping[str, Any], experiment: Experiment, chip: Chip
) -> Cluster:
    """The file's own cluster, or the usual one for the chip, with the arguments' changes. Where nothing says how many
    nodes there are, as many as the mesh fills.

    Raises:
        ClusterError: it is none.
    """
    own = defined.get("cluster", Cluster(gpu_link=chip.link))
    if not isinstance(own, Cluster):
        raise ClusterError(f"cluster={own!r} in the experiment's file: give a Cluster (parallel/network/cluster.py)")
    given = {
        "nodes": options.nodes,
        "gpus_per_node": options.gpus_per_node,
        "nics_per_node": options.nics,
        "nic_rate": options.nic_rate,
        "fabric": options.fabric,
        "gpudirect": False if options.no_gpudirect else None,
    }
    if "cluster" not in defined:
        devices = experiment.mesh.num_devices
        if options.gpus_per_node is None:
            given["gpus_per_node"] = min(own.gpus_per_node, devices)
        if options.nodes is None:
            given["nodes"] = max(1, devices // max(1, given["gpus_per_node"]))
    return replace(own, **{name: value for name, value in given.items() if value is not None})


def job_of(experiment: Experiment, kind: Kind) -> Job:
    """The step of `experiment` to plan. Serving takes its batch at once, and weights with which adapters are merged."""
    training = experiment.training
    return Job(
        kind,
        experiment.model,
        experiment.data.batch_size,
        experiment.data.sequence_length,
        precision=experiment.precision,
        execution=experiment.execution,
        optimizer=experiment.optimizer,
        mesh=experiment.mesh,
        layout=experiment.layout,
        microbatches=training.microbatches if kind == "train" else 1,
        virtual_stages=training.virtual_stages if kind == "train" else 1,
        loss_chunk=training.loss_chunk,
        steps=training.steps,
        lora=experiment.lora if kind == "train" else None,
    )


def planned(options: argparse.Namespace, job: Job, chip: Chip, cluster: Cluster, told: Console) -> Plan:
    """Compiled where that can be done; else estimated, which `told` says."""
    links = None if options.links is None else read_links(options.links)

    def tell(text: str) -> None:
        told.print(f"[dim]{escaped(text)}[/]")

    if not options.estimate:
        try:
            return make_plan(job, chip, cluster, links=links, report=tell)
        except TargetError as error:
            told.print(f"[yellow]{escaped(error)}; what follows is estimated[/]")
    return make_plan(job, chip, cluster, links=links, estimated=True, report=tell)


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="python -m experiments.plan",
        description="Compiles an experiment's own step for a chip, without a GPU, and reports whether it fits, what it "
        "does and how long it will take.",
        epilog="examples:\n"
        "  python -m experiments.plan experiments/hunyuan_large.py --chip h20 --nodes 64 --html plan.html\n"
        "  python -m experiments.plan experiments/hunyuan_large.py --chip h100 --set execution.remat=matmuls\n"
        "  python -m experiments.plan experiments/tiny.py --chip a100 --kind decode --json plan.json\n"
        "  python -m experiments.plan experiments/tiny.py --chip l20 --estimate\n\n"
        "exit codes: 0 planned and it fits, 1 XLA or the disk refused, 2 a mistake in arguments or settings, 3 planned "
        "and it does not fit\n"
        "`make plan-setup` installs what compiling for GPUs needs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_experiment(command)
    command.add_argument("--chip", metavar="NAME", help=f"one of {', '.join(CHIPS)}, or the file's own `chip`")
    add_kind(command)
    add_cluster(command)
    command.add_argument("--json", type=Path, metavar="FILE", help="write all figures (moe/planner/plan_json.py)")
    command.add_argument("--html", type=Path, metavar="FILE", help="write the report as one page with pictures")
    return command


def add_experiment(command: argparse.ArgumentParser) -> None:
    command.add_argument("experiment", help="a Python file that defines `experiment = Experiment(...)`")
    command.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE",
        help="change a setting by its dotted path; may be given several times (experiments.run --show lists all)",
    )  # fmt: skip
    command.add_argument(
        "--estimate", action="store_true", help="from the settings alone, without compiling: seconds, and less exact"
    )


def add_kind(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--kind", choices=get_args(Kind), default="train", help="which step: by default a whole one of training"
    )


def add_cluster(command: argparse.ArgumentParser) -> None:
    command.add_argument("--nodes", type=int, metavar="N", help="by default as many as the mesh fills")
    command.add_argument("--gpus-per-node", type=int, metavar="N", help="by default 8")
    command.add_argument("--nics", type=int, metavar="N", help="network cards of a node; by default 8")
    command.add_argument("--nic-rate", type=float, metavar="GBPS", help="Gb/s of one card; by default 400")
    command.add_argument("--fabric", choices=get_args(Fabric), help="by default infiniband")
    command.add_argument("--no-gpudirect", action="store_true", help="stage through the host: no GPUDirect RDMA")
    command.add_argument("--links", type=Path, metavar="FILE", help="measured by `python -m parallel.network bench`")


if __name__ == "__main__":
    sys.exit(main())
