"""Sums over a step's work: arithmetic by use, and exchanges by kind and axes."""

from collections import defaultdict
from dataclasses import dataclass

from moe.planner.predict import Prediction, TransferTime
from moe.planner.work import Run, Transfer, TransferKind, Use, Work


@dataclass(frozen=True)
class Spent:
    """What one device does for one use in a step. forward, backward, recomputed: FLOPs. bytes: read and written."""

    use: Use
    forward: float
    backward: float
    recomputed: float
    bytes: float

    @property
    def flops(self) -> float:
        return self.forward + self.backward + self.recomputed


@dataclass(frozen=True)
class Exchange:
    """Transfers of one kind over the same axes, of one device in a step.

    uses: what they are for. devices, nodes: that take part in one. count: how often one is started. inside, across:
    bytes sent. hidden, exposed: seconds beside arithmetic, and not.
    """

    kind: TransferKind
    axes: tuple[str, ...]
    uses: tuple[Use, ...]
    devices: int
    nodes: int
    count: float
    inside: float
    across: float
    hidden: float
    exposed: float


def spent_by_use(work: Work) -> tuple[Spent, ...]:
    """Most FLOPs first."""
    groups: dict[Use, list[tuple[float, Run]]] = defaultdict(list)
    for count, run in work.runs():
        groups[run.use].append((count, run))
    found = [
        Spent(
            use,
            forward=sum(count * run.flops for count, run in group if not run.backward and not run.recomputed),
            backward=sum(count * run.flops for count, run in group if run.backward and not run.recomputed),
            recomputed=sum(count * run.flops for count, run in group if run.recomputed),
            bytes=sum(count * run.bytes for count, run in group),
        )
        for use, group in groups.items()
    ]
    return tuple(sorted(found, key=lambda each: (-each.flops, -each.bytes)))


def flops_by_format(work: Work) -> dict[str, float]:
    """FLOPs of the products and attentions, by their inputs' number format, most first."""
    sums: dict[str, float] = defaultdict(float)
    for count, run in work.runs():
        if run.kind in ("matmul", "grouped_matmul", "attention"):
            sums[run.format] += count * run.flops
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def exchanges_of(work: Work, prediction: Prediction) -> tuple[Exchange, ...]:
    """Most exposed first."""
    groups: dict[tuple[object, ...], list[tuple[float, Transfer]]] = defaultdict(list)
    for count, each in work.transfers():
        groups[each.kind, each.axes, each.devices, each.nodes].append((count, each))
    spent: dict[str, list[TransferTime]] = defaultdict(list)
    for time in prediction.transfers:
        spent[time.name].append(time)
    found = [_exchange(group, spent) for group in groups.values()]
    return tuple(sorted(found, key=lambda each: (-each.exposed, -each.hidden, -each.across, -each.inside)))


def _exchange(group: list[tuple[float, Transfer]], spent: dict[str, list[TransferTime]]) -> Exchange:
    first = group[0][1]
    times = [time for name in {each.name for _, each in group} for time in spent[name]]
    return Exchange(
        first.kind, first.axes, tuple(dict.fromkeys(each.use for _, each in group)), first.devices, first.nodes,
        count=sum(count for count, _ in group),
        inside=sum(count * each.inside for count, each in group),
        across=sum(count * each.across for count, each in group),
        hidden=sum(time.hidden for time in times),
        exposed=sum(time.exposed for time in times),
    )  # fmt: skip
