"""A step's work from the settings alone: seconds instead of a compilation's half minute, and without its environment.

What a device computes and sends follows from model, mesh and layout; how much of it overlaps, and what XLA makes of
gathers and sums, is as our compiled programs show it (`implementation.py`). tests/gpu_compile/test_estimate.py holds
estimates against counts of compiled programs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moe.planner.estimate_states import moment_bytes
from moe.planner.implementation import OURS, Implementation
from moe.planner.job import Job
from moe.planner.layer_work import Layer, alone, together
from moe.planner.sizes import Sizes
from moe.planner.work import Event, Loop, Run, Start, Transfer, TransferKind, Use, Wait, Work
from parallel.pipeline import Schedule

PARAMETER_PASSES = 4
"""Numbers that AdamW reads (parameter, gradient, and this once more for its norm) and writes (parameter), beside what
it keeps for each parameter, which it reads and writes once."""


def estimate_work(job: Job, devices_per_node: int, how: Implementation = OURS) -> Work:
    """
    Args:
        devices_per_node: consecutive devices of the mesh that share a node.
        how: what the settings leave open; our own programs by default.

    Raises:
        ConfigError: as of `Job.check_estimated`.
    """
    job.check_estimated()
    step = _Step(Sizes(job, devices_per_node), how)
    return Work(tuple(step.serving() if job.kind != "train" else step.training()), "estimated")


def idle_share(job: Job) -> float:
    """Share of a pipeline's ticks in which a stage has nothing to do; 0 without stages."""
    if job.mesh.stage == 1:
        return 0.0
    schedule = Schedule(job.mesh.stage, job.virtual_stages, job.microbatches)
    return schedule.bubble / (1 + schedule.bubble)


@dataclass(frozen=True)
class Group:
    """The layers of one cross-layer group, which one turn of a loop goes through."""

    layers: tuple[Layer, ...]

    def forward(self, *, recomputed: bool = False) -> tuple[Event, ...]:
        kernels = [
            event
            for layer in self.layers
            for event in layer.forward(recomputed=recomputed, needed=not (recomputed and layer.ends))
        ]
        return self._with_weights(kernels, backward=recomputed)

    def _with_weights(self, events: list[Event], *, backward: bool) -> tuple[Event, ...]:
        """What becomes of the weights on their way into products, and the layers' events, during some of which weights
        arrive."""
        widened = (run for layer in self.layers for run in layer.widened(backward=backward))
        gathers = [each for layer in self.layers for each in layer.gathers(backward=backward)]
        # XLA, which unrolls loops by two, begins every other gather of experts while kernels run.
        late = gathers if self.layers[0].how.prefetches else [each for each in gathers if each.use == "experts"][1::2]
        early = (event for gather in gathers if gather not in late for event in alone(gather))
        return (*widened, *early, *together(late, events))

    def kept(self, kind: TransferKind) -> list[Event]:
        """Outputs of the products with weights, on their way to the host and back."""
        sizes = self.layers[0].sizes
        numbers = sum(
            run.shape[1] * run.shape[2]
            for layer in self.layers
            for run in layer.forward()
            if isinstance(run, Run) and run.kind == "matmul" and run.shape
        )
        inside = float(numbers * sizes.compute)
        return list(alone(Transfer("kept." + kind, "other", kind, (), 1, 1, inside, 0.0, backward=kind == "to-device")))

    def backward(self, remat: str, sums: int) -> tuple[Event, ...]:
        layers = [event for layer in reversed(self.layers) for event in layer.backward(sums)]
        if remat == "none":
            return self._with_weights(layers, backward=True)
        again = self.forward(recomputed=True)
        if remat == "full":
            return again + tuple(layers)
        again = tuple(event for event in again if not _kept(event))
        return (*(self.kept("to-device") if remat == "matmuls_on_host" else ()), *again, *layers)


def _kept(event: Event) -> bool:
    """Whether it makes what `remat` "matmuls" keeps: outputs of products with weights outside the experts."""
    if isinstance(event, Run):
        return event.kind == "matmul"
    name = event.transfer.name if isinstance(event, Start) else event.name if isinstance(event, Wait) else ""
    return "scatter_stream" in name and "experts" not in name


