"""Which number format each kind of tensor has: one policy, read by every module."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from moe.model.config import ConfigError

Format = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Precision:
    """Number formats by kind of tensor. Router, softmax, norms and loss are always computed in float32.

    parameters: as stored, and updated by the optimizer.
    compute: inputs of the matrix products and the residual stream; products accumulate in float32.
    gradients: in which gradients are accumulated over microbatches and reduced over devices.
    exchange: rows on the wire between devices of the expert axis.
    """

    parameters: Format = "float32"
    compute: Format = "bfloat16"
    gradients: Format = "float32"
    exchange: Format = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("parameters", "compute", "gradients", "exchange"):
            value = getattr(self, name)
            if value not in ("float32", "bfloat16"):
                raise ConfigError(f"precision.{name}={value!r}: give 'float32' or 'bfloat16'")

    @property
    def compute_dtype(self) -> DTypeLike:
        return jnp.dtype(self.compute)


FULL = Precision(parameters="float32", compute="float32", gradients="float32", exchange="float32")
"""float32 everywhere: for tests of equality and parity."""
