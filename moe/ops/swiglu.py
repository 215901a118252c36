"""The gated activation of SwiGLU networks (Shazeer, arXiv 2002.05202)."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) · up, elementwise, of their dtype. The backward pass is saved nothing but the two."""
    return jax.nn.silu(gate) * up


def _forward(gate: jax.Array, up: jax.Array):
    return swiglu(gate, up), (gate, up)


def _backward(saved, dhidden: jax.Array):
    """d silu(g) = σ(g) · (1 + g · (1 − σ(g))), in float32."""
    gate, up, dhidden = (x.astype(jnp.float32) for x in (*saved, dhidden))
    share = jax.nn.sigmoid(gate)
    dgate = dhidden * up * share * (1 + gate * (1 - share))
    return dgate.astype(saved[0].dtype), (dhidden * gate * share).astype(saved[1].dtype)


swiglu.defvjp(_forward, _backward)
