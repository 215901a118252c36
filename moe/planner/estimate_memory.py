"""What a job needs in memory, from its settings alone: in milliseconds, with no compiler.

What stays from step to step is exact (estimate_states.py). What comes and goes is the largest of a few moments, each a
sum of named terms: `python -m benchmarks.plan_memory` compares it with what XLA allocates. Bytes of one device.
"""

from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from moe.model.cache import empty_cache, placed_cache
from moe.model.parameter import ParameterSpec
from moe.planner.chips import Chip
from moe.planner.estimate_layers import Group, Layers
from moe.planner.estimate_states import States, abstract_layout, numbers, states_of
from moe.planner.job import Job
from moe.planner.sizes import Sizes
from moe.planner.work import Memory, Part
from moe.train.pipelined import check_stages, pipelined_stack
from parallel.blocks import EightBit
from parallel.layout import Layout, LayoutError
from parallel.pipeline import Schedule


def estimate_memory(job: Job, chip: Chip, devices_per_node: int) -> Memory:
    """
    Raises:
        LayoutError, ConfigError, PipelineError: the job does not divide over its mesh, or asks for what is not
            estimated.
    """
    job.check_estimated()
    del chip  # Shapes are the same on all of them.
    estimate = _Estimate.of(job, devices_per_node)
    parts = estimate.training() if job.kind == "train" else estimate.serving()
    total = sum(parts.values())
    return Memory(
        parts={part: size for part, size in parts.items() if size},
        peak=total,
        allocated=total,
        host=estimate.host,
        largest=(),
        over_program=(),
        origin="estimated",
    )


