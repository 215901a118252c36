"""What a job needs in memory, from its settings alone: in milliseconds, with no compiler.

What stays from step to step is exact, by the same table of shardings that the program uses (parallel/layout.py). What
comes and goes is the sum of named terms, each of which stands for values that XLA was seen to hold at the peak of
compiled programs (buffers.py); `python -m benchmarks.plan_memory` compares the two.

Letters as everywhere (WORKSPACE.md); all sizes are of one device.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from moe.model.config import ModelConfig
from moe.model.execution import Execution
from moe.model.moe_layer import chunk_limit
from moe.model.parameter import ParameterSpec, specs_of
from moe.model.precision import Precision
from moe.model.router import capacity
from moe.model.transformer import Transformer, layer_groups
from moe.planner.chips import Chip
from moe.planner.job import Job
from moe.planner.work import Memory, Part
from moe.train.pipelined import check_stages, pipelined_stack
from moe.train.state import is_spec
from parallel.exchange import make_exchange
from parallel.layout import FSDP_AXES, Layout, SEQUENCE_AXIS, TENSOR_AXIS
from parallel.mesh import MeshConfig
from parallel.pipeline import Schedule


def estimate_memory(job: Job, chip: Chip, devices_per_node: int) -> Memory:
    """
    Raises:
        LayoutError, ConfigError: the job does not divide over its mesh.
    """
    sizes = _Sizes.of(job)
    parts = sizes.training() if job.kind == "train" else sizes.serving()
    total = sum(parts.values())
    return Memory(
        parts={part: size for part, size in parts.items() if size},
        peak=total,
        allocated=total,
        host=sizes.on_host,
        largest=(),
        over_program=(),
        origin="estimated",
    )


@lru_cache(maxsize=64)
def _specs(model: ModelConfig, precision: Precision) -> tuple[ParameterSpec, ...]:
    """Of all parameters; the same for every layout."""
    whole = nnx.eval_shape(lambda: Transformer(model, precision, Execution(), rngs=nnx.Rngs(0)))
    return tuple(jax.tree.leaves(specs_of(whole), is_leaf=is_spec))


def abstract_layout(job: Job) -> Layout:
    """The job's layout over a mesh without devices."""
    sizes = job.mesh.sizes
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    return Layout(mesh, job.layout)


def _bytes(sharding: NamedSharding | None, spec: ParameterSpec, dtype: Any = None) -> int:
    shape = sharding.shard_shape(spec.shape) if sharding else spec.shape
    return math.prod(shape) * jnp.dtype(dtype or spec.dtype).itemsize


