"""How long a step takes: its schedule played through on one device's streams.

Kernels run one after the other on the arithmetic stream; collectives on a stream of their own, beside it, and copies
to and from the host on a third. Where the program waits for a transfer that has not ended, the rest of it is exposed.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal, get_args

from moe.planner.channels import channels
from moe.planner.chips import Chip
from moe.planner.efficiency import CALIBRATED, Efficiency, run_seconds, transfer_seconds
from moe.planner.work import Event, Loop, Run, RunKind, Start, Transfer, TransferKind, Use, Wait, Work
from parallel.network.cluster import Cluster
from parallel.network.links import Links

Term = Literal[
    "matmul", "grouped_matmul", "attention", "memory_bound", "launches", "exposed_inside", "exposed_across",
    "exposed_host", "pipeline_idle",
]  # fmt: skip
TERMS: tuple[Term, ...] = get_args(Term)

_TERM_OF: dict[RunKind, Term] = {
    "matmul": "matmul",
    "grouped_matmul": "grouped_matmul",
    "attention": "attention",
    "elementwise": "memory_bound",
    "data_movement": "memory_bound",
    "sort": "memory_bound",
}
TURNS = 4
"""Of a loop's body that are played through one by one; what the last of them took counts for all the rest."""


@dataclass(frozen=True)
class TransferTime:
    """One transfer over a step. seconds: that it takes, all `times` together; exposed: that the device waits for it."""

    name: str
    use: Use
    kind: TransferKind
    axes: tuple[str, ...]
    times: float
    seconds: float
    exposed: float

    @property
    def hidden(self) -> float:
        return self.seconds - self.exposed


@dataclass(frozen=True)
class Prediction:
    """
    seconds: of a step. low, high: by the calibration's leave-one-out error.
    tokens_per_second: over all devices.
    mfu: model FLOPs, of all devices' bf16 peak (float16 where the chip has no bfloat16).
    terms, uses: seconds by what the arithmetic stream does, and by what for. Each sums to `seconds`; waiting for a
        transfer counts for the transfer's use.
    transfers: longest first.
    """

    seconds: float
    low: float
    high: float
    devices: int
    tokens_per_second: float
    mfu: float
    terms: dict[Term, float]
    uses: dict[Use, float]
    transfers: tuple[TransferTime, ...]

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens_per_second / self.devices


def predict(
    work: Work,
    chip: Chip,
    cluster: Cluster,
    *,
    tokens: float,
    model_flops: float,
    links: Links | None = None,
    load: float = 1.0,
    idle: float = 0.0,
    efficiency: Efficiency = CALIBRATED,
) -> Prediction:
    """
    Args:
        cluster: all of its GPUs take part.
        tokens: of a step over all devices.
        model_flops: of a step over all devices, without recomputation.
        links: measured on the cluster; they take the place of what chip and cluster say.
        load: rows of the busiest device's experts, in units of the mean.
        idle: share of the pipeline's ticks in which a stage has nothing to do (`parallel.pipeline.Schedule`). The
            program computes in them as well, and drops the result, so that time is in `work`; it is told apart here.
    """
    play = _Play(chip, cluster, links, load, efficiency)
    play.sequence(work.events)
    seconds, devices = play.now, cluster.nodes * cluster.gpus_per_node
    terms = {term: sum(s for (t, _), s in play.spent.items() if t == term) for term in TERMS}
    uses = {use: sum(s for (_, u), s in play.spent.items() if u == use) for use in get_args(Use)}
    for (term, use), spent in play.spent.items():
        if use != "optimizer":
            terms[term] -= idle * spent
            terms["pipeline_idle"] += idle * spent
    return Prediction(
        seconds=seconds,
        low=seconds * (1 - efficiency.error),
        high=seconds * (1 + efficiency.error),
        devices=devices,
        tokens_per_second=tokens / seconds,
        mfu=model_flops / seconds / (devices * (chip.bf16 or chip.fp16)),
        terms=terms,
        uses={use: spent for use, spent in uses.items() if spent},
        transfers=tuple(sorted(play.transfer_times(), key=lambda each: -each.seconds)),
    )


@dataclass
class _Sum:
    """Over all executions of one transfer."""

    times: float = 0.0
    seconds: float = 0.0
    exposed: float = 0.0