@dataclass(frozen=True)
class _Estimate:
    job: Job
    layout: Layout
    sizes: Sizes
    states: States

    @classmethod
    def of(cls, job: Job, devices_per_node: int) -> "_Estimate":
        layout = abstract_layout(job)
        check_stages(job.model, layout.stages, job.virtual_stages)
        parts = layout.batch_shards * job.microbatches
        if job.batch_size % parts:
            raise LayoutError(
                f"batch_size={job.batch_size} does not divide over the {layout.batch_shards} parts of the batch and "
                f"microbatches={job.microbatches}: make it a multiple of {parts}"
            )
        return cls(job, layout, Sizes(job, devices_per_node), states_of(job, layout))

    @cached_property
    def layers(self) -> Layers:
        return Layers(self.sizes)

    def training(self) -> dict[Part, int]:
        stays: dict[Part, int] = {
            "parameters": self.states.parameters,
            "optimizer_states": 0 if self.job.layout.optimizer_states == "host" else self.states.optimizer_states,
            "batch": self.batch,
        }
        moments = (
            self._at_the_lookup(),
            self._at_the_loss(),
            self._in_the_backward_pass(),
            self._in_the_update(),
        )
        return stays | max(moments, key=lambda parts: sum(parts.values()))

    def serving(self) -> dict[Part, int]:
        """A prefill fills a cache of its own before it writes into the given one. Of weights that are not read as they
        are kept a group's are there, in decoding one layer's; and where they are gathered as many of the next, which
        come while these compute. Of a cache in 8 bits one group's part is widened for its attention."""
        groups = [group for group, _ in self.layers.groups()]
        times = 2 if self.job.layout.zero == 3 else 1
        layers = max(
            times * self.served_weights(group) // (len(group) if self.job.kind == "decode" else 1)
            + self.layers.forward(group)
            for group in groups
        )
        own = self.cache if self.job.kind == "prefill" else 0
        return {
            "parameters": self.states.parameters,
            "cache": self.cache,
            "temporaries": max(layers + self.widened, self.embedding) + own,
        }

    # What stays.

    @property
    def host(self) -> int:
        """Of the host's memory: what of states, gradients and activations waits there."""
        if self.job.kind != "train":
            return 0
        found = self.states.optimizer_states if self.job.layout.optimizer_states == "host" else 0
        found += self.gradients(self.stacked) if self.job.layout.gradients == "host" else 0
        if self.job.execution.remat == "matmuls_on_host":
            found += sum(count * self.layers.products(group) for group, count in self.layers.groups())
        return found

    @property
    def batch(self) -> int:
        """Tokens, positions, segments, targets and weights, four bytes each, of all microbatches."""
        return 5 * 4 * self.job.microbatches * self.sizes.tokens

    @property
    def cache(self) -> int:
        """Keys and values of each cross-layer group, and in 8 bits their scales."""
        return self._cache_bytes(self.job.precision.cache)

    @property
    def widened(self) -> int:
        """One group's part of a cache in 8 bits, in the compute format."""
        groups = sum(count for _, count in self.layers.groups())
        return self._cache_bytes(None) // groups if self.job.precision.cache else 0

    def _cache_bytes(self, format: EightBit | None) -> int:
        job, where = self.job, self.layout.activation
        make = partial(empty_cache, job.model, job.batch_size, job.sequence_length, job.precision.compute_dtype)
        cache = jax.eval_shape(partial(make, format=format))
        parts = placed_cache(cache, lambda x, axes: numbers(where(axes), x.shape) * x.dtype.itemsize)
        return sum(jax.tree.leaves(parts))

    # Weights, as they are used and turned, and their gradients.

    @cached_property
    def specs(self) -> tuple[ParameterSpec, ...]:
        return self.states.specs + self.states.frozen_specs

    @cached_property
    def stacked(self) -> list[ParameterSpec]:
        """Matrices of the layers that are trained."""
        return [each for each in self.states.specs if _is_stacked(each)]

    def weights(self, group: Group) -> int:
        """The matrices of a group in the compute format, gathered over the FSDP axes."""
        matrices, repeat = self._matrices(group)
        return self.sizes.compute * sum(map(self._used, matrices)) // repeat

    def served_weights(self, group: Group) -> int:
        """Of `weights` those that are not read as they are kept: gathered, or in another format."""
        matrices, repeat = self._matrices(group)
        made = [
            each
            for each in matrices
            if each.dtype.itemsize != self.sizes.compute or self._used(each) > self._kept(each)
        ]
        return self.sizes.compute * sum(map(self._used, made)) // repeat

    def _matrices(self, group: Group) -> tuple[list[ParameterSpec], int]:
        """Of all groups that are alike, and how many these are."""
        (repeat,) = {repeat for each, repeat in self.job.model.layer_groups() if each == group}
        return [each for each in self.specs if _is_stacked(each) and each.shape[0] == repeat], repeat

    def _kept(self, spec: ParameterSpec) -> int:
        """Numbers of a weight at rest; of all layers."""
        return numbers(self.layout.stored(spec.axes, spec.shape), spec.shape)

    def _used(self, spec: ParameterSpec) -> int:
        """Numbers of a weight that is gathered; of all layers."""
        return numbers(self._placed(self.layout.used_spec(spec.axes)), spec.shape)

    def _placed(self, spec: PartitionSpec) -> NamedSharding:
        assert self.layout.mesh is not None
        return NamedSharding(self.layout.mesh, spec)

    def gradients(
        self, specs: "list[ParameterSpec] | tuple[ParameterSpec, ...]", dtype: DTypeLike | None = None
    ) -> int:
        """As they are summed: shared out from ZeRO's stage 2 on. By default in the parameters' format."""
        found = 0
        for each in specs:
            where = self._placed(self.layout.gradient_spec(each.axes, each.shape[0]))
            found += numbers(where, each.shape) * jnp.dtype(dtype or each.dtype).itemsize
        return found

    @property
    def accumulators(self) -> int:
        """Sums over microbatches, beside one microbatch's gradients; a pipeline's are laid out as gradients are, all
        others XLA shares out as the optimizer's states."""
        if self.layout.stages > 1:
            return self.gradients(self.states.specs, self.job.precision.gradients)
        return self.sums if self.job.microbatches > 1 else 0

    def interleaved(self, chunks: int) -> int:
        """Chunks of virtual stages lie elsewhere than their layers at rest: the weights are there a second time in
        their order; and a third time those of chunks in work, one forward and one backward."""
        if self.job.virtual_stages == 1:
            return 0
        at_rest = sum(
            each.dtype.itemsize * numbers(self.layout.stored(each.axes, each.shape), each.shape)
            for each in self.stacked
        )
        return at_rest + chunks * at_rest // self.job.virtual_stages

    @property
    def sums(self) -> int:
        """The gradients as the optimizer takes them."""
        size = jnp.dtype(self.job.precision.gradients).itemsize
        return size * sum(
            numbers(self.layout.optimizer_state(each.axes, each.shape), each.shape) for each in self.states.specs
        )

    @property
    def head_gradient(self) -> int:
        """Of the output projection, in float32 and whole until it is summed over devices."""
        return 4 * self.vocabulary

    @property
    def vocabulary(self) -> int:
        """Numbers of w_VD as the head uses it."""
        return self.job.model.vocab_size // self.sizes.tensor * self.job.model.d_model

    @property
    def embedding(self) -> int:
        """The moment of the lookup: the embedding is gathered as it is stored, from a copy with its FSDP axis first."""
        (spec,) = [each for each in self.specs if each.kind == "embedding"]
        here, whole = numbers(self.layout.stored(spec.axes, spec.shape), spec.shape), self._used(spec)
        return (whole + here) * spec.dtype.itemsize if here < whole else 0

    # Moments of the step.

    def _at_the_lookup(self) -> dict[Part, int]:
        """The embedding, while the first layers' weights are on their way; a pipeline's tick looks up for its forward
        and its backward pass at once. Both take the same weights where a stage has but one group."""
        lookups = 2 if self.layout.stages > 1 else 1
        gathers = 1 if self.one_group_a_tick and self.job.virtual_stages == 1 else lookups
        first = max(self.weights(group) for group, _ in self.layers.groups())
        return {
            "gradients": self.accumulators,
            "activations": self.inputs,
            "temporaries": lookups * self.embedding + gathers * first + self.interleaved(2),
        }

    def _at_the_loss(self) -> dict[Part, int]:
        """One chunk's logits and their gradient in float32 and in the compute format; the head's weight; its gradient,
        three times where there are several chunks, for XLA computes two in one turn of their loop; the hidden states
        and their gradient. A pipeline's stages share out the positions."""
        job, sizes = self.job, self.sizes
        positions = sizes.tokens // sizes.sequences // self.layout.stages
        chunk = min(job.loss_chunk, positions)
        logits = sizes.sequences * chunk * job.model.vocab_size // sizes.tensor
        hidden = 2 * sizes.compute * sizes.tokens * job.model.d_model
        here = (8 + sizes.compute) * logits + sizes.compute * self.vocabulary + hidden
        return {
            "gradients": (3 if positions > chunk else 1) * self.head_gradient + self.accumulators,
            "activations": self.activations,
            "temporaries": here + self.interleaved(1),
        }

    def _in_the_backward_pass(self) -> dict[Part, int]:
        """Of the layers' gradients the whole stacks are there from its beginning, of a stage's chunk, but for those
        that are put to the host or added up as they come; and the head's. A second one of its size is there where the
        embedding is the same matrix: zeros to which its gradients are added. A pipeline's head has summed its
        gradients, and shared them out."""
        heads = (2 if self.job.model.tie_embeddings else 1) * self.head_gradient
        if self.layout.stages > 1:
            heads = self.gradients([each for each in self.states.specs if each.axes == "VD"])
        at_once = self.one_group_a_tick or self.job.layout.gradients == "host"
        stacks = 0 if at_once else self.gradients(self.stacked) // self.job.virtual_stages
        return {
            "gradients": self.accumulators + stacks + heads,
            "activations": self.activations,
            "temporaries": max(self.backward(group) for group, _ in self.layers.groups()) + self.interleaved(1),
        }

    def _in_the_update(self) -> dict[Part, int]:
        """Below ZeRO's stage 3 new parameters are gathered, one after the other in the place of the gradients, and all
        of them are copied into the old ones' place at the end; and of one parameter at a time the update is under way,
        in copies: parameter, two moments."""
        gathered = largest = 0
        for each in self.states.specs:
            here, at_rest = (
                each.dtype.itemsize * numbers(where(each.axes, each.shape), each.shape)
                for where in (self.layout.optimizer_state, self.layout.stored)
            )
            largest = max(largest, here)
            gathered += at_rest if at_rest > here else 0
        gradients = self.sums if self.job.microbatches > 1 else self.gradients(self.states.specs)
        if self.job.layout.on_host:
            gradients = 0
        under_way = 0 if self.job.layout.on_host or self.job.layout.zero == 3 else 3 * largest
        return {"gradients": gradients, "temporaries": max(0, gathered - gradients) + under_way}

    @property
    def activations(self) -> int:
        """All that is kept for the backward pass. A pipeline keeps its chunks' inputs, and of one chunk what is
        computed again."""
        return self.inputs + sum(count * self.layers.kept(group) for group, count in self.layers.groups())

    @property
    def inputs(self) -> int:
        """Of chunks, that a pipeline keeps."""
        if self.layout.stages == 1:
            return 0
        schedule = Schedule(self.layout.stages, self.job.virtual_stages, self.job.microbatches)
        return schedule.slots * self.sizes.compute * self.layers.stream

    @property
    def one_group_a_tick(self) -> bool:
        """Whether a pipeline's stage computes one group of layers at a time, without a loop over more of them."""
        if self.layout.stages == 1:
            return False
        _, count = list(self.layers.groups())[pipelined_stack(self.job.model)]
        return count == 1

    def backward(self, group: Group) -> int:
        """Beside its activations a group's weights live, and the gradients of one layer's, not yet shared out; without
        a loop over groups those of one matrix."""
        weights = self.weights(group)
        gradients = self.largest_weight if self.one_group_a_tick else weights // len(group)
        return self.layers.backward(group) + weights + gradients

    @property
    def largest_weight(self) -> int:
        """The largest matrix of a layer in the compute format, gathered."""
        return self.sizes.compute * max(self._used(each) // each.shape[0] for each in self.specs if _is_stacked(each))


def _is_stacked(spec: ParameterSpec) -> bool:
    """Whether it is a matrix of layers; of their vectors nothing is gathered."""
    return spec.axes.startswith("L") and len(spec.axes) > 2 and "D" in spec.axes
