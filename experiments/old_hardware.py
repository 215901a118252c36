"""Hunyuan-Large on what is old, cut down or made for games: V100, RTX 4090 and A800, beside an H20.

    python -m experiments.old_hardware [--estimate] [--json FILE] [--html FILE]

For each chip the fastest layout that fits, on the fewest GPUs of 512, 1024 and 2048; then GPU-days, days and
megawatt-hours for 7T tokens, and what each lever is worth there. An RTX 4090 has 24 GB and no NVLink: the GPUs of a
node share PCIe. A V100 has 32 GB and no bfloat16: XLA computes such products in float32 (moe/planner/backends.py).
Layouts are chosen by estimates; times are predicted, of programs that XLA compiled for each chip, or with --estimate
of estimated ones.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.ablate import rows_of
from experiments.experiment import Experiment
from experiments.fewest_gpus import GPUS, layout_for
from experiments.plan import FAILURES, MISTAKES, consoles
from experiments.run import load_experiment
from experiments.search import layout_name
from experiments.summary import escaped
from experiments.whack_a_chip import RECIPE, TOKENS, campaign_figures, campaign_notes, campaign_table, lever_table
from moe.planner.ablation import Row
from moe.planner.campaign import Campaign
from moe.planner.chips import A800, H20, RTX_4090, V100, Chip
from moe.planner.rank import Option
from moe.planner.report import Report, Section, table
from moe.planner.report_html import html
from moe.planner.report_text import print_report
from moe.planner.units import gib
from moe.train.run_folder import write_atomically

CHIPS = (H20, A800, V100, RTX_4090)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = parser().parse_args(arguments)
    console, errors = consoles()
    try:
        recipe = load_experiment(RECIPE)
        layouts = {chip.name: layout_for(recipe, chip, errors) for chip in CHIPS}
        tables = {
            chip.name: rows_for(chip, option, options, errors)
            for chip in CHIPS
            if (option := layouts[chip.name]) is not None
        }
        report, values = study(layouts, tables)
        print_report(report, console)
        if options.json is not None:
            write_atomically(options.json, json.dumps(values, indent=1))
        if options.html is not None:
            write_atomically(options.html, html(report, {}))
    except MISTAKES as error:
        errors.print(f"[bold red]error:[/] {escaped(error)}")
        return 2
    except FAILURES as error:
        errors.print(f"[bold red]failed:[/] {escaped(error)}")
        return 1
    return 0


def rows_for(chip: Chip, option: Option, options: argparse.Namespace, told: Console) -> list[Row]:
    """The recipe in its layout for `chip`, and with each lever turned."""
    experiment: Experiment = load_experiment(RECIPE).vary(option.changes)
    return rows_of(experiment, chip, option.plan.cluster, options, told)


def study(layouts: dict[str, Option | None], tables: dict[str, list[Row]]) -> tuple[Report, dict[str, Any]]:
    campaigns = {chip: Campaign(plan, TOKENS) for chip, rows in tables.items() if (plan := rows[0].plan) is not None}
    h20 = campaigns[H20.name]
    told = [
        f"{chip}: {each.gpu_days / h20.gpu_days:.2f} x an H20's GPU-days, "
        f"{each.megawatt_hours / h20.megawatt_hours:.2f} x its energy"
        for chip, each in campaigns.items()
        if chip != H20.name
    ]
    nowhere = [f"{chip}: fits nowhere up to {GPUS[-1]} GPUs" for chip, option in layouts.items() if option is None]
    report = Report(
        title="Hunyuan-Large on what is old, cut down or made for games",
        verdict=" · ".join(told + nowhere),
        good=not nowhere,
        warnings=("estimated, not compiled",) if h20.plan.origin == "estimated" else (),
        sections=(
            Section("The layout for each, chosen by estimates", layout_table(layouts, tables)),
            Section(f"{TOKENS / 1e12:g}T tokens", campaign_table(campaigns), campaign_notes(CHIPS)),
            Section("GPU-days with one lever turned, times the recipe's", lever_table(tables)),
        ),
    )
    return report, {"tokens": TOKENS, "campaigns": {chip: campaign_figures(each) for chip, each in campaigns.items()}}


def layout_table(layouts: dict[str, Option | None], tables: dict[str, list[Row]]) -> Any:
    rows = []
    for chip, option in layouts.items():
        plan = tables[chip][0].plan if chip in tables else None
        if option is not None and plan is not None:
            fits = "yes" if plan.fits else f"no, {gib(-plan.spare)} over"
            rows.append((chip, layout_name(option), str(plan.devices), gib(plan.memory.allocated), fits))
    return table(("chip", "layout", "GPUs", "memory of each", "fits"), rows, words=2)


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="python -m experiments.old_hardware",
        description="Hunyuan-Large on V100, RTX 4090 and A800, beside an H20.",
        epilog="exit codes: 0 told, 1 XLA or the disk refused, 2 a mistake in the arguments",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--estimate", action="store_true", help="without compiling: a minute, and less exact")
    command.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    command.add_argument("--html", type=Path, metavar="FILE", help="write the tables as one page")
    command.set_defaults(kind="train", links=None)
    return command


if __name__ == "__main__":
    sys.exit(main())
