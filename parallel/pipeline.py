"""Pipeline parallelism: the schedule, and the moving of activations and gradients from stage to stage.

A network is cut into S · v chunks of equal shape, and stage s of S has chunks s, S + s, 2S + s, … With v = 1 the order
of work is 1F1B (arXiv 2006.09503), with v > 1 interleaved 1F1B (arXiv 2104.04473, section 2.2), both in lockstep: in
one tick every stage takes one microbatch forward through a chunk and another one backward, and hands both on. A stage
keeps a chunk's input, and nothing else, from the forward to the backward pass, which computes the chunk anew. It keeps
at most v·S + S - 1 of them, however many microbatches M there are, and idles for (S-1) / (v·M) of the time that it
works.

The lockstep costs memory: stages that wait for each other less strictly would keep S inputs with v = 1 instead of
2S - 1. But every device then runs the same program, and none of its exchanges stands in a branch that others skip.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from parallel.layout import STAGE_AXIS
from parallel.loops import steady_scan


class PipelineError(ValueError):
    """A pipeline that cannot be scheduled: names the sizes, and what would work."""


class Work(NamedTuple):
    """What each stage does in each tick; i32[ticks, stages] each.

    microbatch: -1 where the stage idles.
    chunk: which of the stage's own v.
    slot: where the chunk's input is kept.
    """

    microbatch: np.ndarray
    chunk: np.ndarray
    slot: np.ndarray


@dataclass(frozen=True)
class Schedule:
    """The order of work of S stages with v chunks each on M microbatches.

    Microbatches come in groups of S, and a group goes through all first chunks, then all second ones. From one chunk to
    the next it is one tick, forward and backward alike, and the last chunk's backward pass begins in the tick of its
    forward pass.

    Raises PipelineError where v > 1 and M is no multiple of S.
    """

    stages: int
    virtual: int
    microbatches: int

    def __post_init__(self) -> None:
        if self.virtual > 1 and self.microbatches % self.stages:
            above = -(-self.microbatches // self.stages) * self.stages
            raise PipelineError(
                f"{self.microbatches} microbatches with {self.virtual} virtual stages on each of {self.stages} stages: "
                f"interleaving takes them in groups of {self.stages}; use a multiple, such as {above}, "
                "or 1 virtual stage"
            )

    @property
    def first_backward(self) -> int:
        """The tick in which the first backward pass begins."""
        return self.virtual * self.stages - 1

    @property
    def forward_ticks(self) -> int:
        """How many ticks, from the first, have forward passes. As many, to the last, have backward ones."""
        return self.virtual * self.microbatches + self.stages - 1

    @property
    def ticks(self) -> int:
        return self.first_backward + self.forward_ticks

    @property
    def bubble(self) -> float:
        """How long a stage idles, as a share of the time that it works: (S-1) / (v·M)."""
        return self.forward_ticks / (self.virtual * self.microbatches) - 1

    @cached_property
    def forward(self) -> Work:
        return self._tables[0]

    @cached_property
    def backward(self) -> Work:
        return self._tables[1]

    @cached_property
    def slots(self) -> int:
        """Inputs of chunks that a stage keeps at once: at most v·S + S - 1."""
        return int(self.forward.slot.max()) + 1

    @cached_property
    def finishes(self) -> np.ndarray:
        """The microbatch that leaves the last chunk in each tick, -1 for none; i32[ticks]."""
        leaves = self.forward.chunk[:, -1] == self.virtual - 1
        return np.where(leaves, self.forward.microbatch[:, -1], -1)

    @cached_property
    def _tables(self) -> tuple[Work, Work]:
        places = [(tick, stage) for tick in range(self.ticks) for stage in range(self.stages)]
        shape = (self.ticks, self.stages, 2)
        forward = np.array([self._turn(tick - stage) for tick, stage in places]).reshape(shape)
        start = self.first_backward + self.stages - 1
        backward = np.array([self._turn(tick - start + stage) for tick, stage in places]).reshape(shape)
        backward[..., 1] = self.virtual - 1 - backward[..., 1]
        slots = np.stack([self._slots(forward[:, stage], backward[:, stage]) for stage in range(self.stages)], axis=1)
        return Work(*np.moveaxis(np.concatenate([forward, slots[..., :1]], -1).astype(np.int32), -1, 0)), Work(
            *np.moveaxis(np.concatenate([backward, slots[..., 1:]], -1).astype(np.int32), -1, 0)
        )

    def _turn(self, number: int) -> tuple[int, int]:
        """(microbatch, chunk) of a stage's turn, counted from its first."""
        group, place = divmod(number, self.stages * self.virtual)
        chunk, within = divmod(place, self.stages)
        microbatch = group * self.stages + within
        return (microbatch, chunk) if 0 <= microbatch < self.microbatches else (-1, 0)

    def _slots(self, forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
        """For one stage, the slot that each tick's forward pass fills and the one that its backward pass empties.

        An idle forward pass fills one too, with what nobody reads.
        """
        free, taken, found = list(range(self.ticks)), {}, np.zeros((self.ticks, 2), np.int32)
        for tick in range(self.ticks):
            begun, ended = tuple(forward[tick]), tuple(backward[tick])
            if tick < self.forward_ticks:
                taken[begun] = found[tick, 0] = free.pop(0)
                if begun[0] < 0:
                    free = sorted([*free, taken.pop(begun)])
            if ended[0] >= 0:
                found[tick, 1] = taken.pop(ended)
                free = sorted([*free, found[tick, 1]])
        return found


class Turn(NamedTuple):
    """Of a chunk. i32[] each, valid numbers also where the stage idles.

    microbatch: from 0 to M-1.
    chunk: from 0 to S·v-1.
    """

    microbatch: jax.Array
    chunk: jax.Array


class Network(NamedTuple):
    """What the pipeline computes. All functions run on one stage, inside `jax.shard_map` over `STAGE_AXIS`.

    chunk: (weights, shared, x, Turn) -> (y, penalty f32[], told): a chunk's output, its addend to the objective and
        what it tells. Chunk 0 takes its input from elsewhere and leaves x alone.
    head: (shared, y, microbatch) -> f32[], this stage's share of a microbatch's loss, of which the stages compute equal
        parts: y is the last chunk's output on the last stage (see `deal`).
    settle: what is done to the gradients of (one chunk's weights, shared) before they are added up.
    activations: shape and format of x.
    """

    chunk: Callable[[Any, Any, jax.Array, Turn], tuple[jax.Array, jax.Array, Any]]
    head: Callable[[Any, jax.Array, jax.Array], jax.Array]
    settle: Callable[[Any, Any], tuple[Any, Any]]
    activations: jax.ShapeDtypeStruct


class Outcome(NamedTuple):
    """
    loss: f32[], summed over all microbatches, the same on every stage.
    told: of the stage's chunks, [v, …], summed over microbatches.
    dweights: of the stage's chunks, [v, …].
    dshared: summed over stages.
    """

    loss: jax.Array
    told: Any
    dweights: Any
    dshared: Any


def gradients(
    schedule: Schedule, network: Network, weights: Any, shared: Any, loss_weight: jax.Array, dtype: Any
) -> Outcome:
    """Inside `jax.shard_map` over `STAGE_AXIS`: the gradients of loss_weight · Σ loss + Σ penalty.

    Args:
        weights: of this stage's chunks, [v, …].
        shared: weights that every stage has.
        dtype: in which gradients are added up.
    """
    return _Run(schedule, network, weights, shared, loss_weight, dtype).outcome()


def deal(x_BTD: jax.Array, multiple: int) -> jax.Array:
    """Each stage's part of the positions of what the last stage has: position t for stage t mod S.

    Zeros follow where a part's length is no multiple of `multiple`.
    """
    # Not psum_scatter: for CPUs, XLA cannot compile a bfloat16 sum over some of the mesh's axes.
    from_every_stage_BTSD = jax.lax.all_to_all(_cards(x_BTD, multiple), STAGE_AXIS, 2, 2, tiled=True)
    return from_every_stage_BTSD[:, :, -1]


def own_cards(x_BT: jax.Array, multiple: int) -> jax.Array:
    """As `deal`, of what every stage has."""
    return jnp.take(_cards(x_BT, multiple), jax.lax.axis_index(STAGE_AXIS), axis=2)


def _cards(x_BT: jax.Array, multiple: int) -> jax.Array:
    stages = jax.lax.axis_size(STAGE_AXIS)
    padding = [(0, 0)] * x_BT.ndim
    padding[1] = (0, -x_BT.shape[1] % (stages * multiple))
    return jnp.pad(x_BT, padding).reshape(x_BT.shape[0], -1, stages, *x_BT.shape[2:])


class _Carry(NamedTuple):
    """x, dx: arrived from the neighbours. kept: inputs of chunks, [slots, …]."""

    x: jax.Array
    dx: jax.Array
    kept: jax.Array
    loss: jax.Array
    told: Any
    dweights: Any
    dshared: Any


@dataclass(frozen=True)
class _Run:
    schedule: Schedule
    network: Network
    weights: Any
    shared: Any
    loss_weight: jax.Array
    dtype: Any

    def outcome(self) -> Outcome:
        schedule = self.schedule
        carry = self._begin(schedule.slots)
        # Only ticks in which some stage has such a pass pay for it.
        carry = self._scan(carry, 0, schedule.first_backward, backward=False)
        carry = self._scan(carry, schedule.first_backward, schedule.forward_ticks)
        carry = self._scan(carry, schedule.forward_ticks, schedule.ticks, forward=False)
        # In float32 for the reason given in `deal`.
        dshared = jax.tree.map(lambda d: jax.lax.psum(d.astype(jnp.float32), STAGE_AXIS).astype(d.dtype), carry.dshared)
        return Outcome(jax.lax.psum(carry.loss, STAGE_AXIS), carry.told, carry.dweights, dshared)

    def _begin(self, slots: int) -> _Carry:
        x = jnp.zeros(self.network.activations.shape, self.network.activations.dtype)
        turn = Turn(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
        _, _, told = jax.eval_shape(self.network.chunk, self._chunk(0), self.shared, x, turn)
        return _Carry(
            x,
            x,
            jnp.zeros((slots, *x.shape), x.dtype),
            jnp.zeros((), jnp.float32),
            jax.tree.map(lambda t: jnp.zeros((self.schedule.virtual, *t.shape), t.dtype), told),
            jax.tree.map(lambda w: jnp.zeros(w.shape, self.dtype), self.weights),
            jax.tree.map(lambda w: jnp.zeros(w.shape, self.dtype), self.shared),
        )

    def _scan(self, carry: _Carry, first: int, end: int, *, forward: bool = True, backward: bool = True) -> _Carry:
        def tick(carry: _Carry, number: jax.Array) -> tuple[_Carry, None]:
            # A tick waits until what the one before adds up is added up. Else XLA, to gather weights ahead, takes the
            # last tick out of the loop, and what that one begins with is there throughout.
            carry, number, weights, shared = jax.lax.optimization_barrier((carry, number, self.weights, self.shared))
            run = replace(self, weights=weights, shared=shared)
            dy = carry.dx
            if forward:
                carry, y = run._forward(carry, number)
                if backward:
                    carry, dy = run._head(carry, y, number)
            if backward:
                carry = run._backward(carry, dy, number)
            return carry, None

        return steady_scan(tick, carry, jnp.arange(first, end))[0]

    def _forward(self, carry: _Carry, number: jax.Array) -> tuple[_Carry, jax.Array]:
        works, local, turn, slot = self._turn(self.schedule.forward, number)
        y, _, told = self.network.chunk(self._chunk(local), self.shared, carry.x, turn)
        kept = jax.lax.dynamic_update_index_in_dim(carry.kept, carry.x, slot, 0)
        told = _added(carry.told, told, local, works)
        return carry._replace(x=self._handed_on(y, 1), kept=kept, told=told), y

    def _head(self, carry: _Carry, y: jax.Array, number: jax.Array) -> tuple[_Carry, jax.Array]:
        """The loss of the microbatch that leaves the last chunk, if one does, and the gradient that goes backward."""

        def compute(microbatch: jax.Array):
            share, backward = jax.vjp(lambda shared, y: self.network.head(shared, y, microbatch), self.shared, y)
            dshared, dy = backward(self.loss_weight.astype(share.dtype))
            return share, self.network.settle(None, dshared)[1], dy

        def nothing(microbatch: jax.Array):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute, microbatch))

        finishes = jnp.asarray(self.schedule.finishes)[number]
        # The same for all devices, so that those that exchange take the same way.
        share, dshared, dy_last = jax.lax.cond(finishes >= 0, compute, nothing, finishes)
        dshared = jax.tree.map(lambda total, d: total + d.astype(total.dtype), carry.dshared, dshared)
        _, _, turn, _ = self._turn(self.schedule.backward, number)
        begins = turn.chunk == self.schedule.stages * self.schedule.virtual - 1
        return carry._replace(loss=carry.loss + share, dshared=dshared), jnp.where(begins, dy_last, carry.dx)

    def _backward(self, carry: _Carry, dy: jax.Array, number: jax.Array) -> _Carry:
        works, local, turn, slot = self._turn(self.schedule.backward, number)

        @jax.named_scope("recomputed")
        def again(weights, shared, x):
            y, penalty, _ = self.network.chunk(weights, shared, x, turn)
            return y, penalty

        x = jax.lax.dynamic_index_in_dim(carry.kept, slot, 0, keepdims=False)
        (_, penalty), backward = jax.vjp(again, self._chunk(local), self.shared, x)
        dweights, dshared, dx = backward((dy, jnp.ones_like(penalty)))
        dweights, dshared = self.network.settle(dweights, dshared)
        dshared = jax.tree.map(
            lambda total, d: jnp.where(works, total + d.astype(total.dtype), total), carry.dshared, dshared
        )
        return carry._replace(
            dx=self._handed_on(dx, -1), dweights=_added(carry.dweights, dweights, local, works), dshared=dshared
        )

    def _turn(self, work: Work, number: jax.Array) -> tuple[jax.Array, jax.Array | int, Turn, jax.Array]:
        """This stage's in a tick: whether it works, its own chunk, the turn, and the slot."""
        stage = jax.lax.axis_index(STAGE_AXIS)
        microbatch, local, slot = (jnp.asarray(table)[number, stage] for table in work)
        turn = Turn(jnp.maximum(microbatch, 0), local * self.schedule.stages + stage)
        # A constant spares the copy of the weights of a chunk chosen at run time.
        return microbatch >= 0, 0 if self.schedule.virtual == 1 else local, turn, slot

    def _chunk(self, local: jax.Array | int) -> Any:
        return jax.tree.map(lambda w: w[local], self.weights)

    def _handed_on(self, x: jax.Array, step: int) -> jax.Array:
        """What the stage before (step 1) or after (step -1) has; from the last to the first only between chunks."""
        stages = self.schedule.stages
        pairs = [(stage, (stage + step) % stages) for stage in range(stages)]
        if self.schedule.virtual == 1:
            pairs = [(here, there) for here, there in pairs if there == here + step]
        return jax.lax.ppermute(x, STAGE_AXIS, pairs)


def _added(total: Any, one: Any, local: jax.Array | int, works: jax.Array) -> Any:
    """One chunk's numbers added to its place in [v, …], unless the stage idles."""
    return jax.tree.map(
        lambda t, x: t.at[local].set(jnp.where(works, t[local] + x.astype(t.dtype), t[local])), total, one
    )
