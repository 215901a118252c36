"""The mixture-of-experts layer: route → dispatch → exchange → experts → exchange → combine, plus the shared expert."""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe.model.adapter import LoraConfig
from moe.model.config import ConfigError, ModelConfig, RouterConfig, divisors
from moe.model.execution import Execution
from moe.model.experts import Experts, ExpertWeights, apply_experts, by_chunk, rows_split
from moe.model.feed_forward import FeedForward
from moe.model.precision import Precision
from moe.model.randomness import Purpose, layer_key
from moe.model.router import Router, Routing, capacity, limit_capacity, measure_balance
from moe.ops.grouped_matmul import goes_by_blocks
from parallel.exchange import Exchange, Traffic, make_exchange, node_size
from parallel.layout import Layout


class MoEStats(NamedTuple):
    """What one layer tells about its routing. All f32.

    aux_loss, z_loss: before their weights (see router.Balance).
    load_E: share of choices per expert, before drops.
    dropped, recycled: shares of choices over capacity.
    entropy: nats.
    wire_bytes: what one device sends to others for this layer, forward and backward, in the mean over devices. What
        rematerialisation sends again is not counted.
    across_bytes: how many of them leave its node.
    """

    aux_loss: jax.Array
    z_loss: jax.Array
    load_E: jax.Array
    dropped: jax.Array
    recycled: jax.Array
    entropy: jax.Array
    wire_bytes: jax.Array
    across_bytes: jax.Array

    def penalty(self, config: RouterConfig) -> jax.Array:
        """f32[], what these layers add to the objective."""
        aux_weight = config.aux_loss_weight if config.balance == "aux_loss" else 0.0
        return aux_weight * self.aux_loss.sum() + config.z_loss_weight * self.z_loss.sum()


