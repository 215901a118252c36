"""What falls to one device of a job's mesh: tokens, weights, and how its collectives lie over the nodes. No array, no
compiler: products of settings."""

import functools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moe.model.config import ModelConfig
from moe.model.router import capacity
from moe.ops.quantize import GROUPS
from moe.planner.job import Job
from moe.planner.transfers import sent
from moe.planner.work import Run, RunKind, Transfer, TransferKind, Use
from parallel.blocks import block_size
from parallel.layout import BATCH_AXES, FSDP_AXES
from parallel.mesh import MeshConfig

BYTES: dict[str, float] = {
    "float32": 4, "bfloat16": 2, "int8": 1, "fp8": 1, "int4": 0.5 + 2 / GROUPS["int4"], "nf4": 0.5 + 2 / GROUPS["nf4"],
}  # fmt: skip
"""Of a number at rest, with its share of the scales where a group has one (moe/ops/quantize.py)."""
SHORT = {"float32": "f32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Sizes:
    """Of one microbatch on one device.

    devices_per_node: consecutive devices of the mesh that share a node.
    """

    job: Job
    devices_per_node: int

    @property
    def model(self) -> ModelConfig:
        return self.job.model

    def over(self, *axes: str) -> int:
        """Devices along these axes together."""
        return math.prod(self.job.mesh.sizes[axis] for axis in axes)

    @property
    def tensor(self) -> int:
        return self.over("tensor")

    @property
    def length(self) -> int:
        """T: tokens of each sequence that go through the layers, over all devices."""
        return 1 if self.job.kind == "decode" else self.job.sequence_length

    @property
    def splits(self) -> tuple[str, ...]:
        """Axes that split the residual stream's positions (`parallel.layout.Layout.for_length`)."""
        whole = ("sequence", "tensor")
        return next((axes for axes in (whole, whole[:1]) if self.length % self.over(*axes) == 0), ())

    @cached_property
    def sequences(self) -> int:
        """Of this device in one microbatch."""
        return max(1, self.job.batch_size // (self.over(*BATCH_AXES) * self.job.microbatches))

    @property
    def tokens(self) -> int:
        """A: in the products, which see the positions of all devices of `tensor`."""
        return self.sequences * self.length // self.over(*self.splits[:1])

    @property
    def stream(self) -> int:
        """Tokens in the residual stream."""
        return self.sequences * self.length // self.over(*self.splits)

    @property
    def routed(self) -> int:
        """Tokens whose rows this device sends to the experts."""
        return self.tokens if self.job.layout.splits_width else self.stream

    @property
    def rows(self) -> int:
        """Of this device's experts, where the router is even: as many as it sends."""
        return self.routed * self.model.router.top_k

    @property
    def expert_devices(self) -> int:
        return self.over(*self.job.layout.experts)

    @property
    def experts(self) -> int:
        """Of this device."""
        return self.model.num_experts // self.expert_devices

    @property
    def expert_width(self) -> int:
        """F of this device's part of its experts."""
        return self.model.d_expert // (self.tensor if self.job.layout.splits_width else 1)

    @property
    def block(self) -> int:
        """Rows that a padded exchange has room for for each other device (`parallel.exchange.route.block_rows`)."""
        slots = capacity(self.model.router, self.model.num_experts, self.length)
        limit = self.routed if slots is None else min(self.routed, self.sequences * slots)
        if self.job.kind != "train":
            limit = self.routed
        return min(self.rows, limit * self.experts)

    @property
    def buffer(self) -> int:
        """S: rows of the buffer that holds what arrives."""
        return self.expert_devices * self.block

    @property
    def compute(self) -> int:
        """Bytes of a number in the compute format."""
        return int(BYTES[self.job.precision.compute])

    @property
    def kept(self) -> float:
        """Bytes of a number of the cache, with its share of a head's scale."""
        format = self.job.precision.cache
        return self.compute if format is None else BYTES[format] + 2 / self.model.head_dim

    @property
    def format(self) -> str:
        return SHORT[self.job.precision.compute]

    @property
    def has_frozen(self) -> bool:
        """Whether nothing trains the model's own weights: it serves, or lies beneath adapters."""
        return self.job.kind != "train" or self.job.lora is not None

    @property
    def stored(self) -> float:
        """Bytes of a parameter of the embedding, the head or a router at rest."""
        policy = self.job.precision
        as_trained = not self.has_frozen or policy.quantized or policy.frozen is None
        return BYTES[policy.parameters if as_trained else str(policy.frozen)]

    @property
    def matrices(self) -> float:
        """Bytes of a parameter of all other matrices at rest."""
        policy = self.job.precision
        return BYTES[policy.quantized] if self.has_frozen and policy.quantized else self.stored

    def travels(self, use: Use) -> float:
        """Bytes of a number of a matrix when it is gathered: cast before, or if it is in 8 bits or fewer widened after,
        with its share of what its blocks share (parallel/blocks.py)."""
        if use == "router":
            return self.compute
        if self.job.precision.gathered:
            return 1 + 1 / block_size(self.model.d_model // self.over(*self.gathered_over(use)))
        return min(self.matrices, self.compute) if self.job.precision.quantized else self.compute

    def gathered_over(self, use: Use) -> tuple[str, ...]:
        """Axes over which the weights of a layer are shared out between uses."""
        return self.expert_fsdp if use == "experts" else self.fsdp

    @property
    def fsdp(self) -> tuple[str, ...]:
        """Axes over which weights outside the experts are shared out between uses. A stage has layers of its own."""
        return tuple(axis for axis in FSDP_AXES[:3] if self.over(axis) > 1)

    @property
    def expert_fsdp(self) -> tuple[str, ...]:
        return tuple(axis for axis in self.fsdp if axis not in self.job.layout.experts)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Axes whose devices have tokens of their own: over these gradients are summed."""
        return tuple(axis for axis in (*BATCH_AXES, "sequence") if self.over(axis) > 1)

    def product(
        self, name: str, use: Use, m: int, n: int, k: int, *, kind: RunKind = "matmul", batch: int = 1,
        format: str = "", out: int = 0, **flags: Any,
    ) -> Run:  # fmt: skip
        """m x k by k x n; of a grouped product m rows in all, over `batch` experts.

        Args:
            out: bytes of a number of the result; 0 for as many as of the operands.
        """
        format = format or self.format
        size = 4 if format == "f32" else 2
        grouped = kind == "grouped_matmul"
        flops = 2.0 * m * n * k * (1 if grouped else batch)
        # The gradient of the experts' matrices contracts the rows: there k counts them.
        moved = size * (m * k + batch * k * n) + (out or size) * m * n
        return Run(name, use, kind, flops, float(moved), format, (batch, m, n, k), **flags)

    def pass_over(self, name: str, use: Use, numbers: float, passes: float, **flags: Any) -> Run:
        """A fused elementwise kernel that reads or writes arrays of `numbers`, `passes` in all."""
        return Run(name, use, "elementwise", 0.0, numbers * passes * self.compute, self.format, **flags)

    def transfer(
        self, name: str, use: Use, kind: TransferKind, axes: tuple[str, ...], size: float, **flags: Any
    ) -> Transfer:
        """
        Args:
            size: S of `work.Transfer`, bytes.
        """
        axes = tuple(axis for axis in self.job.mesh.sizes if axis in axes and self.over(axis) > 1)
        devices, nodes = self.spread(axes)
        inside, across = sent(kind, size, devices, nodes)
        return Transfer(name, use, kind, axes, devices, nodes, inside, across, **flags)

    def spread(self, axes: tuple[str, ...]) -> tuple[int, int]:
        """(devices, nodes) of a group along `axes`: of those that lie differently, the one that is spread widest."""
        return self.over(*axes), nodes_of(self.job.mesh, axes, self.devices_per_node)


@functools.cache
def nodes_of(mesh: MeshConfig, axes: tuple[str, ...], devices_per_node: int) -> int:
    """The most nodes over which one group of devices along `axes` lies."""
    if not axes:
        return 1
    sizes = mesh.sizes
    nodes = np.arange(mesh.num_devices).reshape(tuple(sizes.values())) // devices_per_node
    last = [list(sizes).index(axis) for axis in axes]
    groups = np.moveaxis(nodes, last, range(-len(last), 0)).reshape(-1, math.prod(sizes[axis] for axis in axes))
    return int((np.diff(np.sort(groups)) > 0).sum(1).max()) + 1
