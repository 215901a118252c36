"""The gated activation of SwiGLU networks (Shazeer, arXiv 2002.05202)."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """silu(gate) · up, elementwise, of their dtype; and times `weights`, rounded once, where they are given.

    The backward pass is saved nothing but the arguments.

    Args:
        weights: f32, one for each vector along the last axis.
    """
    if weights is None:
        return jax.nn.silu(gate) * up
    hidden = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return (hidden * weights[..., None]).astype(gate.dtype)


def _forward(gate: jax.Array, up: jax.Array, weights: jax.Array | None):
    return swiglu(gate, up, weights), (gate, up, weights)


def _backward(saved, dhidden: jax.Array):
    """d silu(g) = σ(g) · (1 + g · (1 − σ(g))), in float32."""
    gate, up, dhidden = (x.astype(jnp.float32) for x in (*saved[:2], dhidden))
    weights, dweights = saved[2], None
    share = jax.nn.sigmoid(gate)
    if weights is not None:
        dweights = (dhidden * gate * share * up).sum(-1)
        dhidden *= weights[..., None]
    dgate = dhidden * up * share * (1 + gate * (1 - share))
    return dgate.astype(saved[0].dtype), (dhidden * gate * share).astype(saved[1].dtype), dweights


swiglu.defvjp(_forward, _backward)
