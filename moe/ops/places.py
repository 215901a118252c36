"""Reading and writing an array at a place that is computed, and is never negative.

JAX's own functions count negative places from the end, and ask of each whether it is: three operations for a number,
of which loops over blocks have hundreds to trace and to compile.
"""

from functools import partial

import jax

slice_of = partial(jax.lax.dynamic_slice_in_dim, allow_negative_indices=False)
"""(x, start, size, axis=0)"""


def with_slice(x: jax.Array, new: jax.Array, start: jax.Array, axis: int = 0) -> jax.Array:
    """x with the slice from `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(x, new, start, axis, allow_negative_indices=False)


def entry(x: jax.Array, place: tuple[jax.Array, ...]) -> jax.Array:
    """x[place], of the first axes."""
    rest = x.shape[len(place) :]
    sizes = (*[1] * len(place), *rest)
    return jax.lax.dynamic_slice(x, _start(x, place), sizes, allow_negative_indices=False).reshape(rest)


def with_entry(x: jax.Array, new: jax.Array, place: tuple[jax.Array, ...]) -> jax.Array:
    """x with that entry."""
    new = new.reshape(*[1] * len(place), *new.shape)
    return jax.lax.dynamic_update_slice(x, new, _start(x, place), allow_negative_indices=False)


def _start(x: jax.Array, place: tuple[jax.Array, ...]) -> list[jax.Array | int]:
    return [*place, *[0] * (x.ndim - len(place))]
