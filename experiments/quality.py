"""What each way of saving bits costs in quality: one small mixture of experts, trained on the same text in every mode.

    python -m experiments.quality                                   # every mode with 3 seeds, two at a time
    python -m experiments.quality --modes float32,bfloat16 --seeds 1
    python -m experiments.quality --compile --markdown quality.md   # and each step compiled for an H20
    python -m experiments.quality --init-from runs/quality-base     # every mode goes on from the same trained weights

From scratch two runs that differ by rounding alone end a percent or more apart, since routers decide otherwise early
on; from the same trained weights a tenth of that is told apart.

Each run is an ordinary run in a folder of its own, runs/quality/MODE-SEED-…, so the command can be stopped and given
again: what is finished is not run anew. The table tells the final validation loss against float32 with the same seed.

Exit codes: 0 told · 1 a run failed, whose words are told · 2 a mistake in the arguments.
"""

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from experiments.experiment import Experiment
from experiments.overrides import settings
from experiments.plan import consoles, job_of
from experiments.quality_pictures import draw_curves, draw_quality
from experiments.quality_table import Row, markdown, row_of, table
from experiments.summary import escaped
from moe.model.config import ConfigError, ModelConfig, RopeConfig, RouterConfig
from moe.model.precision import FULL
from moe.planner.chips import H20
from moe.planner.compile import CompileError, compile_job
from moe.planner.pictures import png
from moe.planner.target import TargetError
from moe.train.data import DataConfig
from moe.train.loop import TrainingConfig
from moe.train.optimizer import OptimizerConfig
from moe.train.run_folder import write_atomically
from parallel.blocks import EIGHT_BIT
from parallel.layout import LayoutError
from parallel.network.cluster import Cluster

experiment = Experiment(
    name="quality",
    model=ModelConfig(
        vocab_size=1024,
        d_model=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        num_experts=8,
        d_expert=256,
        cla_factor=2,
        rope=RopeConfig(ntk_alpha=1000.0),
        router=RouterConfig(top_k=1),
    ),
    data=DataConfig(sequence_length=128, batch_size=16),
    training=TrainingConfig(steps=100, evaluate_every=100, checkpoint_every=100),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=10),
    precision=FULL,
)
"""Four million parameters, all in float32: the reference of every mode."""

Settings = dict[str, Any]

BF16: Settings = {"precision.compute": "bfloat16", "precision.exchange": "bfloat16"}
STORED: Settings = BF16 | {"precision.parameters": "bfloat16"}
EXPERTS_OF_4: Settings = BF16 | {"mesh.expert": 4}
SHARDS_OF_4: Settings = BF16 | {"mesh.data": 4}


def _products(format: str, scaling: str) -> Settings:
    return BF16 | {"precision.matmuls": format, "precision.scaling": scaling}


MODES: dict[str, Settings] = {
    "float32": {},
    "bfloat16": BF16,
    "bfloat16 router and softmax": BF16
    | {"precision.router": "bfloat16", "precision.softmax": "bfloat16", "execution.attention": "dense"},
    "bfloat16 gradients": BF16 | {"precision.gradients": "bfloat16"},
    "bfloat16 parameters": STORED,
    "bfloat16 parameters stochastic": STORED | {"optimizer.rounding": "stochastic"},
    "bfloat16 parameters Kahan": STORED | {"optimizer.rounding": "kahan"},
    "bfloat16 parameters master weights": STORED | {"optimizer.master_weights": True},
    **{
        f"{format} products by {scaling}": _products(format, scaling)
        for format in EIGHT_BIT
        for scaling in ("tensor", "delayed", "row", "block")
    },
    "bfloat16 exchange": EXPERTS_OF_4,
    **{f"{format} exchange": EXPERTS_OF_4 | {"precision.exchange": format} for format in EIGHT_BIT},
    **{f"{format} gathered weights": SHARDS_OF_4 | {"precision.gathered": format} for format in EIGHT_BIT},
    **{f"AdamW states {format}": BF16 | {"optimizer.states": format} for format in ("bfloat16", *EIGHT_BIT)},
    "Adafactor": BF16 | {"optimizer.kind": "adafactor"},
    "Muon": BF16 | {"optimizer.kind": "muon"},
    "fp8 kept activations": BF16 | {"execution.remat": "matmuls_fp8"},
    "gate before the down projection": BF16 | {"execution.gate": "before"},
    "fp8 everywhere": EXPERTS_OF_4
    | {
        "precision.matmuls": "fp8",
        "precision.scaling": "row",
        "precision.exchange": "fp8",
        "optimizer.states": "fp8",
        "execution.remat": "matmuls_fp8",
    },
}
"""By name, what a mode changes of `experiment`."""

