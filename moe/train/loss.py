"""Next-token cross-entropy in chunks: float32 logits exist for one chunk of positions at a time."""

from functools import partial

import jax
import jax.numpy as jnp

from parallel.layout import Layout


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy_sum(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int,
    layout: Layout,
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
    """
    return _walk(hidden_BTD, head_VD, targets_BT, weights_BT, chunk, layout, with_gradients=False)


def _forward(hidden_BTD, head_VD, targets_BT, weights_BT, chunk, layout):
    loss, dhidden_BTD, dhead_VD = _walk(hidden_BTD, head_VD, targets_BT, weights_BT, chunk, layout, with_gradients=True)
    return loss, (dhidden_BTD, dhead_VD.astype(head_VD.dtype))


def _backward(chunk, layout, gradients, dloss):
    dhidden_BTD, dhead_VD = gradients
    return (dhidden_BTD * dloss).astype(dhidden_BTD.dtype), (dhead_VD * dloss).astype(dhead_VD.dtype), None, None


cross_entropy_sum.defvjp(_forward, _backward)


@jax.named_scope("head")
def _walk(hidden_BTD, head_VD, targets_BT, weights_BT, chunk, layout, *, with_gradients):
    layout = layout.for_length(hidden_BTD.shape[1])
    head_VD = layout.gather(head_VD.astype(hidden_BTD.dtype), "VD")

    def on_each_device(hidden_BTD, head_VD, targets_BT, weights_BT):
        hidden_BTD = layout.gather_sequence(hidden_BTD)
        chunks = _chunks(hidden_BTD, chunk), _chunks(targets_BT, chunk), _chunks(weights_BT, chunk)
        dhead_VD = jnp.zeros(head_VD.shape, jnp.float32) if with_gradients else None
        (loss, dhead_VD), dhidden_CBTD = jax.lax.scan(
            partial(_one_chunk, head_VD, layout), (jnp.zeros((), jnp.float32), dhead_VD), chunks
        )
        loss = layout.sum_over_batch(loss)
        if not with_gradients:
            return loss
        dhidden_BTD = jnp.moveaxis(dhidden_CBTD, 0, 1).reshape(hidden_BTD.shape[0], -1, hidden_BTD.shape[2])
        dhidden_BTD = layout.sum_to_sequence(dhidden_BTD[:, : hidden_BTD.shape[1]])
        return loss, dhidden_BTD, layout.sum_to_gradient(dhead_VD, "VD")

    if layout.mesh is None:
        return on_each_device(hidden_BTD, head_VD, targets_BT, weights_BT)
    tokens, stream, whole = layout.activation_spec("BT"), layout.activation_spec("BTD"), layout.whole_spec
    walk = layout.shard_map(
        on_each_device,
        (stream, layout.used_spec("VD"), tokens, tokens),
        (whole, stream, layout.gradient_spec("VD")) if with_gradients else whole,
    )
    return walk(hidden_BTD, head_VD, targets_BT, weights_BT)


def _chunks(x_BT: jax.Array, chunk: int) -> jax.Array:
    """x[B, T, …] as [T/chunk, B, chunk, …], zeros after the end: their weight is 0 as well."""
    length = x_BT.shape[1]
    chunk = min(chunk, length)
    padding = [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x_BT.ndim - 2)
    padded = jnp.pad(x_BT, padding)
    return jnp.moveaxis(padded.reshape(padded.shape[0], -1, chunk, *padded.shape[2:]), 1, 0)


def _one_chunk(head_VD, layout, carry, chunk):
    loss, dhead_VD = carry
    hidden_BTD, targets_BT, weights_BT = chunk
    logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD, preferred_element_type=jnp.float32)
    largest_BT = layout.max_over_tensor(logits_BTV.max(-1))
    log_z_BT = largest_BT + jnp.log(layout.sum_over_tensor(jnp.exp(logits_BTV - largest_BT[..., None]).sum(-1)))
    own_V = layout.first_over_tensor(head_VD.shape[0]) + jnp.arange(head_VD.shape[0])
    is_target_BTV = targets_BT[..., None] == own_V
    chosen_BT = layout.sum_over_tensor(jnp.where(is_target_BTV, logits_BTV, 0).sum(-1))
    loss += (weights_BT * (log_z_BT - chosen_BT)).sum()
    if dhead_VD is None:
        return (loss, None), None
    with jax.named_scope("backward"):
        dlogits_BTV = (jnp.exp(logits_BTV - log_z_BT[..., None]) - is_target_BTV) * weights_BT[..., None]
        dlogits_BTV = dlogits_BTV.astype(hidden_BTD.dtype)
        dhead_VD += jnp.einsum("BTV,BTD->VD", dlogits_BTV, hidden_BTD, preferred_element_type=jnp.float32)
        return (loss, dhead_VD), jnp.einsum("BTV,VD->BTD", dlogits_BTV, head_VD)
