"""bfloat16 as its bits, for what only moves it.

XLA's CPU backend widens bfloat16 for all but a few operations. An update of a slice in place becomes three of the whole
array: it is widened, updated and rounded again. Of integers it stays what it is.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from parallel.platform import platform


def as_bits(x: jax.Array) -> jax.Array:
    """u16 for bfloat16, on CPU; anything else as it is."""
    if x.dtype != jnp.bfloat16 or platform() != "cpu":
        return x
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


def from_bits(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """What `as_bits` was given, of this dtype."""
    return jax.lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 and dtype == jnp.bfloat16 else x
