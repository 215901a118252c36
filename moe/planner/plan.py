"""A plan: what one step of a job needs of a chip and a cluster, and how long it takes; compiled, or estimated."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from flax import nnx

from moe.model.config import ConfigError, ModelConfig
from moe.model.count import count_parameters, train_flops_per_token
from moe.model.execution import Execution
from moe.model.parameter import specs_of
from moe.model.precision import Precision
from moe.model.transformer import Transformer
from moe.planner.buffers import memory_of
from moe.planner.chips import Chip
from moe.planner.compile import Facts, compile_job
from moe.planner.count import count, key_blocks
from moe.planner.estimate import estimate_work, idle_share
from moe.planner.estimate_memory import estimate_memory
from moe.planner.job import Job
from moe.planner.predict import Prediction, predict
from moe.planner.routing import LOADS, Skew, routed_rows, skew_of
from moe.planner.totals import Exchange, Spent, exchanges_of, spent_by_use
from moe.planner.work import Memory, Work
from parallel.network.cluster import Cluster
from parallel.network.links import Links

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Room:
    """Bytes of a GPU that the program cannot have.

    cuda: its context and the code of kernels. nccl: its communicators' buffers. fragmentation: gaps between arrays.
    """

    cuda: int
    nccl: int
    fragmentation: int

    @property
    def total(self) -> int:
        return self.cuda + self.nccl + self.fragmentation


CUDA_ROOM = 512 << 20
"""An assumption: a context with its kernels' code takes 0.3 to 0.6 GiB on these chips."""
COMMUNICATOR_ROOM = 688 << 20
"""Of the first group of devices whose communicator is made, and of each further one (NVIDIA/nccl issue 964: 688 MB for
four A100s, the context included)."""
ALL_TO_ALL_ROOM = int(3.3e9)
"""Of a communicator that connects every pair (NVIDIA/nccl issue 1685: 4.34 GB instead of 1.06 after the first
all-to-all of 8 H100s)."""
FRAGMENTATION = 0.02
"""Of what is allocated: an assumption. The temporaries are one block, so only arrays that outlast a step have gaps."""


def room_of(work: Work, memory: Memory) -> Room:
    """One communicator for each set of mesh axes, by what travels over it."""
    groups: dict[tuple[str, ...], int] = {}
    for _, transfer in work.transfers():
        if transfer.kind not in ("to-host", "to-device"):
            every_pair = "all-to-all" in transfer.kind
            needs = ALL_TO_ALL_ROOM if every_pair else COMMUNICATOR_ROOM
            groups[transfer.axes] = max(needs, groups.get(transfer.axes, 0))
    return Room(CUDA_ROOM, sum(groups.values()), int(FRAGMENTATION * memory.allocated))


@dataclass(frozen=True)
class Unbalanced:
    """A step whose router overloads one device. prediction: of that device, for which all others wait."""

    skew: Skew
    prediction: Prediction


@dataclass(frozen=True)
class Plan:
    """
    facts: what XLA said; None where the work was estimated.
    links: measured ones, where they take the place of what chip and cluster say.
    parameters, active: of the model. model_flops: of a step over all devices, without recomputation.
    """

    job: Job
    chip: Chip
    cluster: Cluster
    work: Work
    memory: Memory
    facts: Facts | None
    room: Room
    parameters: int
    active: int
    model_flops: float
    links: Links | None = None

    @property
    def origin(self) -> Literal["compiled", "estimated"]:
        return self.work.origin

    @property
    def devices(self) -> int:
        return self.job.mesh.num_devices

    @property
    def peak(self) -> float:
        """FLOP/s of the chip in bfloat16, or in float16 where it has no bfloat16: what MFU is a share of."""
        return self.chip.bf16 or self.chip.fp16

    @property
    def spare(self) -> int:
        """Bytes that a GPU has left; below 0, bytes that it lacks."""
        return self.chip.memory - self.memory.allocated - self.room.total

    @property
    def fits(self) -> bool:
        return self.spare >= 0

    @property
    def executed_ratio(self) -> float:
        """FLOPs that all devices execute, to those of the model."""
        return self.work.flops * self.devices / self.model_flops

    @property
    def memory_fraction(self) -> float:
        """What JAX must be allowed of a GPU's memory (XLA_CLIENT_MEM_FRACTION): all but CUDA's and NCCL's room."""
        return max(0.0, 1 - (self.room.cuda + self.room.nccl) / self.chip.memory)

    @cached_property
    def prediction(self) -> Prediction:
        """With an even router."""
        return self._timed(1.0)

    @cached_property
    def unbalanced(self) -> tuple[Unbalanced, ...]:
        """For as many of LOADS as the devices allow."""
        skews = [skew for load in LOADS if (skew := skew_of(self.job, load)) is not None]
        return tuple(Unbalanced(skew, self._timed(skew.kept)) for skew in skews)

    def _timed(self, load: float) -> Prediction:
        return predict(
            self.work,
            self.chip,
            self.cluster,
            tokens=self.job.tokens,
            model_flops=self.model_flops,
            links=self.links,
            load=load,
            idle=idle_share(self.job),
        )

    @cached_property
    def uses(self) -> tuple[Spent, ...]:
        """The arithmetic by what it is for, most FLOPs first."""
        return spent_by_use(self.work)

    @cached_property
    def exchanges(self) -> tuple[Exchange, ...]:
        """What goes between devices, most exposed first."""
        return exchanges_of(self.work, self.prediction)

    @property
    def chip_hours_per_trillion(self) -> float:
        """Hours of one chip for 1e12 tokens."""
        return 1e12 / self.prediction.tokens_per_second * self.devices / 3600