@dataclass
class _Play:
    """The streams' clocks, seconds, and what was spent so far.

    now: of the arithmetic stream. free: when each other stream is done with what it was given.
    pending: what was started and not waited for: its end, the transfer, and the term under which waiting counts.
    """

    chip: Chip
    cluster: Cluster
    links: Links | None
    load: float
    efficiency: Efficiency
    now: float = 0.0
    free: dict[str, float] = field(default_factory=lambda: {"links": 0.0, "across": 0.0, "host": 0.0})
    pending: dict[str, tuple[float, Transfer, Term]] = field(default_factory=dict)
    spent: dict[tuple[Term, Use], float] = field(default_factory=lambda: defaultdict(float))
    sums: dict[Transfer, _Sum] = field(default_factory=lambda: defaultdict(_Sum))

    def __post_init__(self) -> None:
        self.channels = channels(self.chip, self.cluster)

    def transfer_times(self) -> list[TransferTime]:
        return [
            TransferTime(each.name, each.use, each.kind, each.axes, total.times, total.seconds, total.exposed)
            for each, total in self.sums.items()
        ]

    def sequence(self, events: tuple[Event, ...]) -> None:
        for event in events:
            match event:
                case Run():
                    self._run(event)
                case Start(transfer):
                    self._start(transfer)
                case Wait(name):
                    self._wait(name)
                case Loop(times, body):
                    self._loop(times, body)

    def _run(self, run: Run) -> None:
        seconds = run_seconds(run, self.chip, self.efficiency, self.load)
        self._pass(seconds, _TERM_OF[run.kind], run.use)
        self._pass(self.efficiency.launch + seconds * (1 / self.efficiency.busy - 1), "launches", run.use)

    def _pass(self, seconds: float, term: Term, use: Use) -> None:
        self.now += seconds
        self.spent[term, use] += seconds

    def _start(self, transfer: Transfer) -> None:
        inside, across = transfer_seconds(transfer, self.channels, self.efficiency, self.links, self.load)
        to_host = transfer.kind in ("to-host", "to-device")
        stream = "host" if to_host else "across" if across and self.efficiency.parallel_links else "links"
        seconds = max(inside, across)
        self.free[stream] = max(self.now, self.free[stream]) + seconds
        self.pending[transfer.name] = (self.free[stream], transfer, _exposed(to_host, inside, across))
        total = self.sums[transfer]
        total.times += 1
        total.seconds += seconds

    def _wait(self, name: str) -> None:
        """Nothing where a loop's first turn waits for what only the turn before would have started."""
        if name not in self.pending:
            return
        end, transfer, term = self.pending.pop(name)
        waited = max(0.0, end - self.now)
        self._pass(waited, term, transfer.use)
        self.sums[transfer].exposed += waited

    def _loop(self, times: float, body: tuple[Event, ...]) -> None:
        played = min(TURNS, int(times))
        for _ in range(played - 1):
            self.sequence(body)
        if times > 0:
            self._stretched(times - max(0, played - 1), body)

    def _stretched(self, times: float, body: tuple[Event, ...]) -> None:
        """One turn, counted `times` times."""
        before, spent = self.now, dict(self.spent)
        sums = {transfer: (each.times, each.seconds, each.exposed) for transfer, each in self.sums.items()}
        self.sequence(body)
        more = (self.now - before) * (times - 1)
        self.now += more
        self.free = {stream: end + more for stream, end in self.free.items()}
        self.pending = {name: (end + more, what, term) for name, (end, what, term) in self.pending.items()}
        for key, seconds in self.spent.items():
            self.spent[key] += (seconds - spent.get(key, 0.0)) * (times - 1)
        for transfer, each in self.sums.items():
            then = sums.get(transfer, (0.0, 0.0, 0.0))
            each.times += (each.times - then[0]) * (times - 1)
            each.seconds += (each.seconds - then[1]) * (times - 1)
            each.exposed += (each.exposed - then[2]) * (times - 1)


def _exposed(to_host: bool, inside: float, across: float) -> Term:
    if to_host:
        return "exposed_host"
    return "exposed_across" if across > inside else "exposed_inside"
