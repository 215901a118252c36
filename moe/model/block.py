"""One layer, and the group of layers that share keys and values."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe.model.adapter import LoraConfig
from moe.model.attention import Attention, SharedKeyValue, Sight
from moe.model.cache import GroupCache
from moe.model.config import ModelConfig
from moe.model.execution import Execution
from moe.model.feed_forward import FeedForward
from moe.model.moe_layer import MoELayer, MoEStats
from moe.model.parameter import norm_scale
from moe.model.precision import Precision
from moe.model.randomness import Purpose, layer_key
from moe.ops.norm import rms_norm
from parallel.layout import Layout


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)) (released code, HunYuanDecoderLayer)."""

    def __init__(
        self,
        config: ModelConfig,
        precision: Precision,
        execution: Execution,
        *,
        dense: bool,
        projects_kv: bool,
        rngs: nnx.Rngs,
    ) -> None:
        self.eps = config.norm_eps
        self.dtype = precision.compute_dtype
        self.attention_norm_D = norm_scale("D", config.d_model, precision)
        self.attention = Attention(config, precision, execution, projects_kv=projects_kv, rngs=rngs)
        self.feed_forward_norm_D = norm_scale("D", config.d_model, precision)
        self.feed_forward: FeedForward | MoELayer
        if dense:
            self.feed_forward = FeedForward(
                config.d_model, config.d_dense, "dense", config.init_std, precision, rngs=rngs
            )
        else:
            self.feed_forward = MoELayer(config, precision, execution, rngs=rngs)

    def adapt(self, config: LoraConfig, precision: Precision, *, rngs: nnx.Rngs) -> None:
        """Sets adapters beside the weights that `config` names."""
        self.attention.adapt(config, precision, rngs=rngs)
        self.feed_forward.adapt(config, precision, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        sight: Sight,
        shared: SharedKeyValue | None,
        layer: jax.Array,
        key: jax.Array | None,
        layout: Layout,
        cache: GroupCache | None = None,
    ) -> tuple[jax.Array, SharedKeyValue, MoEStats | None]:
        """The layer's output, the keys and values of its group, and a MoE layer's statistics."""
        drawn = None if key is None else layer_key(key, layer, Purpose.ADAPTER_DROPOUT)
        with jax.named_scope("attention"):
            with jax.named_scope("norm"):
                normed_BTD = rms_norm(x_BTD, self.attention_norm_D[...].astype(self.dtype), self.eps)
            y_BTD, shared = self.attention(normed_BTD, sight, shared, layout, cache, drawn)
            x_BTD = layout.constrain(x_BTD + y_BTD, "BTD")
        with jax.named_scope("feed_forward"):
            with jax.named_scope("norm"):
                normed_BTD = rms_norm(x_BTD, self.feed_forward_norm_D[...].astype(self.dtype), self.eps)
            stats = None
            if isinstance(self.feed_forward, MoELayer):
                valid_BT = sight.segments_BT > 0
                y_BTD, stats = self.feed_forward(normed_BTD, valid_BT, layer, key, layout)
            else:
                with jax.named_scope("dense"):
                    y_BTD = self.feed_forward(normed_BTD, layout, drawn)
            return layout.constrain(x_BTD + y_BTD, "BTD"), shared, stats


class GroupOutput(NamedTuple):
    """
    x_BTD: of the last layer.
    stats: of the group's MoE layers, stacked; None without any.
    cache: with the new tokens in it; None where there was none.
    inputs: the x_BTD that each layer took.
    """

    x_BTD: jax.Array
    stats: MoEStats | None
    cache: GroupCache | None
    inputs: list[jax.Array]


class Group(nnx.Module):
    """Consecutive layers of one cross-layer attention group: the first projects k and v for all of them."""

    def __init__(
        self,
        dense: tuple[bool, ...],
        config: ModelConfig,
        precision: Precision,
        execution: Execution,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_turn = precision.quantized is not None
        self.blocks = nnx.List(
            Block(config, precision, execution, dense=is_dense, projects_kv=place == 0, rngs=rngs)
            for place, is_dense in enumerate(dense)
        )

    def __call__(
        self,
        x_BTD: jax.Array,
        sight: Sight,
        first_layer: jax.Array,
        key: jax.Array | None,
        layout: Layout,
        cache: GroupCache | None = None,
    ) -> GroupOutput:
        shared, found, inputs = None, [], []
        for place, block in enumerate(self.blocks):
            inputs.append(x_BTD)
            if self.in_turn:
                x_BTD, block = in_turn(x_BTD, block)
            x_BTD, shared, stats = block(x_BTD, sight, shared, first_layer + place, key, layout, cache)
            if stats is not None:
                found.append(stats)
        assert shared is not None, "a group has at least one layer"
        stacked = jax.tree.map(lambda *each: jnp.stack(each), *found) if found else None
        return GroupOutput(x_BTD, stacked, shared.cache, inputs)


def in_turn(x_BTD: jax.Array, layers: Any) -> tuple[jax.Array, Any]:
    """Layers whose weights are not gathered and widened before x_BTD is there: XLA would do so for those of many more,
    to overlap it, and memory is what weights are shared out and quantized for."""
    graph, weights = nnx.split(layers)
    x_BTD, weights = jax.lax.optimization_barrier((x_BTD, weights))
    return x_BTD, nnx.merge(graph, weights)
