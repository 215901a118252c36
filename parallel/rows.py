"""Moving rows of an array to new places by tables of places."""

import jax
import jax.numpy as jnp
import numpy as np

_FEW_BUCKETS = 64


def take_rows(x_RD: jax.Array, source_S: jax.Array) -> jax.Array:
    """y[s] = x[source[s]], and a row of zeros where source[s] is R."""
    return x_RD.at[source_S].get(mode="fill", fill_value=0)


def no_gradient(x: jax.Array) -> np.ndarray:
    """The cotangent of an integer array, as a custom VJP must return it."""
    return np.zeros(x.shape, jax.dtypes.float0)


def inverse_places(source_S: jax.Array, num_rows: int) -> jax.Array:
    """For each of `num_rows` rows the s with source[s] = r, and S where there is none. i32[num_rows].

    Entries of `source_S` equal to `num_rows` stand for no row.
    """
    places_S = jnp.arange(source_S.size, dtype=jnp.int32)
    return jnp.full(num_rows, source_S.size, jnp.int32).at[source_S].set(places_S, mode="drop")


def bucket_of_place(ends_E: jax.Array, places_S: jax.Array) -> jax.Array:
    """For each place the bucket in which it lies, where these stand one after the other and bucket e ends before
    ends[e]; the last one for a place beyond all. i32[S]."""
    found_S = jnp.searchsorted(ends_E, places_S, side="right", method=search_method(ends_E.size))
    return jnp.minimum(found_S, ends_E.size - 1).astype(jnp.int32)


def search_method(num_buckets: int) -> str:
    """How `jnp.searchsorted` is to search for so many buckets. By itself it is a loop, which cuts what could be one
    launch on a GPU in pieces; without one it is dozens of operations to compile, where comparing with all is one."""
    return "compare_all" if num_buckets <= _FEW_BUCKETS else "scan_unrolled"


def exclusive_sum(x: jax.Array, axis: int = -1) -> jax.Array:
    """The sum of all earlier entries along `axis`."""
    return jnp.cumsum(x, axis) - x
