"""What a program does on one device in one step, in the order in which it does it; and what it holds in memory.

The one form in which planning speaks of a program: counted from the HLO that XLA compiled (count.py, buffers.py), or
estimated from the settings alone (estimate.py, estimate_memory.py). Prediction (predict.py) and reports read nothing
else.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Use = Literal[
    "attention", "experts", "shared_expert", "dense", "router", "exchange", "head", "embedding", "norm", "optimizer",
    "other",
]  # fmt: skip
"""What a piece of work is for: the named scopes of the model (`jax.named_scope`)."""

RunKind = Literal["matmul", "grouped_matmul", "attention", "elementwise", "data_movement", "sort"]
TransferKind = Literal[
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "to-host",
    "to-device",
]  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One kernel on the device's arithmetic stream: a product, a fusion, a library call.

    flops: of one execution; multiplications and additions count 1 each. Of a causal attention only what its mask lets
        through, of a grouped product only rows that are there when the router is even.
    bytes: read from and written to the device's memory in one execution.
    shape: (batch, m, n, k) of a product: m x k by k x n, `batch` times (for a grouped product `batch` experts, m rows
        in all, in the gradient of its matrices as well); None for all else. Where XLA cuts k into parts (split-K),
        these are the batch.
    format: of a product's inputs, or of the widest operand: "bf16", "f32", "f8e4m3fn", "s8", …; "tf32" where inputs
        are float32 and may be rounded, as JAX lets them be unless `precision` says otherwise.
    recomputed: whether it repeats the forward pass for the backward one (rematerialisation).
    backward: whether it belongs to the backward pass.
    source: file:line of the code that asked for it; "" where not known.
    block_scaled: of a grouped product, whether there is a scale for each block of what is summed over.
    """

    name: str
    use: Use
    kind: RunKind
    flops: float
    bytes: float
    format: str
    shape: tuple[int, int, int, int] | None = None
    recomputed: bool = False
    backward: bool = False
    source: str = ""
    block_scaled: bool = False


@dataclass(frozen=True)
class Transfer:
    """One exchange between devices, or between a device and its host's memory.

    axes: mesh axes over which it goes; () to or from the host, and where no product of axes fits.
    devices: that take part; nodes: over which these lie.
    inside: bytes that one device sends over the links of its node in one execution, across: through its network cards.
        Of n devices, p on each node, with S the bytes of the whole result of an all-gather (of the whole input of a
        reduce-scatter, of one device's buffer in an all-to-all): all-gather and reduce-scatter inside S·(n-1)/n where
        p > 1, across S·(n-p)/n/p (a ring enters each node once on each rail; NCCL's channels share it over the p
        cards); all-reduce both; all-to-all inside S·(p-1)/n, across S·(n-p)/n; collective-permute S on the link that
        the farthest pair needs. To and from the host: all bytes are `inside`.
    backward, recomputed: as of a Run.
    """

    name: str
    use: Use
    kind: TransferKind
    axes: tuple[str, ...]
    devices: int
    nodes: int
    inside: float
    across: float
    recomputed: bool = False
    backward: bool = False
    source: str = ""


@dataclass(frozen=True)
class Start:
    """The transfer begins; what follows runs beside it."""

    transfer: Transfer


@dataclass(frozen=True)
class Wait:
    """Until the transfer of this name, started before in the same sequence, has ended."""

    name: str


@dataclass(frozen=True)
class Loop:
    """`body`, `times` times. What is started in a body is waited for in it or in the next turn."""

    times: float
    body: "tuple[Event, ...]"


Event = Run | Start | Wait | Loop


@dataclass(frozen=True)
class Work:
    """events: of one step. origin: whether they were counted from a compiled program, or estimated."""

    events: tuple[Event, ...]
    origin: Literal["compiled", "estimated"]

    def runs(self) -> Iterator[tuple[float, Run]]:
        """Each with how often it is executed in a step."""
        return ((times, event) for times, event in _flat(self.events) if isinstance(event, Run))

    def transfers(self) -> Iterator[tuple[float, Transfer]]:
        """Each with how often it is executed in a step."""
        return ((times, event.transfer) for times, event in _flat(self.events) if isinstance(event, Start))

    @property
    def flops(self) -> float:
        """Executed by one device in a step."""
        return sum(times * run.flops for times, run in self.runs())

    @property
    def bytes(self) -> float:
        """Read from and written to one device's memory in a step."""
        return sum(times * run.bytes for times, run in self.runs())


def _flat(events: tuple[Event, ...], times: float = 1.0) -> Iterator[tuple[float, Event]]:
    for event in events:
        if isinstance(event, Loop):
            yield from _flat(event.body, times * event.times)
        else:
            yield times, event


Part = Literal["parameters", "optimizer_states", "gradients", "activations", "temporaries", "cache", "batch"]


@dataclass(frozen=True)
class Buffer:
    """bytes: of one device. shape: as HLO writes it. name: of the instruction that makes it. source: file:line."""

    bytes: int
    part: Part
    shape: str
    name: str
    source: str


@dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    parts: what lives at the peak, by kind; the sum is `peak`.
    peak: the largest sum of buffers that live at once.
    allocated: what the device must give: XLA lays the temporaries into one block, which has gaps.
    host: of its share of the host's memory.
    largest: buffers that live at the peak, largest first.
    over_program: (place from 0 to 1, bytes alive), along the schedule.
    """

    parts: dict[Part, int]
    peak: int
    allocated: int
    host: int
    largest: tuple[Buffer, ...]
    over_program: tuple[tuple[float, int], ...]
    origin: Literal["compiled", "estimated"]
