"""The least hardware for Hunyuan-Large, proven by compiling each step for it, beside what Tencent's own table asks for.

    python -m experiments.minimum_hardware                       # every row: a minute or two each, kept in .cache/plan
    python -m experiments.minimum_hardware --only serve --json minimum.json

A row fits where all its steps do: what XLA allocates on a GPU, in the memory that is left beside CUDA and NCCL. What
waits on the hosts is told a node; it must be pinned there.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.hunyuan_large import experiment
from experiments.hunyuan_quantized import lora_on_four, served_in_4_bits, served_in_8_bits
from moe.model.execution import Execution
from moe.model.precision import Precision
from moe.model.presets import HUNYUAN_LARGE
from moe.planner.chips import H20, Chip
from moe.planner.compile import CompileError, Facts, compile_job
from moe.planner.job import Job
from moe.planner.target import TargetError
from moe.train.optimizer import OptimizerConfig
from moe.train.run_folder import write_atomically
from parallel.layout import LayoutConfig
from parallel.mesh import MeshConfig
from parallel.network.cluster import Cluster

GB = 1e9
ROOM = 6e9
"""Bytes of a GPU that a program is not given: for CUDA's context, NCCL's buffers and gaps between arrays."""


@dataclass(frozen=True)
class Row:
    """
    work: what is to be done. asked: GPUs that Tencent's table asks for it (README of Tencent-Hunyuan-Large); None where
        it says nothing.
    steps: all of which must fit.
    """

    work: str
    asked: int | None
    cluster: Cluster
    steps: tuple[Job, ...]

    @property
    def gpus(self) -> int:
        return self.cluster.nodes * self.cluster.gpus_per_node


FINE_TUNE = Job(
    "train",
    # Recycle routing, as in training (arXiv 2411.02265 §2.1).
    experiment.model,
    batch_size=16,
    sequence_length=2048,
    precision=Precision(parameters="bfloat16", gradients="bfloat16"),
    execution=Execution(remat="full"),
    optimizer=OptimizerConfig(learning_rate=2e-5, schedule="linear", warmup_steps=10, master_weights=True),
    mesh=MeshConfig(expert=16),
    layout=LayoutConfig(optimizer_states="host", gradients="host"),
)
"""Each GPU has one of the sixteen experts, and one sequence. Float32 master weights, both moments and the gradients
wait on the hosts: 14 bytes a parameter."""

SERVE = Job(
    "decode",
    HUNYUAN_LARGE,
    batch_size=5,
    sequence_length=32_768,
    precision=Precision(parameters="bfloat16"),
    mesh=MeshConfig(data=5, tensor=2),
    layout=LayoutConfig(experts=()),
)
"""Five texts, one for each pair of GPUs, which splits the width of all experts. The width of the model, 6400, divides
by no other number of GPUs between 8, where the parameters alone fill the memory, and 16."""

ROWS = (
    Row("full fine-tuning, sequence 2048", 32, Cluster(nodes=2), (FINE_TUNE,)),
    Row(
        "serving in bfloat16, context 32K", 16, Cluster(nodes=2, gpus_per_node=5, nics_per_node=5, prefetch=False),
        (SERVE, replace(SERVE, kind="prefill")),
    ),
    Row("LoRA on a 4-bit base, sequence 2048", 8, Cluster(gpus_per_node=4, nics_per_node=4), (lora_on_four(),)),
    Row(
        "serving in int8, context 32K", 8, Cluster(gpus_per_node=5, nics_per_node=5),
        (served_in_8_bits("decode"), served_in_8_bits("prefill")),
    ),
    Row(
        "serving in int4, context 32K", None, Cluster(gpus_per_node=4, nics_per_node=4),
        (served_in_4_bits("decode"), served_in_4_bits("prefill")),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Of one step: what XLA said, or why there is no program."""

    row: Row
    step: Job
    facts: Facts | None
    refused: str = ""

    def missing(self, chip: Chip) -> float | None:
        """Bytes that a GPU lacks; below 0, bytes that it has left."""
        return None if self.facts is None else self.facts.allocated - (chip.memory - ROOM)

    def verdict(self, chip: Chip) -> str:
        missing = self.missing(chip)
        if missing is None:
            return self.refused
        return f"no, by {missing / GB:.1f}" if missing > 0 else f"yes, {-missing / GB:.1f} left"

    @property
    def host(self) -> float:
        """Bytes of a node's host."""
        return 0 if self.facts is None else self.facts.host * self.row.cluster.gpus_per_node


def find(rows: tuple[Row, ...], chip: Chip, console: Console) -> list[Found]:
    """Compiles every step, or finds it compiled."""
    found = []
    for row in rows:
        for step in row.steps:
            try:
                compiled = compile_job(step, chip, row.cluster, report=console.print)
                found.append(Found(row, step, compiled.facts))
            except CompileError as error:
                found.append(Found(row, step, None, str(error)))
    return found


def table(found: list[Found], chip: Chip) -> Table:
    usable = (chip.memory - ROOM) / GB
    grid = Table(title=f"Hunyuan-Large, 389B, on {chip.device}; GB = 1e9 bytes, {usable:.1f} usable", box=None)
    grid.add_column("work")
    grid.add_column("step")
    for heading in ("Tencent's GPUs", "GPUs", "mesh", "GB a GPU", "GB of a host", "fits"):
        grid.add_column(heading, justify="right")
    for each in found:
        facts, row = each.facts, each.row
        allocated = "" if facts is None else f"{facts.allocated / GB:.1f}"
        cells = (
            "–" if row.asked is None else str(row.asked),
            str(row.gpus),
            each.step.mesh.text,
            allocated,
            f"{each.host / GB:,.0f}",
            each.verdict(chip),
        )
        grid.add_row(row.work, each.step.kind, *cells)
    return grid


def values(found: list[Found], chip: Chip) -> list[dict]:
    """The table for programs."""
    return [
        {
            "work": each.row.work,
            "step": each.step.kind,
            "asked": each.row.asked,
            "gpus": each.row.gpus,
            "usable": chip.memory - ROOM,
            "host_of_node": each.host,
            "facts": None if each.facts is None else asdict(each.facts) | {"allocated": each.facts.allocated},
            "missing": each.missing(chip),
            "refused": each.refused,
        }
        for each in found
    ]


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 where all fits, 3 where something does not, 1 where nothing can be compiled here."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.minimum_hardware", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", default="", metavar="WORD", help="rows whose work has this word")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the figures")
    options = parser.parse_args(arguments)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        found = find(tuple(row for row in ROWS if options.only in row.work), H20, errors)
    except TargetError as error:
        errors.print(f"[bold red]failed:[/] {error}")
        return 1
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table(found, H20))
    if options.json is not None:
        write_atomically(options.json, json.dumps(values(found, H20), indent=1))
    return 0 if all((missing := each.missing(H20)) is not None and missing <= 0 for each in found) else 3


if __name__ == "__main__":
    raise SystemExit(main())
