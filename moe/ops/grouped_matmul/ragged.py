"""jax.lax.ragged_dot behind this package's contract."""

import jax
import jax.numpy as jnp


def ragged_matmul(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """See `moe.ops.grouped_matmul.grouped_matmul`."""
    # Zeroed before as well as after: padding may hold anything, and 0 · inf is not 0.
    owned_R1 = (jnp.arange(x_RD.shape[0]) < sizes_E.sum())[:, None]
    x_RD = jnp.where(owned_R1, x_RD, 0)
    y_RF = jax.lax.ragged_dot(x_RD, w_EDF, sizes_E.astype(jnp.int32), preferred_element_type=jnp.float32)
    return jnp.where(owned_R1, y_RF, 0).astype(x_RD.dtype)