CONTINUED: Settings = {"optimizer.learning_rate": 3e-4}
"""What changes of `experiment` where its weights are trained already."""

CURVES = (
    "float32",
    "bfloat16",
    "bfloat16 parameters",
    "bfloat16 parameters stochastic",
    "bfloat16 parameters Kahan",
)
"""The modes whose losses are drawn over the steps."""


@dataclass(frozen=True)
class Task:
    """One run: a mode's experiment with one seed, and the folder in which it runs."""

    mode: str
    experiment: Experiment
    changes: Settings

    @property
    def folder(self) -> Path:
        seed = self.experiment.training.seed
        words = "".join(letter if letter.isalnum() else " " for letter in self.mode).split()
        return Path("runs/quality") / f"{'_'.join(words)}-{seed}-{self.experiment.fingerprint()[:8]}"

    @property
    def finished(self) -> bool:
        return (self.folder / "measured.json").exists()

    @property
    def command(self) -> list[str]:
        """In a process of its own, since it has a number of devices of its own."""
        known = settings(self.experiment)
        changed = [f"--set={path}={known[path].text}" for path in self.changes]
        return [
            sys.executable, "-m", "experiments.quality_run", __file__, "--run-dir", str(self.folder), *changed,
        ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = parser().parse_args(arguments)
    console, errors = consoles()
    try:
        for name in ("seeds", "jobs"):
            if getattr(options, name) < 1:
                raise ConfigError(f"--{name} {getattr(options, name)}: give at least 1")
        modes = asked_modes(options.modes)
        tasks = plan_tasks(modes, options.seeds, common_changes(options), errors)
    except ConfigError as error:
        errors.print(f"[bold red]error:[/] {escaped(error)}")
        return 2
    failed = run_all([task for task in tasks if not task.finished], options.jobs, errors)
    rows = rows_of(tasks, compiled=options.compile, errors=errors)
    console.print(table(rows))
    if options.markdown is not None:
        write_atomically(options.markdown, markdown(rows))
    for name, figure in pictures(rows).items():
        options.pictures.mkdir(parents=True, exist_ok=True)
        png(figure, options.pictures / name)
        console.print(f"[bold]picture[/] {options.pictures / name}")
    return 1 if failed else 0


def asked_modes(names: str | None) -> list[str]:
    """Modes by name, float32 first: the others are compared with it. All of them where none is named.

    A name stands for every mode that begins with it, where none is called exactly so.

    Raises:
        ConfigError: there is no such mode.
    """
    chosen = ["float32"]
    for name in MODES if names is None else names.split(","):
        found = [name] if name in MODES else [mode for mode in MODES if name and mode.startswith(name)]
        if not found:
            raise ConfigError(f"--modes has {name!r}: give names, or how they begin, of {', '.join(MODES)}")
        chosen += [mode for mode in found if mode not in chosen]
    return chosen


def common_changes(options: argparse.Namespace) -> Settings:
    """What the arguments change of every mode."""
    changes: Settings = {}
    if options.steps is not None:
        changes |= {"training.steps": options.steps, "training.evaluate_every": options.steps}
    if options.init_from is not None:
        changes |= CONTINUED | {"init_from": options.init_from}
    return changes


def plan_tasks(modes: list[str], seeds: int, common: Settings, errors: Console) -> list[Task]:
    """All seeds of a mode, then the next mode's. A mode that the settings do not allow is told and left out.

    Args:
        common: changes of every mode.

    Raises:
        ConfigError: not even the reference can run so.
    """
    tasks = []
    for mode in modes:
        try:
            for seed in range(seeds):
                changes = MODES[mode] | common | {"training.seed": seed}
                tasks.append(Task(mode, experiment.vary(changes), changes))
        except (ConfigError, LayoutError) as error:
            if mode == "float32":
                raise
            errors.print(f"{mode} is left out: {escaped(error)}")
    return tasks


def run_all(tasks: list[Task], jobs: int, errors: Console) -> int:
    """Runs what is not finished, `jobs` at a time; how many failed."""

    def run_one(numbered: tuple[int, Task]) -> bool:
        number, task = numbered
        errors.print(f"[dim]{number} of {len(tasks)}: {task.mode}, seed {task.experiment.training.seed}[/]")
        done = subprocess.run(task.command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            errors.print(f"[bold red]failed:[/] {task.mode}, {task.folder}: {escaped(last)}")
        return done.returncode == 0

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(run_one, enumerate(tasks, 1))).count(False)


def rows_of(tasks: list[Task], *, compiled: bool, errors: Console) -> list[Row]:
    """A row for each mode that has a finished run beside float32's of the same seed."""
    by_mode: dict[str, list[Task]] = {}
    for task in tasks:
        if task.finished:
            by_mode.setdefault(task.mode, []).append(task)
    reference = {task.experiment.training.seed: task.folder for task in by_mode.get("float32", [])}
    rows = []
    for mode, runs in by_mode.items():
        folders = {seed: task.folder for task in runs if (seed := task.experiment.training.seed) in reference}
        if folders:
            allocated = compiled_memory(runs[0].experiment, errors) if compiled else None
            rows.append(row_of(mode, folders, reference, allocated))
    return rows


def compiled_memory(experiment: Experiment, errors: Console) -> int | str:
    """Bytes that the step needs of each H20, compiled; or why that is not known."""
    cluster = Cluster(gpus_per_node=experiment.mesh.num_devices, nics_per_node=experiment.mesh.num_devices)
    try:
        return compile_job(job_of(experiment, "train"), H20, cluster, report=errors.print).facts.allocated
    except (TargetError, CompileError, ConfigError) as error:
        return str(error)


def pictures(rows: list[Row]) -> dict[str, Figure]:
    """By file name. The curves are drawn where at least float32 and one other of `CURVES` were run."""
    found = {"quality.png": draw_quality(rows)} if len(rows) > 1 else {}
    drawn = [row for row in rows if row.mode in CURVES]
    return found | ({"quality_bfloat16.png": draw_curves(drawn)} if len(drawn) > 1 else {})


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="python -m experiments.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("--modes", metavar="NAMES", help="with commas, or how they begin; by default all")
    command.add_argument("--seeds", type=int, default=3, metavar="N", help="0 to N-1 (default 3)")
    command.add_argument("--steps", type=int, metavar="N", help=f"of each run (default {experiment.training.steps})")
    command.add_argument(
        "--init-from", metavar="DIR", help="a run of the same model, with whose weights every mode begins"
    )
    command.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at a time (default 2)")
    command.add_argument("--compile", action="store_true", help="compile each step for an H20 and tell its memory")
    command.add_argument("--markdown", type=Path, metavar="FILE", help="write the table for the lab book")
    command.add_argument(
        "--pictures", type=Path, default=Path("experiments/pictures"), metavar="DIR", help="(default %(default)s)"
    )
    return command


if __name__ == "__main__":
    sys.exit(main())
