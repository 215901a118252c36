"""One layer on one device, estimated from the settings: its products, its passes over memory, its transfers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from moe.planner.exchange_work import RowExchange
from moe.planner.implementation import Implementation
from moe.planner.sizes import Sizes
from moe.planner.work import Event, Run, Start, Transfer, TransferKind, Use, Wait

Flags = dict[str, Any]
"""`recomputed` and `backward` of `work.Run` and `work.Transfer`."""


def alone(transfer: Transfer) -> tuple[Event, ...]:
    """Nothing runs beside it."""
    return beside(transfer)


def beside(transfer: Transfer, *events: Event) -> tuple[Event, ...]:
    """`events` run while it is under way. Between devices that are one, there is no transfer."""
    if transfer.devices == 1 and transfer.kind not in ("to-host", "to-device"):
        return events
    return (Start(transfer), *events, Wait(transfer.name))


def together(transfers: Iterable[Transfer], events: Iterable[Event]) -> tuple[Event, ...]:
    """`events` run while all the transfers are under way."""
    found = tuple(events)
    for transfer in transfers:
        found = beside(transfer, *found)
    return found


@dataclass(frozen=True)
class Weight:
    """One matrix of a layer, k x n on a device that has gathered it; of experts, `batch` such."""

    name: str
    use: Use
    k: int
    n: int
    batch: int = 1

    @property
    def numbers(self) -> int:
        return self.batch * self.k * self.n


@dataclass(frozen=True)
class Layer:
    """
    dense: whether its feed-forward network is a plain one.
    projects_kv: whether it has keys and values of its own.
    ends: whether it is the last of its cross-layer group, whose output no recomputation needs.
    """

    sizes: Sizes
    how: Implementation
    dense: bool
    projects_kv: bool
    ends: bool
    place: int

    @property
    def exchange(self) -> RowExchange:
        return RowExchange(self.sizes, self.how, f"{self.place}.exchange")

    def weights(self) -> list[Weight]:
        s, model, t = self.sizes, self.sizes.model, self.sizes.tensor
        D, H = model.d_model, model.head_dim
        found = [Weight("w_q", "attention", D, model.num_heads * H // t)]
        if self.projects_kv:
            found += [Weight(name, "attention", D, model.num_kv_heads * H // t) for name in ("w_k", "w_v")]
        found.append(Weight("w_o", "attention", model.num_heads * H // t, D))
        if self.dense:
            return found + self._gated("dense", model.d_dense // t)
        found.append(Weight("w_router", "router", D, model.num_experts))
        found += self._gated("experts", s.expert_width, s.experts)
        if model.num_shared_experts:
            found += self._gated("shared_expert", model.num_shared_experts * model.d_expert // t)
        return found

    def adapters(self) -> list[Weight]:
        """Two for each weight that has an adapter, the first from its inputs to the rank, the second on to its
        outputs."""
        lora = self.sizes.job.lora
        if lora is None:
            return []
        return [
            Weight(f"{weight.name}.{half}", weight.use, k, n, weight.batch)
            for weight in self.weights()
            if weight.name.removeprefix("w_") in lora.targets
            for half, k, n in (("a", weight.k, lora.rank), ("b", lora.rank, weight.n))
        ]

    def _adapters_of(self, use: Use, *names: str) -> list[Weight]:
        """Beside the weights of these names."""
        return [each for each in self.adapters() if each.use == use and each.name.split(".")[0] in names]

    @property
    def trained(self) -> list[Weight]:
        return self.adapters() or self.weights()

    def _gated(self, use: Use, width: int, batch: int = 1) -> list[Weight]:
        D = self.sizes.model.d_model
        return [
            Weight("gate", use, D, width, batch),
            Weight("up", use, D, width, batch),
            Weight("down", use, width, D, batch),
        ]

    def gathers(self, *, backward: bool) -> list[Transfer]:
        """Of its weights, for one use."""
        s = self.sizes
        if s.job.layout.zero < 3:
            return []
        return [
            s.transfer(
                self._name("gather", weight.use, weight.name, backward=backward), weight.use, "all-gather",
                s.gathered_over(weight.use), weight.numbers * s.travels(weight.use),
                backward=backward, recomputed=backward,
            )
            for weight in self.weights()
        ]  # fmt: skip

    def widened(self, *, backward: bool) -> list[Run]:
        """The passes in which its weights at rest become what products take: of a device's share before the gather, or
        if they are quantized of the whole after it; of both if they are quantized for the gather alone."""
        s = self.sizes
        found = []
        for weight in self.weights():
            shares = s.over(*s.gathered_over(weight.use)) if s.job.layout.zero == 3 else 1
            moved = 0.0
            if s.job.precision.gathered and shares > 1 and weight.use != "router":
                moved = weight.numbers * ((s.matrices + 1) / shares + 1 + s.compute)
            elif s.matrices != s.compute:
                moved = weight.numbers / (1 if s.job.precision.quantized else shares) * (s.matrices + s.compute)
            flags: Flags = {"backward": backward, "recomputed": backward}
            if moved:
                found.append(Run(f"widen.{weight.name}", weight.use, "elementwise", 0.0, moved, s.format, **flags))
        return found

    def _sum(self, weight: Weight, size: int) -> Transfer:
        s = self.sizes
        spared = s.job.layout.experts if weight.use == "experts" else ()
        axes = tuple(axis for axis in s.token_axes if axis not in spared)
        kept = s.expert_fsdp if weight.use == "experts" else s.fsdp
        scattered = self.how.scatters or (s.job.layout.zero >= 2 and set(axes) == set(kept))
        kind: TransferKind = "reduce-scatter" if scattered else "all-reduce"
        name = self._name("sum", weight.use, weight.name, backward=True)
        return s.transfer(name, weight.use, kind, axes, weight.numbers * size, backward=True)

    def forward(self, *, recomputed: bool = False, needed: bool = True) -> Iterator[Event]:
        """
        Args:
            recomputed: in the backward pass, where it repeats the forward one.
            needed: whether anything needs the layer's output.
        """
        flags = {"recomputed": recomputed, "backward": recomputed}
        yield from self._attention(flags)
        if self.dense:
            yield from self._feed_forward("dense", flags, down=needed)
        else:
            yield from self._experts(flags, needed)

    def backward(self, sums: int) -> Iterator[Event]:
        """
        Args:
            sums: bytes of a number of the weights' gradients, which are summed over the devices here; 0 for not here.
        """
        flags = {"backward": True}
        kernels = self._backward_kernels(flags)
        pending = [self._sum(weight, sums) for weight in reversed(self.trained)] if sums else []
        hidden: list[Transfer] = []
        if not self.dense:
            for first, rest in (self.exchange.there(**flags), self.exchange.back(**flags)):
                yield from alone(first)
                hidden += rest
        within = self._tensor_transfers(flags)
        yield from (event for transfer in within if not self._hidden(transfer) for event in alone(transfer))
        hidden += [transfer for transfer in within if self._hidden(transfer)]
        if self.how.prefetches:
            hidden, pending = hidden + pending, []
        yield from together(hidden, self._summing(kernels, pending))

    def _hidden(self, transfer: Transfer) -> bool:
        return self.how.hides_tensor and transfer.use != "experts"

    def _summing(self, kernels: list[Run], pending: list[Transfer]) -> Iterator[Event]:
        """Each sum runs beside two products, as many as there are for each weight; what is left over beside nothing."""
        beside_it: list[Run] = []
        for kernel in kernels:
            beside_it.append(kernel)
            if pending and sum(each.kind in ("matmul", "grouped_matmul") for each in beside_it) == 2:
                yield from beside(pending.pop(0), *beside_it)
                beside_it = []
        yield from beside_it
        for transfer in pending:
            yield from alone(transfer)

    def _attention(self, flags: Flags) -> Iterator[Event]:
        s, model = self.sizes, self.sizes.model
        wide = model.num_heads * model.head_dim // s.tensor
        yield s.pass_over("norm", "attention", s.stream * model.d_model * self.how.passes, 3, **flags)
        projections = [
            s.product(weight.name, "attention", s.tokens, weight.n, weight.k, **flags)
            for weight in [*self.weights(), *self.adapters()]
            if weight.use == "attention" and weight.name != "w_o"
        ]
        yield from self._with_product(self._gather_stream("attention", flags), *projections)
        yield s.pass_over("rope", "attention", s.tokens * wide * self.how.passes, 6, **flags)
        yield from (event for transfer in self._heads(flags) for event in alone(transfer))
        yield self._scores(**flags)
        output = s.product("w_o", "attention", s.tokens, model.d_model, wide, **flags)
        yield from self._with_product(self._scatter_stream("attention", flags), output)
        yield s.pass_over("residual", "attention", s.stream * model.d_model * self.how.passes, 3, **flags)

    def _with_product(self, transfer: Transfer, *products: Run) -> tuple[Event, ...]:
        """What `tensor` exchanges before or after products that it splits."""
        return beside(transfer, *products) if self.how.hides_tensor else (*alone(transfer), *products)

    def _scores(self, **flags: Any) -> Run:
        """Of whole sequences for some of the heads, or of all heads for some of the queries: the same number."""
        s, model, job = self.sizes, self.sizes.model, self.sizes.job
        heads = model.num_heads // s.tensor
        per_device = s.sequences * heads / (s.over("sequence") if s.splits else 1)
        pairs = float(job.sequence_length) if job.kind == "decode" else s.length * (s.length + 1) / 2
        flops = 4.0 * per_device * pairs * model.head_dim * self.how.scores
        kv = 2 * max(1, model.num_kv_heads // s.tensor) * job.sequence_length * s.sequences * model.head_dim
        # Of a cache in 8 bits the group's part is widened before it is read.
        copied = kv * (s.kept + s.compute) if job.precision.cache and job.kind != "train" else 0
        moved = (2 * s.tokens * heads * model.head_dim + kv) * s.compute + copied
        shape = (s.sequences * heads, s.length, job.sequence_length, model.head_dim)
        return Run("scores", "attention", "attention", flops, float(moved), s.format, shape, **flags)

    def _heads(self, flags: Flags) -> list[Transfer]:
        """What `sequence` exchanges around the scores."""
        s, model = self.sizes, self.sizes.model
        if s.over("sequence") == 1 or s.job.kind == "decode":
            return []
        queries = s.tokens * model.num_heads // s.tensor * model.head_dim * s.compute
        keys = s.tokens * max(1, model.num_kv_heads // s.tensor) * model.head_dim * s.compute
        if s.job.layout.sequence == "ring":
            steps = [f"ring_{x}{i}" for i in range(s.over("sequence") - 1) for x in "kv"]
            return [self._named(n, "attention", "collective-permute", ("sequence",), keys, flags) for n in steps]
        sizes = {"q": queries, "y": queries} | ({"k": keys, "v": keys} if self.projects_kv else {})
        return [
            self._named(f"heads_{n}", "attention", "all-to-all", ("sequence",), size, flags)
            for n, size in sizes.items()
        ]

    def _feed_forward(self, use: Use, flags: Flags, *, down: bool = True) -> Iterator[Event]:
        s, D = self.sizes, self.sizes.model.d_model
        width = next(w.n for w in self.weights() if w.use == use and w.name == "up")
        if use == "dense":
            yield s.pass_over("norm", "dense", s.stream * D * self.how.passes, 3, **flags)
        inward = [s.product(name, use, s.tokens, width, D, **flags) for name in ("gate", "up")]
        inward += [s.product(w.name, use, s.tokens, w.n, w.k, **flags) for w in self._adapters_of(use, "gate", "up")]
        yield from self._with_product(self._gather_stream(use, flags), *inward)
        yield s.pass_over("silu", use, s.tokens * width * self.how.passes, 3, **flags)
        if down:
            outward = [s.product("down", use, s.tokens, D, width, **flags)]
            outward += [s.product(w.name, use, s.tokens, w.n, w.k, **flags) for w in self._adapters_of(use, "down")]
            yield from self._with_product(self._scatter_stream(use, flags), *outward)
        yield s.pass_over("residual", use, s.stream * D * self.how.passes, 3, **flags)

    def _experts(self, flags: Flags, needed: bool) -> Iterator[Event]:
        s, model = self.sizes, self.sizes.model
        D, F, passes = model.d_model, s.expert_width, self.how.passes
        buffer = s.buffer if self.how.full_buffers else s.rows
        moved = self.exchange.passes() * D * passes
        yield s.pass_over("norm", "router", s.stream * D * passes, 3, **flags)
        yield s.product("w_router", "router", s.stream, model.num_experts, D, format="f32", **flags)
        if s.job.layout.splits_width:
            yield from alone(self._gather_stream("experts", flags))
        yield s.pass_over("dispatch", "exchange", moved, 1, **flags)
        (send, later_sends), (back, earlier_backs) = self.exchange.there(**flags), self.exchange.back(**flags)
        yield from alone(send)
        experts = [self._grouped(name, F, D, **flags) for name in ("gate", "up")]
        experts += [self._grouped(w.name, w.n, w.k, **flags) for w in self._adapters_of("experts", "gate", "up")]
        experts.append(s.pass_over("silu", "experts", buffer * F * passes, self.how.gate_passes, **flags))
        experts.append(self._grouped("down", D, F, **flags))
        experts += [self._grouped(w.name, w.n, w.k, **flags) for w in self._adapters_of("experts", "down")]
        yield from together(later_sends + earlier_backs, experts)
        shared = tuple(self._feed_forward("shared_expert", flags, down=needed)) if model.num_shared_experts else ()
        yield from beside(back, *shared)
        yield s.pass_over("combine", "exchange", moved, 1, **flags)
        if s.job.layout.splits_width:
            yield from alone(self._scatter_stream("experts", flags))

    def _grouped(self, name: str, n: int, k: int, **flags: Any) -> Run:
        s = self.sizes
        return s.product(name, "experts", s.rows, n, k, kind="grouped_matmul", batch=s.experts, **flags)

    def _tensor_transfers(self, flags: Flags) -> list[Transfer]:
        """Of the backward pass: what was gathered is scattered, and the other way round."""
        if self.sizes.tensor == 1:
            return self._heads(flags)
        uses: list[Use] = ["attention"]
        if self.dense:
            uses.append("dense")
        elif self.sizes.job.layout.splits_width:
            uses.append("experts")
        if not self.dense and self.sizes.model.num_shared_experts:
            uses.append("shared_expert")
        both = [each for use in uses for each in (self._gather_stream(use, flags), self._scatter_stream(use, flags))]
        # Of what is kept a device has its own positions, and the gradient of a weight takes those of all.
        kept = self.sizes.job.execution.remat == "none"
        both += [self._gather_stream(use, flags) for use in uses if kept and use != "experts"]
        return both + self._heads(flags)

    def _gather_stream(self, use: Use, flags: Flags) -> Transfer:
        """The residual stream of all devices of `tensor`, before a product that `tensor` splits."""
        axes = ("tensor",) if "tensor" in self.sizes.splits else ()
        return self._named("gather_stream", use, "all-gather", axes, self._stream_bytes(), flags)

    def _scatter_stream(self, use: Use, flags: Flags) -> Transfer:
        kind: TransferKind = "reduce-scatter" if "tensor" in self.sizes.splits else "all-reduce"
        return self._named("scatter_stream", use, kind, ("tensor",), self._stream_bytes(), flags)

    def _stream_bytes(self) -> float:
        return float(self.sizes.tokens * self.sizes.model.d_model * self.sizes.compute)

    def _backward_kernels(self, flags: Flags) -> list[Run]:
        """Two products for each of the forward pass, and about twice its passes over memory."""
        found: list[Run] = []
        trained = {weight.name for weight in self.trained}
        for event in reversed(list(self.forward())):
            if not isinstance(event, Run):
                continue
            if event.kind == "attention":
                # Five products instead of two (FlashAttention-2, arXiv 2307.08691, section 3.1).
                found.append(replace(event, flops=2.5 * event.flops, bytes=3 * event.bytes, **flags))
            elif event.shape is None:
                found.append(replace(event, bytes=2 * event.bytes, **flags))
            else:
                batch, m, n, k = event.shape
                grouped = event.kind == "grouped_matmul"
                rows = replace(event, name=event.name + "_dx", shape=(batch, m, k, n), **flags)
                # Each expert's matrix is k x n, contracted over its share of the rows.
                shape = (batch, batch * k, n, m // batch) if grouped else (batch, k, n, m)
                found.append(rows)
                if event.name in trained:
                    found.append(replace(event, name=event.name + "_dw", shape=shape, **flags))
        return found

    def _named(
        self, name: str, use: Use, kind: TransferKind, axes: tuple[str, ...], size: float, flags: Flags
    ) -> Transfer:
        full = self._name(use, name, backward=flags.get("backward", False))
        return self.sizes.transfer(full, use, kind, axes, size, **flags)

    def _name(self, *parts: str, backward: bool) -> str:
        return ".".join([str(self.place), *parts, "backward" if backward else "forward"])
