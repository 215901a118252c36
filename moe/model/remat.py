"""What the backward pass recomputes instead of keeping: named policies over one group of layers."""

from collections.abc import Callable

import jax

from moe.model.config import ConfigError


def rematerialise(layers: Callable, policy: str) -> Callable:
    """Wraps the function of one scanned group.

    "none": every intermediate is kept; most memory, no recomputation.
    "matmuls": outputs of the matrix products with weights are kept, the rest is computed again.
    "full": only the group's input is kept, its forward pass runs twice.
    """
    if policy == "none":
        return layers
    if policy == "full":
        return jax.checkpoint(layers)
    if policy == "matmuls":
        return jax.checkpoint(layers, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    raise ConfigError(f"execution.remat={policy!r}: give 'none', 'matmuls' or 'full'")
