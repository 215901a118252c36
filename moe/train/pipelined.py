"""The gradients of a step whose layers are shared out over the mesh's stages (parallel/pipeline.py)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe.model.config import ConfigError, ModelConfig, divisors
from moe.model.moe_layer import MoEStats
from moe.model.parameter import is_spec
from moe.ops.norm import rms_norm
from moe.train.data import Batch
from moe.train.loss import cross_entropy_sum
from moe.train.state import Blueprint
from parallel import pipeline
from parallel.layout import STAGE_AXIS, Layout


def pipelined_stack(config: ModelConfig) -> int:
    """Which of the model's stacks is shared out: the longest. Layers before it run with the first chunk, layers after
    it with the last, and every stage waits for these."""
    repeats = [repeat for _, repeat in config.layer_groups()]
    return repeats.index(max(repeats))


def check_stages(config: ModelConfig, stages: int, virtual_stages: int) -> None:
    """
    Raises:
        ConfigError: the longest run of equal cross-layer groups does not divide over the stages, or there is one stage
            and more than one virtual one.
    """
    if stages == 1 and virtual_stages > 1:
        raise ConfigError(
            f"training.virtual_stages={virtual_stages} with mesh.stage=1: there is nothing to interleave; "
            "set mesh.stage to 2 or more, or virtual_stages=1"
        )
    dense, repeat = config.layer_groups()[pipelined_stack(config)]
    chunks = stages * virtual_stages
    if repeat % chunks:
        fitting = divisors(repeat)
        raise ConfigError(
            f"model.num_layers={config.num_layers} has {repeat} equal groups of {len(dense)} "
            f"(model.cla_factor={config.cla_factor}), which do not divide over mesh.stage={stages} x "
            f"training.virtual_stages={virtual_stages}: make their product {fitting}, or the groups a multiple of "
            f"{chunks}"
        )


def pipelined_gradients(
    blueprint: Blueprint,
    params: Any,
    balance: Any,
    batches: Batch,
    key: jax.Array,
    num_targets: jax.Array,
    *,
    virtual_stages: int,
    loss_chunk: int,
) -> tuple[Any, jax.Array, MoEStats | None]:
    """
    Args:
        batches: of the microbatches, [M, B, T].
        key: of the step.
        num_targets: f32[], by which the loss is divided.

    Returns:
        Gradients of the step's objective like `params`, the summed cross-entropy, and the MoE layers' statistics
        as the microbatches' means ([L, …]; bytes summed).
    """
    layout, stages = blueprint.layout, blueprint.layout.stages
    number = pipelined_stack(blueprint.config)
    schedule = pipeline.Schedule(stages, virtual_stages, batches.tokens_BT.shape[0])
    weights, shared = _parted(params, number)
    biases, other_biases = _parted(balance, number)

    def on_each_stage(weights, biases, shared, other_biases, batches, key, num_targets):
        own, own_biases = jax.tree.map(lambda w: w[:, 0], (weights, biases))
        step = _Stage(blueprint, number, schedule, own_biases, other_biases, batches, key, loss_chunk)
        dtype = jnp.dtype(blueprint.precision.gradients)
        out = pipeline.gradients(schedule, step.network(), own, shared, 1 / num_targets, dtype)
        told, dweights = jax.tree.map(lambda x: x[:, None], (out.told, out.dweights))
        return out.loss, told, dweights, out.dshared

    whole, staged = PartitionSpec(), PartitionSpec(None, STAGE_AXIS)
    run = jax.shard_map(
        on_each_stage,
        mesh=layout.mesh,
        in_specs=(staged, staged, whole, whole, whole, whole, whole),
        out_specs=(whole, staged, staged, whole),
        axis_names={STAGE_AXIS},
        check_vma=False,
    )
    weights, biases = jax.tree.map(lambda w: w.reshape(virtual_stages, stages, -1, *w.shape[1:]), (weights, biases))
    loss, told, dweights, dshared = run(weights, biases, shared, other_biases, batches, key, num_targets)
    dweights = jax.tree.map(lambda w: w.reshape(-1, *w.shape[3:]), dweights)
    return _joined(dweights, dshared, number), loss, _mean_stats(told, len(batches.tokens_BT))


class _Stage(NamedTuple):
    """One stage's computation, inside `jax.shard_map` over stages.

    number: of the pipelined stack. biases: of its own chunks, [v, …]; other_biases: of the other stacks.
    batches: of all microbatches.
    """

    blueprint: Blueprint
    number: int
    schedule: pipeline.Schedule
    biases: Any
    other_biases: Any
    batches: Batch
    key: jax.Array
    loss_chunk: int

    def network(self) -> pipeline.Network:
        shape = (*self.batches.tokens_BT.shape[1:], self.blueprint.config.d_model)
        activations = jax.ShapeDtypeStruct(shape, self.blueprint.precision.compute_dtype)
        return pipeline.Network(self.chunk, self.head, self.settle, activations)

    @property
    def layout(self) -> Layout:
        return self.blueprint.layout.on_each_stage().for_length(self.batches.tokens_BT.shape[2])

    def chunk(self, weights: Any, shared: Any, x_BTD: jax.Array, turn: pipeline.Turn):
        """Told are the statistics of the stacks before, of this chunk and of the stacks after, as `Network` has it."""
        schedule, number, layout = self.schedule, self.number, self.layout
        biases = jax.tree.map(lambda b: b[turn.chunk // schedule.stages], self.biases)
        model = self.blueprint.model(_joined(weights, shared, number), _joined(biases, self.other_biases, number), {})
        batch = self._batch(turn.microbatch)
        sight = model.sight(batch.tokens_BT, batch.positions_BT, batch.segments_BT)
        scans = model.scans(jax.random.fold_in(self.key, turn.microbatch), layout)
        penalty, told = jnp.zeros((), jnp.float32), []

        def run(x_BTD: jax.Array, which: range, here: jax.Array) -> jax.Array:
            nonlocal penalty
            found = []
            for i in which:
                x_BTD, _, stats, _ = scans[i](model.stacks[i], x_BTD, sight, None)
                if stats is not None:
                    stats = jax.tree.map(lambda s: jnp.where(here, s, 0), stats)
                    penalty += stats.penalty(self.blueprint.config.router) / schedule.microbatches
                    found.append(stats)
            told.append(jax.tree.map(lambda *each: jnp.concatenate(each), *found) if found else None)
            return x_BTD

        groups = scans[number].repeat // (schedule.stages * schedule.virtual)
        scans[number] = scans[number]._replace(
            first_layer=scans[number].first_layer + scans[number].layers_per_group * groups * turn.chunk,
            repeat=groups,
        )
        is_first, is_last = turn.chunk == 0, turn.chunk == schedule.stages * schedule.virtual - 1
        # All devices compute what one stage needs: they would wait for it, and a branch of its own would part the
        # devices that exchange.
        x_BTD = jnp.where(is_first, run(model.embed(batch.tokens_BT, layout), range(number), is_first), x_BTD)
        x_BTD = run(x_BTD, range(number, number + 1), jnp.ones((), bool))
        after = range(number + 1, len(scans))
        y_BTD = run(x_BTD, after, is_last)
        return layout.constrain(jnp.where(is_last, y_BTD, x_BTD), "BTD"), penalty, tuple(told)

    def head(self, shared: Any, y_BTD: jax.Array, microbatch: jax.Array) -> jax.Array:
        layout, batch = self.layout, self._batch(microbatch)
        own_BTD = pipeline.deal(y_BTD, layout.length_shards)
        targets_BT, weights_BT = (
            pipeline.own_cards(x, layout.length_shards) for x in (batch.targets_BT, batch.weights_BT)
        )
        norm_D = shared["norm_D"]
        head_VD = shared["embedding_VD" if self.blueprint.config.tie_embeddings else "head_VD"]
        hidden_BTD = rms_norm(own_BTD, norm_D.astype(own_BTD.dtype), self.blueprint.config.norm_eps)
        recipe = self.blueprint.precision.recipe
        return cross_entropy_sum(hidden_BTD, head_VD, targets_BT, weights_BT, self.loss_chunk, layout, recipe)

    def settle(self, dweights: Any, dshared: Any) -> tuple[Any, Any]:
        specs = _parted(self.blueprint.specs, self.number)
        layout = self.blueprint.layout.on_each_stage()

        def place(specs: Any, gradients: Any) -> Any:
            return jax.tree.map(lambda s, g: layout.constrain_gradient(g, s.axes), specs, gradients, is_leaf=is_spec)

        return (None if dweights is None else place(specs[0], dweights)), place(specs[1], dshared)

    def _batch(self, microbatch: jax.Array) -> Batch:
        return jax.tree.map(lambda x: x[microbatch], self.batches)


def _parted(tree: dict[str, Any], number: int) -> tuple[Any, dict[str, Any]]:
    """What belongs to stack `number` of a tree like the parameters, and the rest."""
    stacks = dict(tree.get("stacks", {}))
    own = stacks.pop(number, {})
    return own, {**tree, "stacks": stacks} if stacks else {k: v for k, v in tree.items() if k != "stacks"}


def _joined(own: Any, rest: dict[str, Any], number: int) -> dict[str, Any]:
    """The inverse of `_parted`."""
    return {**rest, "stacks": {**rest.get("stacks", {}), number: own}} if own else rest


def _mean_stats(told: tuple[MoEStats | None, ...], microbatches: int) -> MoEStats | None:
    """What the stages told, in the layers' order. Of the stacks before and after, one stage has told."""
    before, own, after = told
    found = [jax.tree.map(lambda s: s.sum((0, 1)), stats) if stats is not None else None for stats in (before, after)]
    if own is not None:
        own = jax.tree.map(lambda s: s.reshape(-1, *s.shape[3:]), own)
    present = [stats for stats in (found[0], own, found[1]) if stats is not None]
    if not present:
        return None
    summed = jax.tree.map(lambda *each: jnp.concatenate(each), *present)
    added = {"wire_bytes": summed.wire_bytes, "across_bytes": summed.across_bytes}
    return jax.tree.map(lambda s: s / microbatches, summed)._replace(**added)
