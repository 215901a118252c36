"""How many of the routers' decisions a number format changes."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe.model.cache import KVCache
from moe.model.config import ModelConfig
from moe.model.execution import Execution
from moe.model.moe_layer import MoELayer
from moe.model.precision import Precision
from moe.model.products import MagnitudeHistory
from moe.model.transformer import Transformer
from moe.ops.bits import from_bits
from moe.train.data import Batch
from parallel.layout import SINGLE_DEVICE, Layout


def changed_choices(
    config: ModelConfig,
    params: dict[str, Any],
    balance: dict[str, Any],
    batch: Batch,
    before: Precision,
    after: Precision,
) -> jax.Array:
    """f32[L], by MoE layer: the share of a batch's choices of an expert for a token that the model makes as `before`
    has it computed, and not as `after` has. On one device, before capacity.

    A layer takes what the layers before it made in the same precision, so changes add up from layer to layer. Delayed
    scaling takes its scales from the batch itself.

    Args:
        params, balance: of a TrainState without adapters.
    """
    one, other = (chosen_experts(_model(config.dropless, each, params, balance), batch) for each in (before, after))
    return jnp.stack([changed_share(*choices, config.num_experts) for choices in zip(one, other, strict=True)])


def _model(config: ModelConfig, precision: Precision, params: dict[str, Any], balance: dict[str, Any]) -> Transformer:
    # The one backend that has scores in every format.
    execution = Execution(attention="dense")
    model = nnx.eval_shape(lambda: Transformer(config, precision, execution, rngs=nnx.Rngs(0)))
    unseen = jax.tree.map(lambda h: jnp.zeros(h.shape, h.dtype), nnx.to_pure_dict(nnx.state(model, MagnitudeHistory)))
    return nnx.merge(nnx.graphdef(model), params, balance, unseen)


def chosen_experts(model: Transformer, batch: Batch) -> list[jax.Array]:
    """experts_BTK of each MoE layer; E where a token is padding."""
    return watched(model, batch)[1]


def watched(model: Transformer, batch: Batch, cache: KVCache | None = None) -> tuple[jax.Array, list[jax.Array]]:
    """hidden_BTD behind the final norm, and experts_BTK of each MoE layer; E where a token is padding. Layer by layer,
    without a loop in the program.

    Args:
        cache: an empty one through which keys and values go; rows then are one document.
    """
    tokens_BT, _, positions_BT, segments_BT, _ = map(jnp.asarray, batch)
    sight, x_BTD = model.sight(tokens_BT, positions_BT, segments_BT), model.embed(tokens_BT, SINGLE_DEVICE)
    found: list[jax.Array] = []
    for number, stack in enumerate(model.stacks):
        graph, stacked = nnx.split(stack)
        repeat = len(jax.tree.leaves(stacked)[0])
        own = None if cache is None else cache.stacks[number]
        for place in range(repeat):
            group = nnx.merge(graph, jax.tree.map(lambda x, place=place: from_bits(x[place], jnp.bfloat16), stacked))
            for block in group.blocks:
                if isinstance(block.feed_forward, MoELayer):
                    watching: Any = _Watched(block.feed_forward.router, found)
                    block.feed_forward.router = watching
            of_group = None if own is None else own.group(jnp.int32(place))
            output = group(x_BTD, sight, jnp.zeros((), jnp.int32), None, SINGLE_DEVICE, of_group)
            x_BTD = output.x_BTD
            own = None if output.cache is None else output.cache.cache
    return model.final_norm(x_BTD), found


class _Watched(nnx.Module):
    """A router whose choices are noted."""

    def __init__(self, router: nnx.Module, found: list[jax.Array]) -> None:
        self.choose = lambda *given: router(*given)
        self.note = found.append

    def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array, layout: Layout):
        routing = self.choose(x_BTD, valid_BT, layout)
        self.note(routing.experts_BTK)
        return routing


def changed_share(one_BTK: jax.Array, other_BTK: jax.Array, num_experts: int) -> jax.Array:
    """f32[]: of the first's choices, padding's left out, those that the other does not make for the same token."""
    kept_BTK = (one_BTK[..., :, None] == other_BTK[..., None, :]).any(-1)
    valid_BTK = one_BTK < num_experts
    return (valid_BTK & ~kept_BTK).sum() / jnp.maximum(valid_BTK.sum(), 1)