def make_plan(
    job: Job,
    chip: Chip,
    cluster: Cluster,
    *,
    links: Links | None = None,
    estimated: bool = False,
    report: Progress = lambda text: None,
) -> Plan:
    """
    Args:
        links: measured ones (`python -m parallel.network bench`), instead of those that chip and cluster describe.
        estimated: from the settings alone, without compiling.
        report: is told what goes on.

    Raises:
        ConfigError: the mesh does not fill the cluster.
        TargetError: compiling needs an environment that is not installed.
        CompileError, LayoutError: there is no such program.
    """
    check_filled(job, cluster)
    if estimated:
        work = estimate_work(job, cluster.gpus_per_node)
        return planned(job, chip, cluster, work, estimate_memory(job, chip, cluster.gpus_per_node), None, links)
    compiled = compile_job(job, chip, cluster, report=report)
    work = count(
        compiled.program(),
        job.mesh,
        cluster.gpus_per_node,
        routed_rows=routed_rows(job, cluster.gpus_per_node),
        key_blocks=key_blocks(job),
    )
    return planned(job, chip, cluster, work, memory_of(compiled), compiled.facts, links)


def planned(
    job: Job, chip: Chip, cluster: Cluster, work: Work, memory: Memory, facts: Facts | None, links: Links | None = None
) -> Plan:
    """The plan of a step whose work and memory are known."""
    parameters, active, flops = model_size(job)
    return Plan(job, chip, cluster, work, memory, facts, room_of(work, memory), parameters, active, flops, links)


def check_filled(job: Job, cluster: Cluster) -> None:
    """
    Raises:
        ConfigError: there are more devices than the mesh uses, or fewer.
    """
    present = cluster.nodes * cluster.gpus_per_node
    if job.mesh.num_devices != present:
        raise ConfigError(
            f"the mesh {job.mesh.text} has {job.mesh.num_devices} devices, and --nodes {cluster.nodes} x "
            f"--gpus-per-node {cluster.gpus_per_node} are {present} GPUs: change the mesh (--set mesh.data=…), or the "
            "nodes"
        )


def model_size(job: Job) -> tuple[int, int, float]:
    """Parameters, those active for a token, and FLOPs of the model in one step over all devices.

    A forward pass is a third of training's. A decoding step's one query sees `sequence_length` keys, not half of them.
    """
    specs = _specs(job.model, job.precision, job.execution)
    count = count_parameters(job.model, specs)
    seen = job.sequence_length * (2 if job.kind == "decode" else 1)
    flops = train_flops_per_token(job.model, specs, seen, frozen=job.lora is not None)
    return count.total, count.active, job.tokens * flops / (1 if job.kind == "train" else 3)


@functools.cache
def _specs(model: ModelConfig, precision: Precision, execution: Execution) -> dict[str, Any]:
    return specs_of(nnx.eval_shape(lambda: Transformer(model, precision, execution, rngs=nnx.Rngs(0))))
