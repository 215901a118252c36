"""Next-token cross-entropy in chunks: float32 logits exist for one chunk of positions at a time."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe.model.products import product, split_of
from moe.ops.matmul import einsum, weight_gradient
from moe.ops.scaled import Recipe
from parallel.layout import TENSOR_AXIS, Layout


def cross_entropy_sum(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int,
    layout: Layout,
    recipe: Recipe | None = None,
    history: jax.Array | None = None,
) -> jax.Array:
    """Σ weights · (logsumexp(logits) − logits[target]), f32[], in nats.

    The gradients are computed together with the loss, chunk by chunk: the logits are neither kept nor made twice.
    Each device adds up the head's gradient over its own chunks, so that it crosses the network once. Where `tensor`
    splits the vocabulary, each of its devices has the logits of its own part, and only their largest, their sum of
    exponentials and the target's logit cross the network (arXiv 1909.08053, section 3).

    Args:
        hidden_BTD: after the final norm, in the compute format.
        head_VD: as stored; it is cast to the compute format.
        targets_BT: i32.
        weights_BT: f32, 0 where there is nothing to predict.
        chunk: positions of each sequence whose logits exist at once.
        recipe: of the products in 8 bits. A chunk has scales of its own.
        history: of the head's product (moe/model/products.py).
    """
    return _cross_entropy_sum(hidden_BTD, head_VD, targets_BT, weights_BT, history, chunk, layout, recipe)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _cross_entropy_sum(hidden_BTD, head_VD, targets_BT, weights_BT, history, chunk, layout, recipe):
    given = (hidden_BTD, head_VD, targets_BT, weights_BT, history)
    return _walk(*given, chunk, layout, recipe, with_gradients=False)


def _forward(hidden_BTD, head_VD, targets_BT, weights_BT, history, chunk, layout, recipe):
    given = (hidden_BTD, head_VD, targets_BT, weights_BT, history)
    loss, dhidden_BTD, dhead_VD, following = _walk(*given, chunk, layout, recipe, with_gradients=True)
    return loss, (dhidden_BTD, dhead_VD.astype(head_VD.dtype), following)


def _backward(chunk, layout, recipe, gradients, dloss):
    dhidden_BTD, dhead_VD, following = gradients
    scaled = ((d * dloss).astype(d.dtype) for d in (dhidden_BTD, dhead_VD))
    return *scaled, None, None, following


_cross_entropy_sum.defvjp(_forward, _backward)


@jax.named_scope("head")
def _walk(hidden_BTD, head_VD, targets_BT, weights_BT, history, chunk, layout, recipe, *, with_gradients):
    layout = layout.for_length(hidden_BTD.shape[1])
    head_VD = layout.gather(head_VD.astype(hidden_BTD.dtype), "VD")

    def on_each_device(hidden_BTD, head_VD, targets_BT, weights_BT, history):
        hidden_BTD = layout.gather_sequence(hidden_BTD)
        chunks = _chunks(hidden_BTD, chunk), _chunks(targets_BT, chunk), _chunks(weights_BT, chunk)
        gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (head_VD, history))
        head = _Head(head_VD, history, layout, recipe, with_gradients)
        (loss, (dhead_VD, following)), dhidden_CBTD = jax.lax.scan(
            head.one_chunk, (jnp.zeros((), jnp.float32), gradients if with_gradients else (None, None)), chunks
        )
        loss = layout.sum_over_batch(loss)
        if not with_gradients:
            return loss
        dhidden_BTD = jnp.moveaxis(dhidden_CBTD, 0, 1).reshape(hidden_BTD.shape[0], -1, hidden_BTD.shape[2])
        dhidden_BTD = layout.sum_to_sequence(dhidden_BTD[:, : hidden_BTD.shape[1]])
        return loss, dhidden_BTD, layout.sum_to_gradient(dhead_VD, "VD"), _each(lambda h: h[None], following)

    walk = on_each_device
    if layout.mesh is not None:
        tokens, stream, whole = layout.activation_spec("BT"), layout.activation_spec("BTD"), layout.whole_spec
        taken = stream, layout.used_spec("VD"), tokens, tokens, whole
        made = whole, stream, layout.gradient_spec("VD"), _each(lambda _: layout.each_device().spec, history)
        walk = layout.shard_map(on_each_device, taken, made if with_gradients else whole)
    told = walk(hidden_BTD, head_VD, targets_BT, weights_BT, history)
    return (*told[:3], _each(lambda h: h.max(0), told[3])) if with_gradients else told


def _each(change: Callable[[jax.Array], jax.Array], history: jax.Array | None) -> jax.Array | None:
    return None if history is None else change(history)


def _chunks(x_BT: jax.Array, chunk: int) -> jax.Array:
    """x[B, T, …] as [T/chunk, B, chunk, …], zeros after the end: their weight is 0 as well."""
    length = x_BT.shape[1]
    chunk = min(chunk, length)
    padding = [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x_BT.ndim - 2)
    padded = jnp.pad(x_BT, padding)
    return jnp.moveaxis(padded.reshape(padded.shape[0], -1, chunk, *padded.shape[2:]), 1, 0)


class _Head(NamedTuple):
    """On one device."""

    w_VD: jax.Array
    history: jax.Array | None
    layout: Layout
    recipe: Recipe | None
    with_gradients: bool

    def one_chunk(self, carry, chunk):
        """`jax.lax.scan`'s step: (the loss, (the weight's gradient, the next history)) so far, and dhidden_BTD."""
        loss, gradients = carry
        hidden_BTD, targets_BT, weights_BT = chunk
        layout, own = self.layout, self.w_VD.shape[0]
        logits_BTV, pull = self._logits(hidden_BTD)
        largest_BT = layout.max_over_tensor(logits_BTV.max(-1))
        log_z_BT = largest_BT + jnp.log(layout.sum_over_tensor(jnp.exp(logits_BTV - largest_BT[..., None]).sum(-1)))
        is_target_BTV = targets_BT[..., None] == layout.first_over([TENSOR_AXIS], own) + jnp.arange(own)
        chosen_BT = layout.sum_over_tensor(jnp.where(is_target_BTV, logits_BTV, 0).sum(-1))
        loss += (weights_BT * (log_z_BT - chosen_BT)).sum()
        if not self.with_gradients:
            return (loss, gradients), None
        with jax.named_scope("backward"):
            dlogits_BTV = (jnp.exp(logits_BTV - log_z_BT[..., None]) - is_target_BTV) * weights_BT[..., None]
            dhidden_BTD, dhead_VD, following = pull(dlogits_BTV)
            summed_VD, seen = gradients
            seen = None if seen is None else jnp.maximum(seen, following)
            return (loss, (summed_VD + dhead_VD, seen)), dhidden_BTD.astype(hidden_BTD.dtype)

    def _logits(self, hidden_BTD: jax.Array) -> tuple[jax.Array, Callable]:
        """logits_BTV f32, and what leads from their gradient to those of hidden, weight and history."""
        if self.recipe is not None or self.history is not None:
            layout = self.layout
            split = (*split_of("BT", layout.activation_spec("BT")), *split_of("VD", layout.used_spec("VD")))

            def multiply(x, w, history):
                return product("BTD,VD->BTV", x, w, self.recipe, history, split)

            return jax.vjp(multiply, *(x.astype(jnp.float32) for x in (hidden_BTD, self.w_VD)), self.history)

        def pull(dlogits_BTV):
            dlogits_BTV = dlogits_BTV.astype(hidden_BTD.dtype)
            dhead_VD = weight_gradient("BTD,VD->BTV", hidden_BTD, dlogits_BTV, local=True)
            return einsum("BTV,VD->BTD", dlogits_BTV, self.w_VD), dhead_VD, None

        return jnp.einsum("BTD,VD->BTV", hidden_BTD, self.w_VD, preferred_element_type=jnp.float32), pull
