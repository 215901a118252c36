"""What "delayed" scaling remembers: the largest magnitudes of x, w and dy in past steps.

The cotangent that a product returns for its history is the next history (as flax.linen.fp8_ops has it): after the
backward pass the training step puts it where the history was, instead of treating it as a gradient.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe.ops.scaled.quantize import ALL, Scaled, largest_magnitude, rounded, scales_for
from parallel.layout import STAGE_AXIS

HISTORY_LENGTH = 16
"""Steps that are remembered."""

X, W, DY = 0, 1, 2
_PRESUMED = (16.0, 1.0, 2.0**-10)
"""Largest magnitudes before anything has been seen; for one step, after which each is known."""


def new_history() -> jax.Array:
    """f32 [3, HISTORY_LENGTH], zeros: nothing seen yet of x, w and dy. The newest come first."""
    return jnp.zeros((3, HISTORY_LENGTH), jnp.float32)


def quantize_delayed(x: jax.Array, dtype: DTypeLike, history: jax.Array, which: int) -> tuple[Scaled, jax.Array]:
    """x in the format by the scale of its past, cut off beyond it; and its present largest magnitude."""
    largest, seen = largest_magnitude(x, (ALL,) * x.ndim), history[which].max()
    scale = scales_for(jnp.where(seen == 0, _PRESUMED[which], seen), dtype).reshape(largest.shape)
    values = rounded(x, scale, dtype, gradient=which == DY)
    # Cut off is what is finite only.
    return Scaled(values, jnp.where(jnp.isfinite(largest), scale, jnp.nan)), largest.reshape(())


def next_history(history: jax.Array, largest: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    """The history with the present step's largest magnitudes of x, w and dy in front, the oldest dropped.

    Inside `jax.shard_map` (with check_vma=False, as everywhere here) the history must be given to every device whole,
    PartitionSpec(), but for pipeline stages, which have layers of their own. The magnitudes are the largest over all
    devices. The transpose of shard_map sums the cotangents of what every device was given; so one of them returns the
    history, and the others zeros.
    """
    now = jnp.stack(largest)
    axes = tuple(axis for axis in jax.sharding.get_abstract_mesh().manual_axes if axis != STAGE_AXIS)
    if axes:
        now = jax.lax.pmax(now, axes)
    after = jnp.concatenate([now[:, None], history[:, :-1]], axis=1)
    if axes:
        first = jnp.stack([jax.lax.axis_index(axis) == 0 for axis in axes]).all()
        after = jnp.where(first, after, 0)
    return after