@dataclass(frozen=True)
class _Step:
    sizes: Sizes
    how: Implementation

    @property
    def job(self) -> Job:
        return self.sizes.job

    def groups(self) -> list[tuple[Group, int]]:
        """Each kind of group with how many of them follow each other."""
        found = []
        for dense, repeat in self.sizes.model.layer_groups():
            last = len(dense) - 1
            layers = (
                Layer(self.sizes, self.how, is_dense, place == 0, place == last, place)
                for place, is_dense in enumerate(dense)
            )
            found.append((Group(tuple(layers)), repeat))
        return found

    def training(self) -> Iterator[Event]:
        job = self.job
        if job.mesh.stage > 1:
            yield from self._pipelined()
        else:
            each, last = (
                (*self._embedding(), *self._forward(), *self._head(), *self._backward(sums))
                for sums in (self._sums_of_each, self._sums_of_last)
            )
            if job.microbatches > 1:
                yield Loop(job.microbatches - 1, each)
            yield from last
        yield from self._optimizer()

    @property
    def _sums_of_each(self) -> int:
        """Bytes of a number of the gradients that are summed in every microbatch, but the last."""
        return 0 if self.how.sums_once else self.sizes.compute

    @property
    def _sums_of_last(self) -> int:
        return 4 if self.how.sums_once else self.sizes.compute

    def serving(self) -> Iterator[Event]:
        s = self.sizes
        yield from self._embedding()
        yield from (Loop(repeat, group.forward()) for group, repeat in self.groups())
        yield from alone(self._gather("head", s.compute))
        yield s.product("logits", "head", s.sequences, s.model.vocab_size // s.tensor, s.model.d_model, out=4)

    def _forward(self) -> Iterator[Event]:
        on_host = self.job.execution.remat == "matmuls_on_host"
        for group, repeat in self.groups():
            yield Loop(repeat, (*group.forward(), *(group.kept("to-host") if on_host else ())))

    def _backward(self, sums: int) -> Iterator[Event]:
        for group, repeat in reversed(self.groups()):
            yield Loop(repeat, group.backward(self.job.execution.remat, sums))

    def _pipelined(self) -> Iterator[Event]:
        """One chunk a tick, forward and backward; ticks in which a stage idles are computed like all others
        (parallel/pipeline.py)."""
        job, s = self.job, self.sizes
        schedule = Schedule(job.mesh.stage, job.virtual_stages, job.microbatches)
        groups = self._of_one_chunk(job.mesh.stage * job.virtual_stages)
        handed = float(s.stream * s.model.d_model * s.compute)
        onward, back = (
            s.transfer(f"stage.{way}", "other", "collective-permute", ("stage",), handed, backward=way == "back")
            for way in ("onward", "back")
        )
        layers: tuple[Event, ...] = tuple(Loop(repeat, group.forward()) for group, repeat in groups)
        again = tuple(Loop(repeat, group.forward(recomputed=True)) for group, repeat in groups)
        each, last = (
            (
                *(again if self.how.lockstep else ()),
                *(Loop(repeat, group.backward(job.execution.remat, sums)) for group, repeat in reversed(groups)),
            )
            for sums in (self._sums_of_each, self._sums_of_last)
        )
        yield Loop(schedule.forward_ticks, self._handing((*self._embedding(), *layers), onward))
        yield Loop(job.microbatches, tuple(self._head()))
        yield Loop(schedule.forward_ticks - job.virtual_stages, self._handing(each, back))
        yield Loop(job.virtual_stages, self._handing(last, back))

    def _handing(self, events: tuple[Event, ...], transfer: Transfer) -> tuple[Event, ...]:
        return together([transfer], events) if self.how.hides_stages else (*events, *alone(transfer))

    def _of_one_chunk(self, chunks: int) -> list[tuple[Group, float]]:
        """Groups of layers of which every stage computes so many in a tick."""
        groups = self.groups()
        longest = max(repeat for _, repeat in groups)
        return [
            (group, repeat if self.how.lockstep and repeat != longest else repeat / chunks) for group, repeat in groups
        ]

    def _embedding(self) -> Iterator[Event]:
        s = self.sizes
        yield from alone(self._gather("embedding", s.stored))
        if self.how.whole_table and self.job.kind != "decode":
            table = s.model.vocab_size * s.model.d_model * s.stored
            yield from alone(s.transfer("gather.embedding.tensor", "embedding", "all-gather", ("tensor",), table))
        yield s.pass_over("lookup", "embedding", s.tokens * s.model.d_model, 3)

    def _head(self) -> Iterator[Event]:
        """Loss and its gradients, chunk by chunk (moe/train/loss.py)."""
        s, job, D = self.sizes, self.job, self.sizes.model.d_model
        V = s.model.vocab_size // s.tensor
        length = s.length // s.over("sequence", *(("stage",) if self.how.deals_head else ()))
        chunk = min(job.loss_chunk, length)
        m = s.sequences * chunk
        stream = float(s.sequences * length * D * s.compute)
        yield from alone(self._gather("head", s.compute))
        yield from alone(s.transfer("gather.hidden", "head", "all-gather", ("tensor",), stream))
        yield Loop(
            math.ceil(length / chunk),
            (
                s.product("logits", "head", m, V, D, out=4),
                s.pass_over("softmax", "head", m * V * 4 / s.compute, 3.5),
                # Added to the sum in float32.
                *([] if job.lora else [s.product("dhead", "head", V, D, m, out=8, backward=True)]),
                s.product("dhidden", "head", m, D, V, backward=True),
            ),
        )
        yield from alone(s.transfer("scatter.hidden", "head", "reduce-scatter", ("tensor",), stream, backward=True))
        if not self.how.sums_once and not job.lora:
            yield from self._sums_of_tables()

    def _sums_of_tables(self) -> Iterator[Event]:
        """Gradients of the embedding and the head, in float32: over copies, then over the devices that keep parts."""
        s = self.sizes
        size = 4.0 * s.model.vocab_size // s.tensor * s.model.d_model
        copies = tuple(axis for axis in s.token_axes if axis not in s.fsdp)
        kind: TransferKind = "reduce-scatter" if self.job.layout.zero >= 2 else "all-reduce"
        for name in ("embedding", "head"):
            if name == "embedding" and s.tensor > 1 and self.how.whole_table:
                axes = (*s.token_axes, "tensor")
                whole = s.transfer("sum.embedding", name, "all-reduce", axes, s.tensor * size, backward=True)
                yield from alone(whole)
                continue
            shares = s.over(*s.fsdp) if name == "embedding" and self.job.layout.zero >= 2 else 1
            yield from alone(s.transfer(f"sum.{name}", "optimizer", kind, s.fsdp, size, backward=True))
            copied = s.transfer(f"sum.{name}.copies", "optimizer", "all-reduce", copies, size / shares, backward=True)
            yield from alone(copied)

    def _gather(self, use: Use, size: float) -> Transfer:
        s = self.sizes
        axes = s.fsdp if self.job.layout.zero == 3 else ()
        numbers = s.model.vocab_size // s.tensor * s.model.d_model
        return s.transfer(f"gather.{use}", use, "all-gather", axes, numbers * size)

    def trained(self) -> dict[tuple[str, ...], float]:
        """Numbers of this device's trained weights, gathered, by the axes over which they can be shared out."""
        s = self.sizes
        found = dict.fromkeys((s.fsdp, s.expert_fsdp), 0.0)
        if not self.job.lora:
            tables = 1 if s.model.tie_embeddings else 2
            found[s.fsdp] += tables * s.model.vocab_size // s.tensor * s.model.d_model
        for group, repeat in self.groups():
            for layer in group.layers:
                for weight in layer.trained:
                    axes = s.expert_fsdp if weight.use == "experts" else s.fsdp
                    found[axes] += weight.numbers * repeat / self.job.mesh.stage
        return found

    def _optimizer(self) -> Iterator[Event]:
        s, layout = self.sizes, self.job.layout
        if self.how.sums_once:
            yield from self._sums_of_tables()
        weights = self.trained()
        own = sum(numbers / s.over(*axes) for axes, numbers in weights.items())
        moments = 2 * own * moment_bytes(self.job)
        kept = moments + (own * s.stored if self.job.optimizer.rounding == "kahan" else 0)
        if layout.gradients == "host":
            # There once, and back for their norm and for the update.
            yield from self._by_host("gradients", "to-host", own * 4)
            yield from self._by_host("gradients", "to-device", 2 * own * 4)
        if layout.optimizer_states == "host":
            yield from self._by_host("states", "to-device", kept)
        yield Run("adamw", "optimizer", "elementwise", 0.0, own * 4 * PARAMETER_PASSES + 2 * kept, "f32")
        if layout.optimizer_states == "host":
            yield from self._by_host("states", "to-host", kept)
        if layout.zero < 3 and not self.how.sums_once:
            for axes, numbers in weights.items():
                name = "gather.parameters." + "x".join(axes)
                yield from alone(s.transfer(name, "optimizer", "all-gather", axes, numbers * s.stored))

    def _by_host(self, what: str, kind: TransferKind, size: float) -> tuple[Event, ...]:
        return alone(Transfer(f"{what}.{kind}", "optimizer", kind, (), 1, 1, size, 0.0))
