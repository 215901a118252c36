"""The best layout of a step: a quick look through all by estimates, then proof of the best few by compiling."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from moe.model.config import ConfigError
from moe.planner.chips import Chip
from moe.planner.compile import CompileError
from moe.planner.job import Job
from moe.planner.plan import estimate, make_plan
from moe.planner.rank import Option, ranked
from moe.planner.space import SAVINGS, Savings, meshes, microbatches, settings_of, virtual_stages
from parallel.layout import LayoutError
from parallel.mesh import MeshConfig
from parallel.network.cluster import Cluster
from parallel.network.links import Links

Vary = Callable[[Mapping[str, Any]], Job]
"""The job with these settings; raises ConfigError or LayoutError where they do not fit together."""
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A mesh and its microbatches, to be tried with one saving after the other."""

    settings: dict[str, Any]
    savings: tuple[Savings, ...]


@dataclass(frozen=True)
class Look:
    """options: best first, one for each candidate: with the first saving that fits, or with the last one.
    impossible: candidates whose sizes do not divide."""

    options: list[Option]
    impossible: int


def candidates(job: Job, cluster: Cluster) -> list[Candidate]:
    """Whatever is worth a look on all GPUs of the cluster, in a fixed order. `job` gives the model and the batch."""
    devices, per_node = cluster.nodes * cluster.gpus_per_node, cluster.gpus_per_node
    return [
        Candidate(settings_of(mesh, parts, virtual), SAVINGS)
        for mesh in meshes(devices, per_node, job.model, job.sequence_length)
        for parts in microbatches(mesh, job.batch_size)
        for virtual in virtual_stages(mesh, parts, job.model)
    ]


def look(
    found: list[Candidate],
    vary: Vary,
    chip: Chip,
    cluster: Cluster,
    *,
    links: Links | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> Look:
    """Estimates every candidate. report: is told how many are done."""
    options, impossible = [], 0
    for done, candidate in enumerate(found):
        option = None
        for saving in candidate.savings:
            changes = candidate.settings | dict(saving.changes)
            try:
                job = vary(changes)
            except (ConfigError, LayoutError):
                continue
            option = estimated(changes, saving, job, chip, cluster, links)
            if option.fits:
                break
        if option is None:
            impossible += 1
        else:
            options.append(option)
        report(done + 1)
    return Look(ranked(options), impossible)


def estimated(
    changes: Mapping[str, Any], saving: Savings, job: Job, chip: Chip, cluster: Cluster, links: Links | None
) -> Option:
    """Time is predicted only for what fits."""
    ...


def prove(
    options: list[Option], count: int, chip: Chip, cluster: Cluster, *, links: Links | None, report: Progress
) -> tuple[list[Option], list[tuple[Option, str]]]:
    """Compiles the best ones until `count` of them fit.

    Returns:
        those that fit, best first; and the others, each with what the compiled program shows against it.
    """
    proven: list[Option] = []
    refused: list[tuple[Option, str]] = []
    for option in options:
        if len(proven) == count or not option.fits:
            break
        try:
            plan = make_plan(option.job, chip, cluster, links=links, report=report)
        except CompileError as error:
            refused.append((option, str(error)))
            continue
        compiled = replace(
            option,
            allocated=plan.memory.allocated,
            spare=plan.spare,
            prediction=plan.prediction if plan.fits else None,
            origin="compiled",
        )
        if compiled.fits:
            proven.append(compiled)
        else:
            refused.append((compiled, "compiled, it does not fit"))
    return ranked(proven), refused