@dataclass(frozen=True)
class _Sizes:
    """
    specs: of the parameters.
    tokens: of one microbatch between products, where sequences are split over `sequence` and `tensor`.
    gathered: the same inside products, where `tensor` splits heads and widths instead.
    compute: bytes of a number of the compute format.
    """

    job: Job
    layout: Layout
    specs: tuple[ParameterSpec, ...]
    sequences: int
    tokens: int
    gathered: int
    compute: int

    @classmethod
    def of(cls, job: Job) -> "_Sizes":
        whole = abstract_layout(job)
        check_stages(job.model, whole.stages, job.virtual_stages)
        if whole.stages > 1:
            Schedule(whole.stages, job.virtual_stages, job.microbatches)
        length = 1 if job.kind == "decode" else job.sequence_length
        layout = whole.for_length(length)
        sequences = _exact(job.batch_size, whole.batch_shards * job.microbatches, "batch_size")
        return cls(
            job,
            layout,
            _specs(job.model, job.precision),
            sequences,
            sequences * layout.tokens_length(length, gathered=False),
            sequences * layout.tokens_length(length, gathered=True),
            jnp.dtype(job.precision.compute).itemsize,
        )

    # What stays.

    @property
    def parameters(self) -> int:
        return sum(_bytes(self.layout.stored(each.axes, each.shape), each) for each in self.specs)

    @property
    def optimizer_states(self) -> int:
        """Adam's two moments, in the parameters' format, and the counts of steps."""
        sharded = (_bytes(self.layout.optimizer_state(each.axes, each.shape), each) for each in self.specs)
        return 2 * sum(sharded) + 8

    @property
    def on_host(self) -> int:
        on_host = self.job.kind == "train" and self.job.layout.optimizer_states == "host"
        return self.optimizer_states if on_host else 0

    @property
    def batch(self) -> int:
        """Tokens, positions, segments, targets and weights, four bytes each."""
        return 5 * 4 * self.job.microbatches * self.sequences * self.layout.tokens_length(
            self.job.sequence_length, gathered=True
        )

    @property
    def cache(self) -> int:
        model = self.job.model
        groups = math.ceil(model.num_layers / model.cla_factor)
        shape = (self.job.batch_size, groups, self.job.sequence_length, model.num_kv_heads, model.head_dim)
        return 2 * math.prod(self.layout.activation("BGSMH").shard_shape(shape)) * self.compute

    # Weights as they are used.

    def gathered_bytes(self, specs: "list[ParameterSpec]") -> int:
        """Matrices in the compute format, gathered over the FSDP axes; of all layers that `specs` stack and that this
        stage has."""
        return sum(math.prod(self._used_shape(each)) for each in specs) * self.compute

    def _used_shape(self, spec: ParameterSpec) -> tuple[int, ...]:
        shape = NamedSharding(self.layout.mesh, self.layout.used_spec(spec.axes)).shard_shape(spec.shape)
        if spec.axes.startswith("L") and spec.shape[0] % self.layout.stages == 0:
            return (shape[0] // self.layout.stages, *shape[1:])
        return shape

    def gradient_bytes(self, specs: "list[ParameterSpec]", dtype: Any = None) -> int:
        found = 0
        for each in specs:
            where = NamedSharding(self.layout.mesh, self.layout.gradient_spec(each.axes, each.shape[0]))
            found += _bytes(where, each, dtype)
        return found

    @property
    def stacked(self) -> "list[ParameterSpec]":
        """Matrices of the layers."""
        return [each for each in self.specs if each.axes.startswith("L") and len(each.axes) > 2]

    @property
    def transposed(self) -> int:
        """Copies of stacked matrices whose FSDP axis D is not their outermost: XLA turns the whole stack round before
        the loop over the layers, so that each layer's gather is contiguous."""
        if self.layout.config.zero < 3:
            return 0
        found = 0
        for each in self.stacked:
            where = self.layout.stored(each.axes, each.shape)
            shape = where.shard_shape(each.shape)
            place = each.axes.index("D")
            split = where.spec[place] if place < len(where.spec) else None
            if split and math.prod(shape[1:place]) > 1:
                found += _bytes(where, each)
        return found

    # Activations of one layer.

    @property
    def rows(self) -> tuple[int, int]:
        """(rows that a device sends, rows that its experts' buffers hold), the most that any routing needs."""
        job, layout, model = self.job, self.layout, self.job.model
        tokens = self.gathered if layout.config.splits_width else self.tokens
        slots = capacity(model.router, model.num_experts, 1 if job.kind == "decode" else job.sequence_length)
        limit = chunk_limit(self.sequences, tokens // self.sequences, slots, job.execution.exchange_chunks)
        sent = min(tokens * model.router.top_k, model.num_experts * limit)
        parts = layout.expert_parallelism
        return sent, parts * min(sent, model.num_experts // parts * limit)


    def training(self) -> dict[Part, int]:
        job, remat = self.job, self.job.execution.remat
        piped = self.layout.stages > 1
        groups = list(self._groups())
        kept = sum(count * self._kept(layers) for layers, count in groups)
        if piped:
            schedule = Schedule(self.layout.stages, job.virtual_stages, job.microbatches)
            kept += schedule.slots * self.compute * self.stream
        accumulators = self.gradient_bytes(self.specs, jnp.dtype(job.precision.gradients))
        copies = 3 if piped else 2 if job.microbatches > 1 else 0
        vocabulary = self._vocabulary()
        turned = self.transposed if remat != "none" or piped else 0
        backward = (
            self.gradient_bytes(self.stacked)
            + turned
            + 2 * 4 * vocabulary
            + max(self._backward(layers) for layers, _ in groups)
        )
        loss = self._loss(vocabulary)
        states = self.optimizer_states if not self.on_host else 0
        if backward >= loss:
            gradients = self.gradient_bytes(self.stacked) + 2 * 4 * vocabulary
        else:
            gradients = 2 * 4 * vocabulary
        moving = max(backward, loss)
        return {
            "parameters": self.parameters,
            "optimizer_states": states,
            "gradients": copies * accumulators + gradients,
            "activations": kept,
            "temporaries": moving - gradients,
            "batch": self.batch,
        }

    def serving(self) -> dict[Part, int]:
        groups = list(self._groups())
        weights = [self._layer_weights(layers) for layers, _ in groups]
        work = max(self._forward(layers) for layers, _ in groups)
        own = self.cache if self.job.kind == "prefill" else 0
        return {
            "parameters": self.parameters,
            "cache": self.cache,
            "temporaries": self.transposed + 2 * max(weights) + work + own,
            "batch": 0,
        }

    # Parts of the above.

    @property
    def stream(self) -> int:
        """Elements of x_BTD."""
        return self.tokens * self.job.model.d_model

    def _tensor(self) -> int:
        return self.job.mesh.tensor

    def _vocabulary(self) -> int:
        """Elements of the head's weight as it is used."""
        model = self.job.model
        return model.vocab_size // self._tensor() * model.d_model

    def _groups(self) -> Iterator[tuple[tuple[bool, ...], int]]:
        """(whether each layer of a group is dense, how many such groups this device keeps at once)."""
        found = layer_groups(self.job.model)
        pipelined = pipelined_stack(self.job.model) if self.layout.stages > 1 else -1
        for number, (layers, repeat) in enumerate(found):
            yield layers, repeat // (self.layout.stages * self.job.virtual_stages) if number == pipelined else repeat

    def _kept(self, layers: tuple[bool, ...]) -> int:
        """What the scan over groups saves of one for the backward pass."""
        remat, c = self.job.execution.remat, self.compute
        inputs = c * self.stream
        if remat == "full" or remat == "matmuls_on_host":
            return inputs
        if remat == "matmuls":
            return inputs + sum(self._products(dense, place == 0) for place, dense in enumerate(layers))
        weights = self._layer_weights(layers)
        return weights + sum(self._everything(dense, place == 0) for place, dense in enumerate(layers))

    @property
    def _heads(self) -> tuple[int, int]:
        """Elements of q_BTNH and of k_BSMH."""
        model = self.job.model
        per_head = self.gathered * model.head_dim
        return per_head * model.num_heads // self._tensor(), per_head * model.num_kv_heads // self._tensor()

    def _width(self, dense: bool) -> int:
        """Elements of the dense or shared network's hidden activation."""
        model = self.job.model
        width = model.d_dense if dense else model.num_shared_experts * model.d_expert
        return self.gathered * width // self._tensor()

    @property
    def _routed(self) -> tuple[int, int, int]:
        """Elements of the rows sent [R, D], of those that arrive [S, D], and of the experts' hidden activation [S, F]."""
        model = self.job.model
        sent, rows = self.rows
        width = model.d_expert // (self._tensor() if self.layout.config.splits_width else 1)
        return sent * model.d_model, rows * model.d_model, rows * width

    def _everything(self, dense: bool, projects_kv: bool) -> int:
        """All that the backward pass of one layer reads, as JAX saves it where nothing is recomputed.

        A norm keeps its input and its quotient in float32, and the quotient and its product with the weight in the
        compute format; a SwiGLU its two products, silu, its derivative's factors and the hidden activation.
        """
        model, c = self.job.model, self.compute
        norm = 8 + 2 * c
        q, kv = self._heads
        per_head = norm if model.qk_norm != "none" else 0
        found = 2 * norm * self.stream + (per_head + 3 * c) * q
        if projects_kv:
            found += (8 * bool(per_head) + 2 * c) * kv
        found += 6 * c * self._width(dense)
        if not dense:
            sent, rows, hidden = self._routed
            found += 4 * self.stream + 4 * 4 * self.tokens * model.num_experts
            found += 6 * c * hidden + c * rows + c * sent
        return found

    def _products(self, dense: bool, projects_kv: bool) -> int:
        """Outputs of the products with weights (jax.checkpoint_policies.dots_with_no_batch_dims_saveable); those with
        the experts' weights are grouped, and no such products."""
        c = self.compute
        q, kv = self._heads
        found = c * q + c * self.stream + (2 * c * kv if projects_kv else 0)
        width = self._width(dense)
        found += 2 * c * width + (c * self.stream if width else 0)
        return found if dense else found + 4 * self.tokens * self.job.model.num_experts

    def _recomputed(self, dense: bool) -> int:
        """Of a layer whose backward pass waits, once it is computed again: XLA keeps products and computes what lies
        between them where it is used."""
        c = self.compute
        q, kv = self._heads
        found = 4 * c * q + 3 * c * kv + 4 * c * self.stream + 2 * c * self._width(dense)
        if not dense:
            _, rows, hidden = self._routed
            found += 2 * c * hidden + c * rows
        return found

    def _backward(self, layers: tuple[bool, ...]) -> int:
        """The working set amid the backward pass of a group's last layer."""
        c, dense = self.compute, layers[-1]
        waiting = sum(self._recomputed(each) for each in layers[:-1])
        q, kv = self._heads
        own = 4 * c * q + 3 * c * kv + 5 * c * self.stream + 5 * c * self._width(dense)
        if not dense:
            _, rows, hidden = self._routed
            own += max(4 * c * hidden + 3 * c * rows, 3 * c * hidden + 7 * c * rows)
        weights = self._layer_weights(layers)
        return waiting + own + weights + self._layer_weights(layers[-1:])

    def _forward(self, layers: tuple[bool, ...]) -> int:
        c, dense = self.compute, layers[-1]
        q, kv = self._heads
        own = 3 * c * q + 3 * c * self.stream + 3 * c * self._width(dense)
        if not dense:
            sent, rows, hidden = self._routed
            own = max(own, 3 * c * hidden + 2 * c * rows)
        return own

    def _layer_weights(self, layers: tuple[bool, ...]) -> int:
        """Matrices of such layers in the compute format, gathered over the FSDP axes."""
        found = 0
        stacks = layer_groups(self.job.model)
        for number, (kinds, repeat) in enumerate(stacks):
            if kinds[-len(layers) :] != layers and kinds != layers:
                continue
            of_stack = [each for each in self.stacked if each.shape[0] == repeat]
            found = max(found, self.gathered_bytes(of_stack) * self.layout.stages // repeat * len(layers) // len(kinds))
        return found

    def _loss(self, vocabulary: int) -> int:
        """One chunk's logits in float32 and their gradient, the head's weight, and its gradient twice, for XLA unrolls
        the loop over chunks once."""
        job, c = self.job, self.compute
        chunk = min(job.loss_chunk, self.gathered // self.sequences)
        logits = self.sequences * chunk * job.model.vocab_size // self._tensor()
        hidden = 2 * c * self.gathered * job.model.d_model
        return (4 + 4 + c) * logits + c * vocabulary + 3 * 4 * vocabulary + hidden


def _exact(size: int, parts: int, name: str) -> int:
    if size % parts:
        raise ValueError(f"{name}={size} does not divide over {parts} parts")
    return size // parts
