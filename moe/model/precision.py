"""Which number format each kind of tensor has: one policy, read by every module."""

from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
from jax.typing import DTypeLike

from moe.model.config import ConfigError
from moe.ops.quantize import Quantized
from parallel.blocks import EIGHT_BIT, EightBit
from parallel.exchange.wire import WIRE_FORMATS, WireFormat
from parallel.layout import LayoutConfig

Format = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Precision:
    """Number formats by kind of tensor. Router, softmax, norms and loss are always computed in float32.

    parameters: as stored, and updated by the optimizer.
    compute: inputs of the matrix products and the residual stream; products accumulate in float32.
    gradients: in which gradients are accumulated over microbatches and reduced over devices.
    exchange: rows on the wire between devices of the expert axis. In 8 bits each 32 numbers of a row share a power of
        two (parallel/blocks.py): "fp8" is e4m3, and e5m2 for gradients; "int8" the same for both.
    gathered: matrices of attention, experts and dense layers on the wire, where layout.zero=3 gathers them for use
        (ZeRO++, arXiv 2306.10209 §3.1; QSDP, 2302.02374): in the 8 bits of `exchange`'s values, about 32 neighbours
        along D sharing a power of two; None as `compute`. Gradients are those of the rounded matrix, taken for the
        matrix's own, and are summed over devices as ever. A matrix that is not shared out keeps its format.
    frozen: in which parameters that nothing trains are stored, those of a model that serves or lies beneath LoRA; None
        as `parameters`. The quantized formats (moe/ops/quantize.py) are for the matrices of attention, experts and
        dense layers; norms, routers, embedding and head are then as `parameters`. A layer's matrices are gathered as
        they are stored and widened for their one use. In training set execution.remat as well: what is not computed
        again in the backward pass is kept wide.
    """

    parameters: Format = "float32"
    compute: Format = "bfloat16"
    gradients: Format = "float32"
    exchange: WireFormat = "bfloat16"
    gathered: EightBit | None = None
    frozen: Format | Quantized | None = None

    def __post_init__(self) -> None:
        for name in ("parameters", "compute", "gradients"):
            value = getattr(self, name)
            if value not in ("float32", "bfloat16"):
                raise ConfigError(f"precision.{name}={value!r}: give 'float32' or 'bfloat16'")
        if self.exchange not in WIRE_FORMATS:
            raise ConfigError(f"precision.exchange={self.exchange!r}: give one of {', '.join(WIRE_FORMATS)}")
        if self.gathered not in (None, *EIGHT_BIT):
            raise ConfigError(f"precision.gathered={self.gathered!r}: give one of {', '.join(EIGHT_BIT)}, or none")
        known = (*get_args(Format), *get_args(Quantized))
        if self.frozen is not None and self.frozen not in known:
            raise ConfigError(f"precision.frozen={self.frozen!r}: give one of {', '.join(known)}, or none")
        if self.gathered and self.quantized:
            raise ConfigError(
                f"precision.gathered={self.gathered!r} with precision.frozen={self.frozen!r}: matrices travel as they "
                "are stored; leave gathered at none, or set frozen='bfloat16'"
            )

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


def check_gathered(precision: Precision, layout: LayoutConfig) -> None:
    """
    Raises:
        ConfigError: a format for gathered matrices where none are gathered.
    """
    if precision.gathered and layout.zero < 3:
        raise ConfigError(
            f"precision.gathered={precision.gathered!r} with layout.zero={layout.zero}: every device holds whole "
            "matrices; set layout.zero=3, or leave gathered at none"
        )
