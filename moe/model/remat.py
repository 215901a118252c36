"""What the backward pass recomputes instead of keeping: named policies over one group of layers."""

from collections.abc import Callable

import jax

from moe.model.config import ConfigError
from parallel.layout import HOST_MEMORY


def rematerialise(layers: Callable, policy: str) -> Callable:
    """Wraps the function of one scanned group.

    "none": every intermediate is kept; most memory, no recomputation.
    "matmuls": outputs of the matrix products with weights are kept, the rest is computed again.
    "matmuls_on_host": as "matmuls", and what is kept waits in the host's memory.
    "full": only the group's input is kept, its forward pass runs twice.
    """
    if policy == "none":
        return layers
    if policy == "full":
        return jax.checkpoint(layers)
    if policy == "matmuls":
        return jax.checkpoint(layers, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    if policy == "matmuls_on_host":
        offload = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", HOST_MEMORY)
        return jax.checkpoint(layers, policy=offload)
    raise ConfigError(f"execution.remat={policy!r}: give 'none', 'matmuls', 'matmuls_on_host' or 'full'")
