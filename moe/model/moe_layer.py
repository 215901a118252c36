"""The mixture-of-experts layer: route → dispatch → exchange → experts → exchange → combine, plus the shared expert."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe.model.config import ModelConfig, RouterConfig
from moe.model.dispatch import combine, dispatch
from moe.model.execution import Execution
from moe.model.experts import Experts, ExpertWeights, apply_experts
from moe.model.feed_forward import FeedForward
from moe.model.precision import Precision
from moe.model.randomness import Purpose, layer_key
from moe.model.router import Router, Routing, capacity, limit_capacity, measure_balance
from parallel.exchange import backend
from parallel.layout import Layout


class MoEStats(NamedTuple):
    """What one layer tells about its routing. All f32.

    aux_loss, z_loss: before their weights (see router.Balance).
    load_E: share of choices per expert, before drops.
    dropped, recycled: shares of choices over capacity.
    entropy: nats.
    wire_bytes: what one device sends to others for this layer's exchange, forward and backward.
    """

    aux_loss: jax.Array
    z_loss: jax.Array
    load_E: jax.Array
    dropped: jax.Array
    recycled: jax.Array
    entropy: jax.Array
    wire_bytes: jax.Array

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

        routed_BTD, wire_bytes = self._routed(x_BTD, experts_BTK, weights_BTK, slots, layout)
        if self.config.num_shared_experts:
            with jax.named_scope("shared_expert"):
                routed_BTD += self.shared(x_BTD, layout)
        stats = MoEStats(
            balance.aux_loss,
            balance.z_loss,
            balance.load_E,
            dropped,
            recycled,
            balance.entropy,
            jnp.asarray(wire_bytes, jnp.float32),
        )
        return routed_BTD, stats

    def _routed(
        self, x_BTD: jax.Array, experts_BTK: jax.Array, weights_BTK: jax.Array, slots: int | None, layout: Layout
    ) -> tuple[jax.Array, int]:
        """Σ_k weight_k · expert_k(x) and the bytes on the wire, on each device for its own part of the batch."""
        B, T, D = x_BTD.shape
        # `tensor` splits the experts' width, and each of its devices then takes the tokens of all of them; or else it
        # shares out the experts, and each takes its own.
        splits_width = layout.config.splits_width
        local_batch, length = B // layout.batch_shards, layout.tokens_length(T, gathered=splits_width)
        limit = local_batch * (length if slots is None else min(slots, length))
        exchange = backend(self.execution.exchange)
        exchanges = layout.expert_parallelism > 1

        def on_each_device(x_BTD, experts_BTK, weights_BTK, weights: ExpertWeights):
            if splits_width:
                x_BTD, experts_BTK, weights_BTK = map(layout.gather_sequence, (x_BTD, experts_BTK, weights_BTK))
            x_AD, experts_AK, weights_AK = (x.reshape(-1, x.shape[-1]) for x in (x_BTD, experts_BTK, weights_BTK))
            with jax.named_scope("dispatch"):
                dispatched = dispatch(x_AD, experts_AK, self.config.num_experts)
            if exchanges:
                with jax.named_scope("exchange"):
                    rows_RD = dispatched.rows_RD.astype(self.precision.exchange)
                    arrived = exchange.send(rows_RD, dispatched.order.counts_E, layout.expert_axes, limit)
                y_SD = apply_experts(arrived.rows_SD.astype(x_AD.dtype), arrived.counts_E, weights, self.execution)
                with jax.named_scope("exchange"):
                    y_RD = exchange.bring_back(y_SD.astype(self.precision.exchange), arrived, layout.expert_axes)
                    y_RD = y_RD.astype(x_AD.dtype)
            else:
                y_RD = apply_experts(dispatched.rows_RD, dispatched.order.counts_E, weights, self.execution)
            with jax.named_scope("combine"):
                y_BTD = combine(y_RD, weights_AK, dispatched).reshape(x_BTD.shape)
            return layout.sum_to_sequence(y_BTD) if splits_width else y_BTD

        weights = self.experts.weights(layout)
        if layout.mesh is None:
            return on_each_device(x_BTD, experts_BTK, weights_BTK, weights), 0
        tokens = layout.activation_spec("BTD")
        routed = layout.shard_map(on_each_device, (tokens, tokens, tokens, self.experts.specs(layout)), tokens)
        rows = local_batch * length * experts_BTK.shape[-1]
        one_way = exchange.bytes_sent(
            rows,
            D,
            jnp.dtype(self.precision.exchange).itemsize,
            self.config.num_experts,
            layout.expert_parallelism,
            limit,
        )
        # There and back, in the forward and again in the backward pass.
        return routed(x_BTD, experts_BTK, weights_BTK, weights), 4 * one_way
