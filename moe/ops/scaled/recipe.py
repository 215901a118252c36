"""How products are done in 8 bits: the format, what shares a scale, and where scales come from."""

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Format = Literal["fp8", "int8"]
Scaling = Literal["tensor", "delayed", "row", "block"]

HISTORY_LENGTH = 16
"""Steps whose largest magnitudes "delayed" looks back on (flax.linen.fp8_ops; Transformer Engine has 1024)."""


@dataclass(frozen=True)
class Recipe:
    """Of a product of an activation and a weight, and of the two products of its backward pass.

    format: "fp8" is float8_e4m3fn for activations and weights and float8_e5m2 for incoming gradients (arXiv 2209.05433
        §3); "int8" is that for all three.
    scaling: what shares a scale.
        "tensor": all of an operand (of grouped weights: all of an expert's), from its present largest magnitude.
        "delayed": likewise, from the largest of the last HISTORY_LENGTH steps, so that nothing waits for the present
            one; what has grown beyond it is cut off (Transformer Engine's delayed scaling).
        "row": what one output needs: a row of activations, a column of the weight, whole along the summed axes.
        "block": 128 along the last summed axis of activations and gradients, 128 x 128 of a weight (DeepSeek-V3,
            arXiv 2412.19437 §3.3.2).

    Raises:
        ValueError: a name that is none of these.
    """

    format: Format
    scaling: Scaling

    def __post_init__(self) -> None:
        for name, choices in (("format", Format), ("scaling", Scaling)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name}={getattr(self, name)!r}: give one of {', '.join(get_args(choices))}")

    @property
    def forward_dtype(self) -> DTypeLike:
        """Of activations and weights."""
        return jnp.int8 if self.format == "int8" else jnp.float8_e4m3fn

    @property
    def gradient_dtype(self) -> DTypeLike:
        """Of incoming gradients."""
        return jnp.int8 if self.format == "int8" else jnp.float8_e5m2


def new_history() -> jax.Array:
    """f32 [3, HISTORY_LENGTH], zeros: nothing seen yet of x, w and dy."""
    return jnp.zeros((3, HISTORY_LENGTH), jnp.float32)
