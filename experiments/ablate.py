"""What each lever is worth: python -m experiments.ablate experiments/hunyuan_large.py --chip h20,h100

Plans the experiment once as it is, and once more for each lever, with that one turned and the rest as they are.

Exit codes: 0 told · 1 XLA, the disk or a training run failed · 2 a mistake in arguments or settings.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from experiments.experiment import Experiment
from experiments.plan import (
    FAILURES,
    MISTAKES,
    add_cluster,
    add_experiment,
    add_kind,
    asked,
    asked_chip,
    asked_cluster,
    consoles,
    job_of,
    planned,
)
from experiments.run import run
from experiments.summary import escaped
from moe.planner.ablation import Row, ablation_report, ablation_values, draw_levers
from moe.planner.chips import Chip
from moe.planner.compile import CompileError
from moe.planner.levers import Variant, variants
from moe.planner.pictures import png
from moe.planner.plan import model_size
from moe.planner.report_html import html
from moe.planner.report_text import print_report
from moe.train.loop import DivergedError
from moe.train.run_folder import write_atomically
from parallel.network.cluster import Cluster


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = parser().parse_args(arguments)
    console, errors = consoles()
    try:
        defined, experiment = asked(options)
        chips = [asked_chip(name, defined) for name in options.chip.split(",")]
        clusters = [asked_cluster(options, defined, experiment, chip) for chip in chips]
        tables = {
            chip.name: rows_of(experiment, chip, cluster, options, errors)
            for chip, cluster in zip(chips, clusters, strict=True)
        }
        if options.train:
            losses = losses_of(experiment, next(iter(tables.values())), options.train, console)
            tables = {chip: [replace(r, loss=losses.get(r.label)) for r in rows] for chip, rows in tables.items()}
        report = ablation_report(tables, experiment.name)
        print_report(report, console)
        picture = draw_levers(tables)
        if options.json is not None:
            write_atomically(options.json, json.dumps(ablation_values(tables, experiment.name), indent=1))
        if options.html is not None:
            write_atomically(options.html, html(report, {"levers": picture}))
        if options.picture is not None:
            png(picture, options.picture)
    except MISTAKES as error:
        errors.print(f"[bold red]error:[/] {escaped(error)}")
        return 2
    except (*FAILURES, DivergedError) as error:
        errors.print(f"[bold red]failed:[/] {escaped(error)}")
        return 1
    return 0


def rows_of(
    experiment: Experiment, chip: Chip, cluster: Cluster, options: argparse.Namespace, told: Console
) -> list[Row]:
    """The full recipe's row, and one for each lever."""
    job = job_of(experiment, options.kind)
    _, active, _ = model_size(job)
    turned = variants(job, cluster, active)
    told.print(f"{chip.name}: the full recipe")
    rows = [Row(None, planned(options, job, chip, cluster, told))]
    for place, variant in enumerate(turned, 1):
        told.print(f"{chip.name}: {place} of {len(turned)}, {variant.lever} {variant.turned}")
        rows.append(row_of(experiment, variant, chip, cluster, options, told))
    return rows


def row_of(
    experiment: Experiment, variant: Variant, chip: Chip, cluster: Cluster, options: argparse.Namespace, told: Console
) -> Row:
    """A lever that the rest of the recipe does not allow to be turned has a refusal instead of a plan."""
    try:
        job = job_of(experiment.vary(variant.settings), options.kind)
        return Row(variant, planned(options, job, chip, replace(cluster, **variant.cluster), told))
    except (*MISTAKES, CompileError) as error:
        return Row(variant, None, str(error))


def losses_of(experiment: Experiment, rows: list[Row], steps: int, console: Console) -> dict[str, float]:
    """The training loss after `steps` steps, by the row's label, of each variant that can be trained here.

    Raises:
        ConfigError: the experiment cannot be trained for so few steps.
        CheckpointError, DivergedError: a run failed.
    """
    experiment = experiment.vary({"training.steps": steps})
    losses: dict[str, float] = {}
    for row in rows:
        settings = {} if row.variant is None else row.variant.settings
        if row.variant is not None and not settings:
            continue  # the cluster alone differs: the numbers are those of the full recipe
        try:
            variant = experiment.vary(settings)
            folder = Path("runs") / f"{experiment.name}-ablate" / variant.fingerprint()[:8]
            folder.parent.mkdir(parents=True, exist_ok=True)
            console.print(f"training {row.label} in {folder}")
            run(variant, folder, Console(quiet=True))
        except MISTAKES as error:
            console.print(f"{row.label} is not trained here: {escaped(error)}")
            continue
        losses[row.label] = json.loads((folder / "summary.json").read_text("utf-8"))["training_loss"]
    return losses


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="python -m experiments.ablate",
        description="What each lever is worth: one row a lever, with it turned and the rest as they are. Off where the "
        "recipe uses it, on where it does not.",
        epilog="examples:\n"
        "  python -m experiments.ablate experiments/hunyuan_large.py --chip h20,h100 --html levers.html\n"
        "  python -m experiments.ablate experiments/tiny.py --chip h20 --estimate\n"
        "  python -m experiments.ablate experiments/tiny.py --chip h20 --train 120   # and trains each variant here\n\n"
        "exit codes: 0 told, 1 XLA, the disk or a training run failed, 2 a mistake in arguments or settings",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_experiment(command)
    command.add_argument("--chip", required=True, metavar="NAMES", help="one or several, with commas")
    add_kind(command)
    add_cluster(command)
    command.add_argument("--train", type=int, metavar="STEPS", help="train each variant here too, and tell its loss")
    command.add_argument("--json", type=Path, metavar="FILE", help="write all figures (moe/planner/ablation.py)")
    command.add_argument("--html", type=Path, metavar="FILE", help="write tables and picture as one page")
    command.add_argument("--picture", type=Path, metavar="FILE", help="write the picture as PNG")
    return command


if __name__ == "__main__":
    sys.exit(main())