class MoELayer(nnx.Module):
    """shared(x) + Σ_k weight_k · expert_k(x) (released code, HunYuanMoE)."""

    def __init__(self, config: ModelConfig, precision: Precision, execution: Execution, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.precision = precision
        self.execution = execution
        self.router = Router(config, precision, rngs=rngs)
        self.experts = Experts(config, precision, rngs=rngs)
        if config.num_shared_experts:
            width = config.num_shared_experts * config.d_expert
            self.shared = FeedForward(config.d_model, width, "shared_expert", config.init_std, precision, rngs=rngs)

    def reads_stacks(self, layout: Layout) -> bool:
        """Whether the experts' matrices may be left in the stack of all layers: they are then multiplied once."""
        execution = self.execution
        once = execution.exchange_chunks == 1
        return once and goes_by_blocks(execution.grouped_matmul) and self.experts.reads_stacks(layout)

    def adapt(self, config: LoraConfig, precision: Precision, *, rngs: nnx.Rngs) -> None:
        """Sets adapters beside the experts' weights."""
        self.experts.adapt(config, precision, rngs=rngs)
        if self.config.num_shared_experts:
            self.shared.adapt(config, precision, rngs=rngs)

    def __call__(
        self, x_BTD: jax.Array, valid_BT: jax.Array, layer: jax.Array, key: jax.Array | None, layout: Layout
    ) -> tuple[jax.Array, MoEStats]:
        """
        Args:
            x_BTD: in the compute format.
            valid_BT: bool, False where the token is padding and goes to no expert.
            layer: i32[], for the random key.
            key: the step's key, or None where nothing random is drawn.
        """
        config = self.config.router
        with jax.named_scope("router"):
            routing = self.router(x_BTD, valid_BT, layout)
            balance = measure_balance(routing, valid_BT)
            experts_BTK, weights_BTK = routing.experts_BTK, routing.weights_BTK
            dropped = recycled = jnp.zeros((), jnp.float32)
            slots = capacity(config, self.config.num_experts, x_BTD.shape[1])
            if slots is not None:
                drawn = None if key is None else layer_key(key, layer, Purpose.RECYCLE)
                # Capacity is counted along whole sequences.
                whole = Routing(*(layout.constrain(x, "BSE") for x in routing))
                experts_BTK, weights_BTK, dropped, recycled = limit_capacity(whole, config, slots, drawn)

        drawn = None if key is None else layer_key(key, layer, Purpose.ADAPTER_DROPOUT)
        routed_BTD, sent = self._routed(x_BTD, experts_BTK, weights_BTK, slots, layout, drawn)
        if self.config.num_shared_experts:
            with jax.named_scope("shared_expert"):
                routed_BTD += self.shared(x_BTD, layout, drawn)
        stats = MoEStats(
            balance.aux_loss,
            balance.z_loss,
            balance.load_E,
            dropped,
            recycled,
            balance.entropy,
            sent.inside + sent.across,
            sent.across,
        )
        return routed_BTD, stats

    def _routed(
        self,
        x_BTD: jax.Array,
        experts_BTK: jax.Array,
        weights_BTK: jax.Array,
        slots: int | None,
        layout: Layout,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Traffic]:
        """Σ_k weight_k · expert_k(x), on each device for its own part of the batch; and the bytes that each sends.

        Args:
            key: of this layer in this step, for the adapters' dropout.
        """
        # `tensor` splits the experts' width, and each of its devices then takes the tokens of all of them; or else it
        # shares out the experts, and each takes its own.
        splits_width = layout.config.splits_width
        recipe, split = self.precision.recipe, rows_split(layout)

        def on_each_device(x_BTD, experts_BTK, weights_BTK, weights: ExpertWeights):
            if splits_width:
                with jax.named_scope("exchange"):
                    x_BTD, experts_BTK, weights_BTK = map(layout.gather_sequence, (x_BTD, experts_BTK, weights_BTK))
            num_sequences, length, _ = x_BTD.shape
            chunks = self.execution.exchange_chunks
            exchange = self._exchange(layout, chunk_limit(num_sequences, length, slots, chunks))
            x_CAD, experts_CAK, weights_CAK = (
                x.reshape(chunks, -1, x.shape[-1]) for x in (x_BTD, experts_BTK, weights_BTK)
            )
            # All chunks are sent before any is computed, so that no exchange waits for an expert.
            arrived = [exchange.send(*chunk) for chunk in zip(x_CAD, experts_CAK, weights_CAK, strict=True)]
            y_CAD = []
            for each, own in zip(arrived, by_chunk(weights, chunks), strict=True):
                rows = each.rows_SD, each.counts_E
                y_SD, read = apply_experts(*rows, own, self.execution, recipe, split, each.gates_S)
                self.experts.have_read(read)
                y_CAD.append(exchange.bring_back(y_SD, each))
            y_BTD = jnp.stack(y_CAD).reshape(x_BTD.shape)
            sent = functools.reduce(operator.add, (each.forward + each.backward for each in arrived))
            if splits_width:
                with jax.named_scope("exchange"):
                    y_BTD = layout.sum_to_sequence(y_BTD)
            return y_BTD, layout.mean_over_devices(sent)

        with jax.named_scope("experts"):
            weights = self.experts.weights(layout, x_BTD.shape[1], key)
        if layout.mesh is None:
            return on_each_device(x_BTD, experts_BTK, weights_BTK, weights)
        tokens = layout.activation_spec("BTD")
        specs = (tokens, tokens, tokens, self.experts.specs(layout, x_BTD.shape[1]))
        routed = layout.shard_map(on_each_device, specs, (tokens, layout.whole_spec))
        return routed(x_BTD, experts_BTK, weights_BTK, weights)

    def _exchange(self, layout: Layout, limit: int) -> Exchange:
        """Over the devices that share out the experts, for at most `limit` rows an expert from each."""
        axes = layout.expert_axes
        near = 1 if layout.mesh is None else node_size(layout.mesh, axes, self.execution.devices_per_node)
        return make_exchange(
            self.execution.exchange,
            axes,
            layout.expert_parallelism,
            near,
            self.config.num_experts,
            limit,
            self.precision.exchange,
            weighs_before=self.execution.gate == "before",
        )


def chunk_limit(num_sequences: int, length: int, slots: int | None, chunks: int) -> int:
    """The most rows that an expert can take of one chunk of a device's tokens.

    Args:
        slots: capacity of an expert in one sequence, None where routing is dropless.

    Raises:
        ConfigError: the tokens do not divide.
    """
    tokens = num_sequences * length
    if tokens % chunks:
        raise ConfigError(
            f"execution.exchange_chunks={chunks} does not divide the {num_sequences} x {length} tokens of a device: "
            f"use {divisors(tokens)}"
        )
    size = tokens // chunks
    whole_sequences, rest = divmod(size, length)
    touched = whole_sequences if not rest else whole_sequences + (1 if length % size == 0 else 2)
    return size if slots is None else min(size, touched * slots)
