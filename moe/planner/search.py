"""The best layout of a step: a quick look through all by estimates, then proof of the best few by compiling."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moe.model.config import ConfigError
from moe.planner.chips import Chip
from moe.planner.compile import CompileError
from moe.planner.job import Job
from moe.planner.kernels import CountError
from moe.planner.plan import make_plan
from moe.planner.rank import Option, ranked
from moe.planner.space import SAVINGS, meshes, microbatches, settings_of, virtual_stages
from parallel.layout import LayoutError
from parallel.mesh import MeshError
from parallel.network.cluster import Cluster
from parallel.network.links import Links

Vary = Callable[[Mapping[str, Any]], Job]
"""The job with these settings; raises ConfigError, LayoutError or MeshError where they do not fit together."""


@dataclass(frozen=True)
class Look:
    """options: best first, one for each candidate, with the first saving that fits or with the last one.
    impossible: candidates whose sizes do not divide."""

    options: list[Option]
    impossible: int


@dataclass(frozen=True)
class Proof:
    """proven: compiled and fitting, best first. refused: the others that were compiled, with what is against them."""

    proven: list[Option]
    refused: list[tuple[Option, str]]


def candidates(job: Job, cluster: Cluster) -> list[dict[str, Any]]:
    """The settings of whatever is worth a look on all GPUs of the cluster, in a fixed order. `job` gives the model and
    the batch."""
    devices, per_node = cluster.nodes * cluster.gpus_per_node, cluster.gpus_per_node
    return [
        settings_of(mesh, parts, virtual)
        for mesh in meshes(devices, per_node, job.model, job.sequence_length)
        for parts in microbatches(mesh, job.batch_size)
        for virtual in virtual_stages(mesh, parts, job.model)
    ]


def look(
    found: list[dict[str, Any]],
    vary: Vary,
    chip: Chip,
    cluster: Cluster,
    *,
    links: Links | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> Look:
    """Estimates every candidate. report: is told how many are done."""
    options, impossible = [], 0
    for done, settings in enumerate(found):
        option = first_that_fits(settings, vary, chip, cluster, links)
        if option is None:
            impossible += 1
        else:
            options.append(option)
        report(done + 1)
    return Look(ranked(options), impossible)


def first_that_fits(
    settings: Mapping[str, Any], vary: Vary, chip: Chip, cluster: Cluster, links: Links | None
) -> Option | None:
    """With the cheapest saving, or the dearest where none is enough; None where the sizes do not divide."""
    option = None
    for saving in SAVINGS:
        changes = {**settings, **saving.changes}
        try:
            job = vary(changes)
            plan = make_plan(job, chip, cluster, links=links, estimated=True)
        except (ConfigError, LayoutError, MeshError):
            continue
        option = Option(changes, saving.name, plan)
        if plan.fits:
            break
    return option


def prove(
    options: list[Option],
    count: int,
    chip: Chip,
    cluster: Cluster,
    *,
    links: Links | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> Proof:
    """Compiles the best ones until `count` of them fit, or none is left that may."""
    proven: list[Option] = []
    refused: list[tuple[Option, str]] = []
    for option in options:
        if len(proven) == count or not option.plan.fits:
            break
        try:
            plan = make_plan(option.plan.job, chip, cluster, links=links, report=report)
        except (CompileError, CountError) as error:
            refused.append((option, f"XLA refuses it: {error}"))
            continue
        compiled = Option(option.changes, option.saving, plan)
        if plan.fits:
            proven.append(compiled)
        else:
            refused.append((compiled, "estimated to fit, it does not"))
    return Proof(ranked(proven), refused)
