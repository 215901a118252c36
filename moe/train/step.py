"""One optimizer step: gradients over microbatches, update, balancing, and what is told about it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from moe.model.moe_layer import MoEStats
from moe.model.parameter import SelectionBias
from moe.model.randomness import Purpose, run_key
from moe.train.data import Batch
from moe.train.histories import check_products, growth
from moe.train.objective import make_objective, summed_loss
from moe.train.optimizer import global_norm
from moe.train.parts import fetched
from moe.train.pipelined import check_stages, pipelined_gradients
from moe.train.state import Blueprint, TrainState
from moe.train.streamed import check_landing, landed_gradients, streamed_norm, streamed_update, streams
from parallel.layout import Layout
from parallel.loops import steady_scan
from parallel.malloc import give_back


class LayerStats(NamedTuple):
    """Routing of one step by MoE layer, over the whole batch. All f32.

    load_LE: share of the choices per expert before drops, sums to 1 over E.
    dropped_L, recycled_L: shares of the choices over capacity.
    entropy_L: mean router entropy, nats.
    wire_bytes_L: bytes that one device sends for the layer's exchange in the step, forward and backward; the mean.
    across_bytes_L: how many of them leave its node.
    """

    load_LE: jax.Array
    dropped_L: jax.Array
    recycled_L: jax.Array
    entropy_L: jax.Array
    wire_bytes_L: jax.Array
    across_bytes_L: jax.Array


class StepMetrics(NamedTuple):
    """Of one step, before its update. f32[] but for `tokens`.

    loss: mean next-token cross-entropy, nats.
    aux_loss, z_loss: mean over MoE layers, before their weights.
    grad_norm: global norm before clipping.
    growth: by how much a product's operand exceeds what delayed scaling was made for (moe/train/histories.py).
    tokens: i32[], predicted tokens.
    layers: None where the model has no MoE layer.
    """

    loss: jax.Array
    aux_loss: jax.Array
    z_loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    growth: jax.Array
    tokens: jax.Array
    layers: LayerStats | None


def make_train_step(
    blueprint: Blueprint, *, seed: int, microbatches: int = 1, virtual_stages: int = 1, loss_chunk: int = 512
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The jitted step; it takes the state over (donated) and returns the next.

    Args:
        seed: of the run; the step folds in its own number.
        microbatches: parts of the batch that are computed one after the other, their gradients summed. Routing's
            auxiliary losses are means over each part.
        virtual_stages: chunks of the layers that each of the mesh's stages has; the microbatches then go through the
            stages one after the other (parallel/pipeline.py).
        loss_chunk: positions whose logits exist at once.

    Raises:
        ConfigError: the layers do not divide over the stages, or have histories; or gradients that wait on the host
            would have to be added up.
    """
    check_stages(blueprint.config, blueprint.layout.stages, virtual_stages)
    check_landing(blueprint.layout.config, blueprint.layout.stages, microbatches)
    check_products(blueprint.precision, blueprint.execution, blueprint.layout.stages)
    layout, router = blueprint.layout, blueprint.config.router
    accumulated = jnp.dtype(blueprint.precision.gradients)

    objective = make_objective(blueprint, microbatches=microbatches, loss_chunk=loss_chunk)

    def gradients(state: TrainState, batch: Batch, key: jax.Array, num_targets: jax.Array):
        """(gradients, the next histories), (loss, statistics)."""

        def one(params: Any, frozen: Any, number: jax.Array, part: Batch):
            given = (state.balance, frozen, part, jax.random.fold_in(key, number), num_targets)
            if layout.config.gradients == "host":
                return landed_gradients(blueprint, objective, params, state.histories, given)
            take = jax.grad(objective, argnums=(0, 1), has_aux=True)
            (grads, histories), told = take(params, state.histories, None, *given)
            grads = jax.tree.map(lambda g: g.astype(accumulated), grads)
            return (blueprint.by_axes(layout.constrain_gradient, grads), histories), told

        if layout.stages > 1:
            grads, *told = pipelined_gradients(
                blueprint,
                state.params,
                state.balance,
                jax.tree.map(lambda x: split_batch(x, microbatches, layout), batch),
                key,
                num_targets,
                virtual_stages=virtual_stages,
                loss_chunk=loss_chunk,
            )
            return (blueprint.by_axes(layout.constrain_gradient, grads), {}), told

        if microbatches == 1:
            return one(state.params, state.frozen, jnp.zeros((), jnp.int32), batch)

        def accumulate(carry, numbered):
            # A part waits for the sum before. Else XLA, to gather ahead, takes the last part out of the loop, and what
            # that one begins with is there throughout.
            (summed, largest), weights, numbered = jax.lax.optimization_barrier(
                (carry, (state.params, state.frozen), numbered)
            )
            (grads, histories), told = one(*weights, *numbered)
            return (jax.tree.map(jnp.add, summed, grads), jax.tree.map(jnp.maximum, largest, histories)), told

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, accumulated), state.params)
        unseen = jax.tree.map(jnp.zeros_like, state.histories)
        parts = jax.tree.map(lambda x: split_batch(x, microbatches, layout), batch)
        found, (losses, stats) = steady_scan(accumulate, (zeros, unseen), (jnp.arange(microbatches), parts))
        return found, (losses.sum(), merge_microbatches(stats))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        num_targets = batch.weights_BT.sum()
        key = step_key(seed, state.step)
        (grads, histories), (loss, stats) = gradients(state, batch, key, jnp.maximum(num_targets, 1.0))
        rounding = jax.random.fold_in(key, int(Purpose.ROUNDING))
        with jax.named_scope("optimizer"):
            if streams(layout.config, layout.stages):
                norm = streamed_norm(grads)
                told = {"norm": norm, "key": rounding}
                opt_state, params = streamed_update(blueprint, grads, told, state.opt_state, state.params)
            else:
                grads, params = (blueprint.by_axes(layout.shard, each) for each in (grads, state.params))
                norm = global_norm(grads)
                update = optax.with_extra_args_support(blueprint.optimizer).update
                # Not where nothing waits elsewhere: the next state would be bound to its device as the first one is
                # not, and the step be compiled for each of the two.
                opt_state = fetched(state.opt_state) if layout.config.on_host else state.opt_state
                updates, opt_state = update(grads, opt_state, params, norm=norm, key=rounding)
                params = optax.apply_updates(params, updates)
        metrics = StepMetrics(
            loss=loss / jnp.maximum(num_targets, 1.0),
            aux_loss=jnp.zeros(()) if stats is None else stats.aux_loss.mean(),
            z_loss=jnp.zeros(()) if stats is None else stats.z_loss.mean(),
            grad_norm=norm,
            learning_rate=jnp.asarray(blueprint.learning_rate(state.step), jnp.float32),
            growth=growth(state.histories, histories),
            tokens=num_targets.astype(jnp.int32),
            layers=None if stats is None else layer_stats(stats),
        )
        balance = state.balance
        if stats is not None and router.balance == "bias":
            balance = move_biases(blueprint, state, stats.load_E)
        return TrainState(state.step + 1, params, balance, opt_state, state.frozen, histories), metrics

    shardings = blueprint.shardings()
    return jax.jit(step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, layout.whole()))


