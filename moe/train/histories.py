"""Histories of the products' largest magnitudes from step to step (moe/model/products.py), as trees of f32[…, 3, H]."""

from typing import Any

import jax
import jax.numpy as jnp

from moe.model.config import ConfigError
from moe.model.execution import Execution
from moe.model.precision import Precision

OVERFLOW = 16.0
"""Times the largest magnitude of all steps that delayed scaling looks back on. Up to there values are cut off, as
Transformer Engine does it; beyond, training stops."""


def check_products(precision: Precision, execution: Execution, stages: int) -> None:
    """
    Raises:
        ConfigError: products in 8 bits by a backend that has none, or layers with histories are shared out over stages.
    """
    if precision.matmuls is not None and execution.grouped_matmul == "ragged":
        raise ConfigError(
            f"execution.grouped_matmul='ragged' with precision.matmuls={precision.matmuls!r}: that backend has no "
            "products in 8 bits; set 'auto', 'blocked' or 'triton'"
        )
    if precision.delayed and stages > 1:
        raise ConfigError(
            f"precision.scaling='delayed' with mesh.stage={stages}: pipelines keep no histories; set "
            "precision.scaling='tensor', 'row' or 'block', or mesh.stage=1"
        )


def growth(before: Any, after: Any) -> jax.Array:
    """f32[]: the most by which the largest magnitude of a step exceeds all of a full history; 0 where none is full. In
    the first steps scales are still being found: what is cut off in one product is too small for the next."""

    def of_product(before: jax.Array, after: jax.Array) -> jax.Array:
        return jnp.where(before[..., -1] > 0, after[..., 0] / before.max(-1), 0).max()

    found = jax.tree.leaves(jax.tree.map(of_product, before, after))
    return jnp.stack(found).max() if found else jnp.zeros(())
