"""All scores at once: the plainest backend, and the fastest for short sequences on CPU."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe.ops.attention.view import View
from moe.ops.matmul import wide_einsum


def dense_attention(
    q_BTNH: jax.Array, k_BSMH: jax.Array, v_BSMH: jax.Array, view: View, softmax: DTypeLike = jnp.float32
) -> jax.Array:
    """See `moe.ops.attention.attention`. Holds B·N·T·S scores in the softmax's format, and key-value heads are not
    repeated."""
    B, T, N, H = q_BTNH.shape
    M = k_BSMH.shape[2]
    q_BMGTH = jnp.moveaxis(q_BTNH.reshape(B, T, M, N // M, H), 1, 3)
    k_BMSH, v_BMSH = (jnp.swapaxes(x_BSMH, 1, 2) for x_BSMH in (k_BSMH, v_BSMH))
    # Scores in a narrower format are never held in float32.
    narrow = partial(jnp.einsum, preferred_element_type=softmax)
    multiply = wide_einsum if jnp.dtype(softmax) == jnp.float32 else narrow
    # As second factors keys are turned around by XLA's CPU backend. Of few queries it is less to turn the scores.
    if T * N // M < H:
        scores_BMGTS = jnp.moveaxis(multiply("BMSH,BMGTH->BMSGT", k_BMSH, q_BMGTH), 2, -1)
    else:
        scores_BMGTS = multiply("BMGTH,BMSH->BMGTS", q_BMGTH, k_BMSH)
    scores_BMGTS *= H**-0.5
    allowed_B11TS = view.mask()[:, None, None]
    # exp of a hidden score is replaced, not only its argument: a row without any visible key must sum to exactly 0.
    scores_BMGTS = jnp.where(allowed_B11TS, scores_BMGTS, jnp.finfo(softmax).min)
    largest_BMGT1 = jax.lax.stop_gradient(scores_BMGTS.max(-1, keepdims=True))
    weights_BMGTS = jnp.where(allowed_B11TS, jnp.exp(scores_BMGTS - largest_BMGT1), 0)
    total_BMGT1 = weights_BMGTS.sum(-1, keepdims=True, dtype=jnp.float32).astype(softmax)
    weights_BMGTS = (weights_BMGTS / jnp.where(total_BMGT1 == 0, 1, total_BMGT1)).astype(q_BTNH.dtype)
    y_BMGTH = jnp.einsum("BMGTS,BMSH->BMGTH", weights_BMGTS, v_BMSH)
    return jnp.moveaxis(y_BMGTH, 3, 1).reshape(B, T, N, H)