def compile_step(step: Any, state: TrainState, batch: Batch) -> Any:
    """What `make_train_step` gives, compiled for such arguments before the first step needs its memory."""
    compiled = step.lower(state, batch).compile()
    give_back()
    return compiled


def step_key(seed: int, step: jax.Array) -> jax.Array:
    """The random key of the run's step with this number."""
    return jax.random.fold_in(run_key(seed, Purpose.STEP), step)


def make_evaluation_step(
    blueprint: Blueprint, *, loss_chunk: int = 512
) -> Callable[[TrainState, Batch], tuple[jax.Array, jax.Array]]:
    """Jitted: the summed cross-entropy (nats) of a batch and how many tokens were predicted."""

    def evaluate(state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        model = blueprint.model_of(state)
        model.eval()
        key = run_key(0, Purpose.EVALUATE)
        output = model(batch.tokens_BT, batch.positions_BT, batch.segments_BT, key=key, layout=blueprint.layout)
        loss = summed_loss(model, output.hidden_BTD, batch, loss_chunk, blueprint.layout)
        return loss, batch.weights_BT.sum()

    return jax.jit(evaluate)


def place_batch(batch: Batch, layout: Layout) -> Batch:
    """This process's rows of a batch, whole sequences, as global arrays split over the mesh."""
    sharding = layout.activation("BT")
    if sharding is None:
        return jax.tree.map(jnp.asarray, batch)
    _, shares = layout.batch_share(layout.batch_shards)

    def place(x_BT: np.ndarray) -> jax.Array:
        B, T = x_BT.shape
        return jax.make_array_from_process_local_data(sharding, x_BT, (B * shares, T))

    return jax.tree.map(place, batch)


def split_batch(x_BT: jax.Array, microbatches: int, layout: Layout) -> jax.Array:
    """[B, T] as [microbatches, B / microbatches, T]. Row b goes to part b mod microbatches, so that each device cuts
    its own rows and none move."""
    parts = x_BT.reshape(-1, microbatches, *x_BT.shape[1:])
    return layout.constrain(parts.swapaxes(0, 1), "_BT")


def merge_microbatches(stats: MoEStats | None) -> MoEStats | None:
    """Means over the parts, but for bytes, which add up."""
    if stats is None:
        return None
    added = {"wire_bytes": stats.wire_bytes.sum(0), "across_bytes": stats.across_bytes.sum(0)}
    return jax.tree.map(lambda x: x.mean(0), stats)._replace(**added)


def layer_stats(stats: MoEStats) -> LayerStats:
    return LayerStats(stats.load_E, stats.dropped, stats.recycled, stats.entropy, stats.wire_bytes, stats.across_bytes)


def move_biases(blueprint: Blueprint, state: TrainState, load_LE: jax.Array) -> Any:
    """The routers' selection biases after a step in which the experts were loaded so."""
    model = blueprint.model_of(state)
    model.move_biases(load_LE)
    return nnx.to_pure_dict(nnx.state(model, SelectionBias))
