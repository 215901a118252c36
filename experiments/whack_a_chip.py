"""Hunyuan-Large on the chips that export rules allow, and on those that they keep back.

    python -m experiments.whack_a_chip [--estimate] [--json FILE] [--html FILE] [--picture FILE]

How many GPU-days, days and megawatt-hours 7T tokens take on 512 H20s, H100s, H800s and A100s; what each lever is worth
on each; how far a limit on arithmetic (TPP and performance density, ECCN 3A090) holds training back once the levers are
pulled; and what a limit on memory or interconnect would do. After "Whack-a-Chip" (arXiv 2411.14425), whose point it
puts into figures. The recipe, experiments/hunyuan_large.py, is the same for all chips. Times are predicted, of programs
that XLA compiled for each chip, or with --estimate of estimated ones.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from experiments.ablate import rows_of
from experiments.fewest_gpus import GPUS, layout_for
from experiments.plan import FAILURES, MISTAKES, consoles
from experiments.run import load_experiment
from experiments.search import layout_name
from experiments.summary import escaped
from moe.planner.ablation import Row
from moe.planner.campaign import Campaign
from moe.planner.chips import A100, H20, H100, H800, Chip
from moe.planner.limits import Machine, Point, sweep, with_bandwidth, with_link, with_memory, with_tpp
from moe.planner.pictures import draw_lines, png
from moe.planner.plan import Plan
from moe.planner.rank import Option
from moe.planner.report import Report, Section, Table, table
from moe.planner.report_html import html
from moe.planner.report_text import print_report
from moe.planner.units import digits, gib, seconds, times
from moe.train.run_folder import write_atomically
from parallel.network.cluster import Cluster

RECIPE = Path(__file__).parent / "hunyuan_large.py"
TOKENS = 7e12
"""On which Hunyuan-Large was trained (arXiv 2411.02265 §2.2)."""
CHIPS = (H20, H100, H800, A100)
DAYS = 90
"""In which a run shall be done, for the number of GPUs."""
TPP = (300, 600, 1200, 1600, 2368, 3200, 4800, 8000, 15_832)
"""600 is a quarter of what the rule lets through, 2368 is H20's, 4800 the rule's threshold, 15,832 H100's."""
MEMORY = (1.0, 0.5, 0.25, 0.125)
"""Shares of an H20's memory."""
SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = parser().parse_args(arguments)
    console, errors = consoles()
    try:
        tables = {chip.name: rows_for(chip, options, errors) for chip in CHIPS}
        report, picture, values = study(tables, memory_limits(errors))
        print_report(report, console)
        if options.json is not None:
            write_atomically(options.json, json.dumps(values, indent=1))
        if options.html is not None:
            write_atomically(options.html, html(report, {"limits": picture}))
        if options.picture is not None:
            png(picture, options.picture)
    except MISTAKES as error:
        errors.print(f"[bold red]error:[/] {escaped(error)}")
        return 2
    except FAILURES as error:
        errors.print(f"[bold red]failed:[/] {escaped(error)}")
        return 1
    return 0


