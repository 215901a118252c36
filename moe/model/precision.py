"""Which number format each kind of tensor has: one policy, read by every module."""

from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
from jax.typing import DTypeLike

from moe.model.config import ConfigError
from moe.ops.quantize import EightBits, Quantized

Format = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Precision:
    """Number formats by kind of tensor. Router, softmax, norms and loss are always computed in float32.

    parameters: as stored, and updated by the optimizer.
    compute: inputs of the matrix products and the residual stream; products accumulate in float32.
    gradients: in which gradients are accumulated over microbatches and reduced over devices.
    exchange: rows on the wire between devices of the expert axis.
    frozen: in which parameters that nothing trains are stored, those of a model that serves or lies beneath LoRA; None
        as `parameters`. The quantized formats (moe/ops/quantize.py) are for the matrices of attention, experts and
        dense layers; norms, routers, embedding and head are then as `parameters`. A layer's matrices are gathered as
        they are stored and widened for their one use. In training set execution.remat as well: what is not computed
        again in the backward pass is kept wide.
    cache: in which a model that serves keeps keys and values, with scales (moe/model/cache.py); None as `compute`.
    """

    parameters: Format = "float32"
    compute: Format = "bfloat16"
    gradients: Format = "float32"
    exchange: Format = "bfloat16"
    frozen: Format | Quantized | None = None
    cache: EightBits | None = None

    def __post_init__(self) -> None:
        for name in ("parameters", "compute", "gradients", "exchange"):
            value = getattr(self, name)
            if value not in ("float32", "bfloat16"):
                raise ConfigError(f"precision.{name}={value!r}: give 'float32' or 'bfloat16'")
        known = (*get_args(Format), *get_args(Quantized))
        if self.frozen is not None and self.frozen not in known:
            raise ConfigError(f"precision.frozen={self.frozen!r}: give one of {', '.join(known)}, or none")
        if self.cache is not None and self.cache not in get_args(EightBits):
            told = ", ".join(get_args(EightBits))
            raise ConfigError(f"precision.cache={self.cache!r}: give one of {told}, or none for the compute format")

    @property
    def compute_dtype(self) -> DTypeLike:
        return jnp.dtype(self.compute)

    @property
    def quantized(self) -> Quantized | None:
        """The quantized format of frozen matrices, where they have one."""
        return next((format for format in get_args(Quantized) if format == self.frozen), None)

    @property
    def stored_dtype(self) -> DTypeLike:
        """Of parameters that are not quantized, in a model of this policy."""
        return jnp.dtype(self.parameters if self.quantized else self.frozen or self.parameters)


FULL = Precision(parameters="float32", compute="float32", gradients="float32", exchange="float32")
"""float32 everywhere: for tests of equality and parity."""
