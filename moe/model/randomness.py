"""Random keys by purpose: folded from seed, step, layer and purpose, so that a resumed or re-sharded run draws the
same numbers."""

from enum import IntEnum

import jax


class Purpose(IntEnum):
    """What a key is drawn for. Numbers are part of a run's identity: add, never renumber."""

    INITIALIZE = 0
    RECYCLE = 1
    STEP = 2
    EVALUATE = 3
    ADAPTERS = 4
    ADAPTER_DROPOUT = 5
    ROUNDING = 6


def run_key(seed: int, purpose: Purpose) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), int(purpose))


def layer_key(key: jax.Array, layer: jax.Array | int, purpose: Purpose) -> jax.Array:
    """The key of one layer in one step, from the step's key."""
    return jax.random.fold_in(jax.random.fold_in(key, layer), int(purpose))