def rows_for(chip: Chip, options: argparse.Namespace, told: Console) -> list[Row]:
    """The recipe on `chip`, and with each lever turned."""
    experiment = load_experiment(RECIPE)
    cluster = Cluster(nodes=experiment.mesh.num_devices // 8)
    return rows_of(experiment, chip, cluster, options, told)


def study(
    tables: Mapping[str, list[Row]], memory: Mapping[float, Option | None]
) -> tuple[Report, Figure, dict[str, Any]]:
    """
    Args:
        tables: by chip, the recipe and its variants.
        memory: by share of an H20's memory, the layout on the fewest GPUs that hold the recipe then.
    """
    recipes = {chip: plan for chip, rows in tables.items() if (plan := rows[0].plan) is not None}
    campaigns = {chip: Campaign(plan, TOKENS) for chip, plan in recipes.items()}
    arithmetic, others = arithmetic_limits(tables[H20.name]), other_limits(recipes[H20.name])
    report = Report(
        title="Hunyuan-Large on the chips that export rules allow, and on those that they keep back",
        verdict=verdict(campaigns, others),
        good=True,
        warnings=("estimated, not compiled",) if recipes[H20.name].origin == "estimated" else (),
        sections=(
            Section(f"{TOKENS / 1e12:g}T tokens, every lever pulled", campaign_table(campaigns), campaign_notes(CHIPS)),
            Section("GPU-days with one lever turned, times the recipe's", lever_table(tables)),
            Section("An H20 with other arithmetic: times H20's step", arithmetic_table(arithmetic), RULE, "limits"),
            Section("An H20 with less of something else: times H20's step", other_table(others), OTHER_NOTES),
            Section("An H20 with less memory: the fastest layout that fits", memory_table(memory), MEMORY_NOTES),
        ),
    )
    return report, draw(arithmetic), figures(campaigns, tables, arithmetic, others, memory)


def campaign_table(campaigns: Mapping[str, Campaign]) -> Table:
    columns = (
        "chip", "TPP", "density", "3A090", "GPUs", "step", "MFU", "days", "GPU-days", "MWh", f"GPUs for {DAYS} days",
    )  # fmt: skip
    rows = []
    for name, campaign in campaigns.items():
        plan, (low, high) = campaign.plan, campaign.days_range
        chip = plan.chip
        rows.append((
            name, digits(chip.tpp), digits(chip.performance_density), chip.export, str(plan.devices),
            seconds(plan.prediction.seconds), f"{plan.prediction.mfu:.1%}",
            f"{campaign.days:,.0f} ({low:,.0f} to {high:,.0f})", digits(campaign.gpu_days),
            digits(campaign.megawatt_hours), f"{campaign.gpus_for(DAYS):,}",
        ))  # fmt: skip
    return table(columns, rows)


def campaign_notes(chips: tuple[Chip, ...]) -> tuple[str, ...]:
    watts = ", ".join(f"{chip.name} {chip.watts:g} W" for chip in chips)
    return (
        "Days are of steps alone, without failures and evaluations, with the prediction's uncertainty. Energy is of "
        f"the boards at full power ({watts}); hosts, network and cooling come on top.",
        "3A090: what the figures mean under the rule of 2023-10 for a chip made for data centers.",
    )


def lever_table(tables: Mapping[str, list[Row]]) -> Table:
    labels = list(dict.fromkeys(row.label for rows in tables.values() for row in rows[1:]))
    rows = [(label, *(lever_cell(label, found) for found in tables.values())) for label in labels]
    return table(("", *tables), rows)


def lever_cell(label: str, rows: list[Row]) -> str:
    full, row = rows[0].plan, next((row for row in rows if row.label == label), None)
    if row is None or row.plan is None or full is None:
        return "–"
    ratio = row.plan.chip_hours_per_trillion / full.chip_hours_per_trillion
    return times(ratio) + ("" if row.plan.fits else ", does not fit")


def arithmetic_limits(rows: list[Row]) -> dict[str, list[Point]]:
    """H20s of other TPP, for the recipe and for what it is without some levers, by the recipe's step on an H20."""
    wanted = ("full recipe", "without mixture of experts", "without bfloat16")
    plans = {row.label: row.plan for row in rows if row.plan is not None and row.label in wanted}
    base = plans["full recipe"].prediction.seconds
    return {label: sweep(plan, partial(of_tpp, plan), TPP, base) for label, plan in plans.items()}


def of_tpp(plan: Plan, tpp: float) -> Machine:
    return with_tpp(plan.chip, tpp), plan.cluster


def arithmetic_table(found: Mapping[str, list[Point]]) -> Table:
    rows = [
        (f"TPP {tpp:,.0f}", *(times(points[place].slower) for points in found.values()))
        for place, tpp in enumerate(TPP)
    ]
    return table(("", *found), rows)


RULE = (
    "The rule lets through, without notice, less than TPP 1600, or up to 2400 at a density below 3.2, which needs a "
    "die of 750 mm² or more: near the largest that can be printed (about 858 mm²). An H20 stands at that corner.",
)


def other_limits(plan: Plan) -> dict[str, list[Point]]:
    """By what is limited, with values as shares of what an H20 and its node have."""
    chip, cluster = plan.chip, plan.cluster

    def links(share: float) -> Machine:
        return with_link(chip, share * chip.link_rate), cluster

    def cards(share: float) -> Machine:
        return chip, replace(cluster, nic_rate=share * cluster.nic_rate)

    machines: dict[str, Callable[[float], Machine]] = {
        "arithmetic": lambda share: (with_tpp(chip, share * chip.tpp), cluster),
        "memory bandwidth": lambda share: (with_bandwidth(chip, share * chip.bandwidth), cluster),
        "links inside a node": links,
        "network cards": cards,
        "both kinds of links": lambda share: (links(share)[0], cards(share)[1]),
    }
    return {name: sweep(plan, machine, SHARES, plan.prediction.seconds) for name, machine in machines.items()}


def other_table(found: Mapping[str, list[Point]]) -> Table:
    columns = ("", *(f"{share:.4g} of it" for share in SHARES))
    return table(columns, [(name, *(times(point.slower) for point in points)) for name, points in found.items()])


OTHER_NOTES = ("An H20's own: 4.0 TB/s, 450 GB/s of NVLink, eight cards of 400 Gb/s a node, TPP 2368.",)


def memory_limits(told: Console) -> dict[float, Option | None]:
    """By share of an H20's memory; None where no number of GPUs holds the recipe."""
    recipe = load_experiment(RECIPE)
    return {share: layout_for(recipe, with_memory(H20, int(share * H20.memory)), told) for share in MEMORY}


def memory_table(found: Mapping[float, Option | None]) -> Table:
    rows = []
    for share, option in found.items():
        cells = ("fits nowhere", "–", "–", "–")
        if option is not None:
            plan = option.plan
            days = digits(Campaign(plan, TOKENS).gpu_days)
            cells = (layout_name(option), str(plan.devices), gib(plan.memory.allocated), days)
        rows.append((gib(share * H20.memory), *cells))
    return table(("memory", "layout", "GPUs", "allocated", "GPU-days"), rows, words=2)


MEMORY_NOTES = (f"Estimated; the fewest GPUs of {', '.join(map(str, GPUS))}.",)


def verdict(campaigns: Mapping[str, Campaign], others: Mapping[str, list[Point]]) -> str:
    """What the figures come to."""
    h20, h100 = campaigns[H20.name], campaigns[H100.name]
    quarter = SHARES.index(0.25)
    return (
        f"an H20 has {H20.tpp / H100.tpp:.0%} of an H100's arithmetic and does {h100.gpu_days / h20.gpu_days:.0%} of "
        f"its work, at {h20.megawatt_hours / h100.megawatt_hours:.2f} x the energy; a quarter of its arithmetic would "
        f"cost {times(others['arithmetic'][quarter].slower)}, a quarter of its links "
        f"{times(others['both kinds of links'][quarter].slower)}, a quarter of its memory's bandwidth "
        f"{times(others['memory bandwidth'][quarter].slower)}"
    )


def draw(arithmetic: Mapping[str, list[Point]]) -> Figure:
    lines = {label: [(point.value, 1 / point.slower) for point in points] for label, points in arithmetic.items()}
    marks = {"H20": H20.tpp, "rule": 4800.0, "H100": H100.tpp}
    return draw_lines(lines, marks, "TPP of the chip", "speed, times an H20's")


def figures(
    campaigns: Mapping[str, Campaign],
    tables: Mapping[str, list[Row]],
    arithmetic: Mapping[str, list[Point]],
    others: Mapping[str, list[Point]],
    memory: Mapping[float, Option | None],
) -> dict[str, Any]:
    """All of it as JSON values."""
    return {
        "tokens": TOKENS,
        "campaigns": {name: campaign_figures(each) for name, each in campaigns.items()},
        "levers": {
            chip: {row.label: lever_cell(row.label, rows) for row in rows[1:]} for chip, rows in tables.items()
        },
        "tpp": {label: [(point.value, point.slower) for point in points] for label, points in arithmetic.items()},
        "memory": {
            share: None if option is None else campaign_figures(Campaign(option.plan, TOKENS))
            for share, option in memory.items()
        },
        "limits": {name: [(point.value, point.slower) for point in points] for name, points in others.items()},
    }  # fmt: skip


def campaign_figures(campaign: Campaign) -> dict[str, Any]:
    """As JSON values."""
    plan = campaign.plan
    return {
        "gpus": plan.devices,
        "step_seconds": plan.prediction.seconds,
        "mfu": plan.prediction.mfu,
        "days": campaign.days,
        "days_range": campaign.days_range,
        "gpu_days": campaign.gpu_days,
        "megawatt_hours": campaign.megawatt_hours,
        "tpp": plan.chip.tpp,
        "performance_density": plan.chip.performance_density,
        "export": plan.chip.export,
        "origin": plan.origin,
    }


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="python -m experiments.whack_a_chip",
        description="Hunyuan-Large on the chips that export rules allow, and on those that they keep back.",
        epilog="exit codes: 0 told, 1 XLA or the disk refused, 2 a mistake in the arguments",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--estimate", action="store_true", help="without compiling: a minute, and less exact")
    command.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    command.add_argument("--html", type=Path, metavar="FILE", help="write tables and picture as one page")
    command.add_argument("--picture", type=Path, metavar="FILE", help="write the picture as PNG")
    command.set_defaults(kind="train", links=None)
    return command


if __name__ == "__main__":
    sys.exit(main())
