"""A loop over parts of a step that each fill much of a device's memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

TURNS = "turns_"
"""Begins the named scope of such a loop; its length follows. A program's text tells it nowhere else."""


def steady_scan(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` of which XLA is not told the length.

    Of a loop of known length it takes turns out, or computes two in one, so as to gather ahead. Zeros to which a turn
    adds, those of all layers' gradients above all, then exist from the program's beginning, for each turn anew: a third
    of a device's memory. On a GPU the host is asked before each turn whether one follows, microseconds of a turn's
    many milliseconds. Gradients do not go backward through it.
    """
    (length,) = {x.shape[0] for x in jax.tree.leaves(xs)}

    def one(place: jax.Array) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, place, keepdims=False), xs)

    def turn(place: jax.Array, reached: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, found = reached
        carry, told = body(carry, one(place))
        found = jax.tree.map(lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x, place, 0), found, told)
        return carry, found

    _, told = jax.eval_shape(body, carry, one(jnp.zeros((), jnp.int32)))
    found = jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), told)
    with jax.named_scope(f"{TURNS}{length}"):
        end = jax.lax.optimization_barrier(jnp.int32(length))
        return jax.lax.fori_loop(0, end, turn, (carry, found))
