"""The router: which experts take each token, with what weight, and what keeps them evenly loaded."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe.model.config import ModelConfig, RouterConfig
from moe.model.parameter import SelectionBias, matrix
from moe.model.precision import Precision
from parallel.layout import Layout
from parallel.sort_rows import sort_rows


class Routing(NamedTuple):
    """The router's choice, before capacity.

    experts_BTK: i32, the chosen experts, best first; E where the token is padding.
    weights_BTK: f32, with which their outputs are summed; 0 where the token is padding.
    probs_BTE, logits_BTE: f32.
    """

    experts_BTK: jax.Array
    weights_BTK: jax.Array
    probs_BTE: jax.Array
    logits_BTE: jax.Array


class Router(nnx.Module):
    """Softmax over all experts, then the top k (released code: top1gating, topkgating). In float32, but for the product
    where `Precision.router` says otherwise."""

    def __init__(self, config: ModelConfig, precision: Precision, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.dtype = jnp.dtype(precision.router)
        shape = (config.d_model, config.num_experts)
        self.w_DE = matrix("DE", shape, "router", config.init_std, precision, rngs)
        if config.router.balance == "bias":
            self.bias_E = SelectionBias(jnp.zeros(config.num_experts, jnp.float32))

    def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array, layout: Layout) -> Routing:
        w_DE = layout.gather(self.w_DE[...].astype(self.dtype), "DE")
        logits_BTE = layout.constrain(_logits(x_BTD, w_DE), "BTE")
        bias_E = self.bias_E[...] if self.config.router.balance == "bias" else None
        return choose(logits_BTE, valid_BT, self.config.router, bias_E)

    def move_bias(self, load_E: jax.Array) -> None:
        """Raises the selection bias of underloaded experts and lowers that of overloaded ones by router.bias_rate
        (arXiv 2408.15664, algorithm 1). Leading axes of stacked layers are carried along."""
        mean_load = 1.0 / self.config.num_experts
        self.bias_E[...] += self.config.router.bias_rate * jnp.sign(mean_load - load_E)


@jax.checkpoint
def _logits(x_BTD: jax.Array, w_DE: jax.Array) -> jax.Array:
    """f32. The backward pass is saved x in the format that it has, and widens it anew."""
    return jnp.einsum(
        "BTD,DE->BTE", x_BTD.astype(w_DE.dtype), w_DE, precision="highest", preferred_element_type=jnp.float32
    )


def choose(
    logits_BTE: jax.Array, valid_BT: jax.Array, config: RouterConfig, bias_E: jax.Array | None = None
) -> Routing:
    """Picks experts from logits.

    The weight is the softmax probability over all experts: as it is for top-1, scaled to sum 1 over the chosen for
    top-k (RouterConfig.renormalizes). `bias_E` takes part in the choice only, never in the weight
    (arXiv 2408.15664 eq. 3).
    """
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    scores_BTE = probs_BTE if bias_E is None else probs_BTE + bias_E
    _, experts_BTK = jax.lax.top_k(jax.lax.stop_gradient(scores_BTE), config.top_k)
    weights_BTK = jnp.take_along_axis(probs_BTE, experts_BTK, axis=-1)
    if config.renormalizes:
        weights_BTK /= jnp.maximum(weights_BTK.sum(-1, keepdims=True), jnp.finfo(jnp.float32).eps)
    valid_BT1 = valid_BT[..., None]
    return Routing(
        jnp.where(valid_BT1, experts_BTK, logits_BTE.shape[-1]),
        jnp.where(valid_BT1, weights_BTK, 0.0),
        probs_BTE,
        logits_BTE,
    )


class Balance(NamedTuple):
    """How evenly the router loads the experts, over all valid tokens of the batch and before any drop.

    aux_loss: E · Σ_e mean(chosen_e) · mean(prob_e), f32; K when even (Switch, arXiv 2101.03961 eq. 4; the release's
        E² · mean_e is the same).
    z_loss: mean of logsumexp(logits)², f32 (ST-MoE, arXiv 2202.08906 eq. 5).
    load_E: f32, share of the choices that fell on each expert; sums to 1.
    entropy: f32, mean entropy of the router's probabilities, nats.
    """

    aux_loss: jax.Array
    z_loss: jax.Array
    load_E: jax.Array
    entropy: jax.Array


def measure_balance(routing: Routing, valid_BT: jax.Array) -> Balance:
    num_experts = routing.probs_BTE.shape[-1]
    num_valid = jnp.maximum(valid_BT.sum(), 1).astype(jnp.float32)
    # One-hot of the padding's expert E is all zeros, so padding counts nowhere.
    chosen_E = jax.nn.one_hot(routing.experts_BTK, num_experts, dtype=jnp.float32).sum((0, 1, 2)) / num_valid
    probs_E = jnp.where(valid_BT[..., None], routing.probs_BTE, 0.0).sum((0, 1)) / num_valid
    log_z_BT = jax.nn.logsumexp(routing.logits_BTE, axis=-1)
    entropy_BT = log_z_BT - (routing.probs_BTE * routing.logits_BTE).sum(-1)
    return Balance(
        aux_loss=num_experts * (chosen_E * probs_E).sum(),
        z_loss=jnp.where(valid_BT, log_z_BT**2, 0.0).sum() / num_valid,
        load_E=chosen_E / jnp.maximum(chosen_E.sum(), 1e-9),
        entropy=jnp.where(valid_BT, entropy_BT, 0.0).sum() / num_valid,
    )


def capacity(config: RouterConfig, num_experts: int, sequence_length: int) -> int | None:
    """C: rows of one sequence that an expert takes, or None where routing is dropless."""
    if config.capacity_factor is None:
        return None
    even = config.capacity_factor * config.top_k * sequence_length / num_experts
    return min(sequence_length, math.ceil(even))


class Limited(NamedTuple):
    """The router's choice after capacity.

    experts_BTK: i32, E where the choice was dropped.
    weights_BTK: f32.
    dropped, recycled: f32, shares of the valid choices.
    """

    experts_BTK: jax.Array
    weights_BTK: jax.Array
    dropped: jax.Array
    recycled: jax.Array


def limit_capacity(routing: Routing, config: RouterConfig, slots: int, key: jax.Array | None) -> Limited:
    """Lets each expert take at most `slots` rows of each sequence.

    First choices of all tokens come before second ones, and earlier tokens before later (released code, topkgating).
    With overflow "recycle", dropped tokens get a random permutation of the free slots of all experts, and as weight
    the probability of the expert that takes them (released code, top1gating with random_routing_dropped_token).

    Args:
        slots: C.
        key: one key for the layer and step; each sequence draws its own from it. Needed to recycle.
    """
    num_experts = routing.probs_BTE.shape[-1]
    valid_BTK = routing.experts_BTK < num_experts
    kept_BTK = jax.vmap(lambda experts_TK: _kept(experts_TK, num_experts, slots))(routing.experts_BTK)
    lost_BTK = valid_BTK & ~kept_BTK
    experts_BTK = jnp.where(kept_BTK, routing.experts_BTK, num_experts)
    weights_BTK = jnp.where(kept_BTK, routing.weights_BTK, 0.0)
    num_valid = jnp.maximum(valid_BTK.sum(), 1)
    lost = lost_BTK.sum() / num_valid
    if config.overflow == "drop":
        return Limited(experts_BTK, weights_BTK, dropped=lost, recycled=jnp.zeros_like(lost))

    if key is None:
        raise ValueError("router.overflow='recycle' draws random slots: call the model with a key")
    keys_B = jax.random.split(key, experts_BTK.shape[0])
    recycle = jax.vmap(lambda experts_T, lost_T, key: _recycled(experts_T, lost_T, num_experts, slots, key))
    experts_BTK = recycle(experts_BTK[..., 0], lost_BTK[..., 0], keys_B)[..., None]
    probs_BTK = jnp.take_along_axis(routing.probs_BTE, jnp.minimum(experts_BTK, num_experts - 1), axis=-1)
    weights_BTK = jnp.where(lost_BTK, probs_BTK, weights_BTK)
    return Limited(experts_BTK, weights_BTK, dropped=jnp.zeros_like(lost), recycled=lost)


def _kept(experts_TK: jax.Array, num_experts: int, slots: int) -> jax.Array:
    order = sort_rows(experts_TK.T.reshape(-1, 1), num_experts)
    starts_E = jnp.cumsum(order.counts_E) - order.counts_E
    experts_KT = experts_TK.T.reshape(-1)
    place_KT = order.row_AK[:, 0] - starts_E.at[experts_KT].get(mode="fill", fill_value=0)
    return ((place_KT < slots) & (experts_KT < num_experts)).reshape(experts_TK.T.shape).T


def _recycled(experts_T: jax.Array, lost_T: jax.Array, num_experts: int, slots: int, key: jax.Array) -> jax.Array:
    taken_E = jax.nn.one_hot(experts_T, num_experts, dtype=jnp.int32).sum(0)
    free_EC = jnp.arange(slots)[None, :] >= taken_E[:, None]
    shuffled_EC = jnp.argsort(jnp.where(free_EC, jax.random.uniform(key, free_EC.shape), 2.0).reshape(-1))
    rank_T = jnp.cumsum(lost_T) - 1
    return jnp.where(lost_T, shuffled_EC[rank_T] // slots, experts_T).astype(jnp.int32)
