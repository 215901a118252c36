"""The best layout on some GPUs: python -m experiments.search experiments/hunyuan_large.py --chip h20 --gpus 16

Looks through meshes, microbatches, recomputation and offloading by estimates, compiles the best few, and says why the
others lost. Interrupted, the same command goes on: what was compiled is kept.

Exit codes: 0 a layout fits · 1 XLA or the disk refused · 2 a mistake in arguments or settings · 3 nothing fits.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments.experiment import Experiment
from experiments.overrides import settings
from experiments.plan import (
    DOES_NOT_FIT,
    FAILURES,
    MISTAKES,
    add_cluster,
    add_experiment,
    asked,
    asked_chip,
    asked_cluster,
    consoles,
    job_of,
)
from experiments.summary import escaped
from moe.model.config import ConfigError
from moe.planner.chips import CHIPS, Chip
from moe.planner.plan_json import plan_values
from moe.planner.rank import Option, why_lost
from moe.planner.search import Look, Proof, candidates, look, prove
from moe.planner.target import TargetError
from moe.planner.units import gib, seconds
from moe.train.run_folder import write_atomically
from parallel.network.cluster import Cluster
from parallel.network.links import Links, read_links

SHOWN = 10
"""Runners-up that are told about."""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = parser().parse_args(arguments)
    console, errors = consoles()
    try:
        defined, experiment = asked(options)
        chip = asked_chip(options.chip, defined)
        cluster = cluster_of(options, defined, experiment, chip)
        links = None if options.links is None else read_links(options.links)
        seen = look_through(experiment, chip, cluster, links, errors)
        proof = None if options.estimate else proof_of(seen, options.top, chip, cluster, links, errors)
        best, others = outcome(seen, proof)
        tell(experiment, best, others, seen, proof, console)
        if options.json is not None:
            write_atomically(options.json, json.dumps(values(experiment, best, others, seen, proof), indent=1))
    except MISTAKES as error:
        errors.print(f"[bold red]error:[/] {escaped(error)}")
        return 2
    except FAILURES as error:
        errors.print(f"[bold red]failed:[/] {escaped(error)}")
        return 1
    return DOES_NOT_FIT if best is None else 0


def cluster_of(options: argparse.Namespace, defined: Mapping[str, Any], experiment: Experiment, chip: Chip) -> Cluster:
    """As many whole nodes as --gpus fills.

    Raises:
        ConfigError: it fills none.
    """
    per_node = options.gpus_per_node or min(8, options.gpus)
    if options.gpus < 1 or options.gpus % per_node:
        raise ConfigError(f"--gpus {options.gpus}: give whole nodes of {per_node}, or --gpus-per-node N")
    options.nodes, options.gpus_per_node = options.gpus // per_node, per_node
    return asked_cluster(options, defined, experiment, chip)


def look_through(experiment: Experiment, chip: Chip, cluster: Cluster, links: Links | None, told: Console) -> Look:
    """All layouts of the experiment on the cluster, estimated, with a bar that shows how far it is."""
    found = candidates(job_of(experiment, "train"), cluster)
    with Progress(console=told, transient=True) as progress:
        bar = progress.add_task(f"estimating {len(found):,} layouts", total=len(found))
        return look(
            found,
            lambda changes: job_of(experiment.vary(changes), "train"),
            chip,
            cluster,
            links=links,
            report=lambda done: progress.update(bar, completed=done),
        )


def proof_of(seen: Look, count: int, chip: Chip, cluster: Cluster, links: Links | None, told: Console) -> Proof | None:
    """The best `count` compiled; None where this machine cannot."""
    try:
        return prove(
            seen.options, count, chip, cluster, links=links, report=lambda text: told.print(f"[dim]{escaped(text)}[/]")
        )
    except TargetError as error:
        told.print(f"[yellow]{escaped(error)}; what follows is estimated[/]")
        return None


def outcome(seen: Look, proof: Proof | None) -> tuple[Option | None, list[tuple[Option, str]]]:
    """The best layout, and the runners-up with why they lost."""
    if proof is not None and not proof.proven:
        return None, proof.refused
    ahead = seen.options if proof is None else proof.proven
    best = ahead[0] if ahead and ahead[0].plan.fits else None
    if best is None:
        return None, [(option, why_lost(option, option)) for option in seen.options[:SHOWN]]
    others = [(option, why_lost(option, best)) for option in ahead[1:]]
    others += proof.refused if proof else []
    told = [best.changes, *(option.changes for option, _ in others)]
    rest = [option for option in seen.options if option.changes not in told]
    return best, (others + [(option, why_lost(option, best)) for option in rest])[:SHOWN]


def assignments(experiment: Experiment, option: Option) -> list[str]:
    """What turns the experiment into this layout, as `--set` takes it."""
    before, after = settings(experiment), settings(experiment.vary(option.changes))
    return [f"{path}={after[path].text}" for path in option.changes if after[path].text != before[path].text]


def tell(
    experiment: Experiment,
    best: Option | None,
    others: list[tuple[Option, str]],
    seen: Look,
    proof: Proof | None,
    console: Console,
) -> None:
    """Prints the best layout with the settings that lead to it, and the runners-up."""
    fitting = sum(option.plan.fits for option in seen.options)
    console.print(
        f"{len(seen.options) + seen.impossible:,} layouts: {seen.impossible:,} do not divide, "
        f"{len(seen.options) - fitting:,} do not fit, {fitting:,} fit by estimate"
    )
    if best is None:
        console.print("[bold]nothing fits[/]; the nearest:")
    else:
        console.print(f"\n[bold]best[/]: {described(best)}")
        for assignment in assignments(experiment, best):
            console.print(f"  --set {assignment}")
        console.print()
    table = Table("layout", "by", "GiB a GPU", "a step", "why it lost", box=None)
    for option, reason in others:
        plan = option.plan
        time = seconds(plan.prediction.seconds) if plan.fits else "–"
        table.add_row(
            layout_name(option), plan.origin, gib(plan.memory.allocated).removesuffix(" GiB"), time, escaped(reason)
        )
    console.print(table)
    if proof is None:
        console.print("all of it estimated, nothing compiled")


def layout_name(option: Option) -> str:
    """A layout in a few words."""
    job = option.plan.job
    virtual = f", {job.virtual_stages} virtual stages" if job.virtual_stages > 1 else ""
    parts = f", {job.microbatches} microbatches" if job.microbatches > 1 else ""
    return f"{job.mesh.text}{parts}{virtual}, {option.saving}"


def described(option: Option) -> str:
    """A layout with its figures."""
    plan, predicted = option.plan, option.plan.prediction
    return (
        f"{layout_name(option)}: {seconds(predicted.seconds)} a step, {predicted.tokens_per_second:,.0f} tokens/s, "
        f"{predicted.mfu:.1%} MFU, {gib(plan.memory.allocated)} on each GPU, {gib(plan.spare)} to spare "
        f"({plan.origin})"
    )


def values(
    experiment: Experiment, best: Option | None, others: list[tuple[Option, str]], seen: Look, proof: Proof | None
) -> dict[str, Any]:
    """All of it for --json: `best` and `others` with their settings, and the counts."""

    def one(option: Option) -> dict[str, Any]:
        return {"settings": assignments(experiment, option), "plan": plan_values(option.plan, experiment.name)}

    return {
        "layouts": len(seen.options) + seen.impossible,
        "do_not_divide": seen.impossible,
        "fit_by_estimate": sum(option.plan.fits for option in seen.options),
        "compiled": 0 if proof is None else len(proof.proven) + len(proof.refused),
        "best": None if best is None else one(best),
        "others": [one(option) | {"why_lost": reason} for option, reason in others],
    }


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="python -m experiments.search",
        description="Finds the fastest layout of an experiment that fits: mesh, microbatches, recomputation, "
        "offloading. Estimates all of them, compiles the best, and says why the others lost.",
        epilog="examples:\n"
        "  python -m experiments.search experiments/hunyuan_large.py --chip h20 --gpus 512\n"
        "  python -m experiments.search experiments/tiny.py --chip rtx4090 --gpus 4 --gpus-per-node 4 --estimate\n\n"
        "exit codes: 0 a layout fits, 1 XLA or the disk refused, 2 a mistake in arguments or settings, 3 nothing fits\n"
        "interrupted, the same command goes on: what was compiled is kept in .cache/plan",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_experiment(command)
    command.add_argument("--chip", metavar="NAME", help=f"one of {', '.join(CHIPS)}, or the file's own `chip`")
    command.add_argument("--gpus", type=int, required=True, metavar="N", help="how many there are")
    command.add_argument("--top", type=int, default=3, metavar="N", help="layouts to prove by compiling (3)")
    add_cluster(command)
    command.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    return command


if __name__ == "__main__":
    sys.exit(main())
