"""What the backward pass recomputes instead of keeping: named policies over one group of layers."""

from collections.abc import Callable

import jax

from moe.model.config import ConfigError
from moe.model.products import SCALED_PRODUCT
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
    policies = jax.checkpoint_policies
    if policy == "matmuls":
        kept = _with_scaled(policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(SCALED_PRODUCT))
        return jax.checkpoint(layers, policy=kept)
    if policy == "matmuls_on_host":
        offload = _with_scaled(
            policies.offload_dot_with_no_batch_dims("device", HOST_MEMORY),
            policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[SCALED_PRODUCT],
                offload_src="device",
                offload_dst=HOST_MEMORY,
            ),
        )
        return jax.checkpoint(layers, policy=offload)
    raise ConfigError(f"execution.remat={policy!r}: give 'none', 'matmuls', 'matmuls_on_host' or 'full'")


def _with_scaled(of_dots: Callable, of_names: Callable) -> Callable:
    """Of products in 8 bits the result is kept, which has the compute format, and not the sum of 32 bits before it."""

    def policy(primitive, *operands, **parameters):
        if primitive.name == "name":
            return of_names(primitive, *operands, **parameters)
        if primitive.name == "dot_general" and all(x.dtype.itemsize == 1 for x in operands):
            return False
        return of_dots(primitive, *operands, **parameters)

    return policy
