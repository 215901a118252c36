"""Which number format each kind of tensor has: one policy, read by every module."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import jax.numpy as jnp
from jax.typing import DTypeLike

from moe.model.config import ConfigError
from moe.ops.quantize import Quantized
from moe.ops.scaled import Recipe, Scaling
from parallel.blocks import EIGHT_BIT, EightBit
from parallel.exchange.wire import WIRE_FORMATS, WireFormat
from parallel.layout import LayoutConfig

Format = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Precision:
    """Number formats by kind of tensor.

    Sums are float32, whatever their terms: in products of matrices (XLA's of bfloat16, and the kernels of moe/ops), in
    norms and softmaxes, over the vocabulary and over tokens. Norms, RoPE, the router's probabilities and the loss are
    computed in float32, and no such array outlives its use: logits exist for training.loss_chunk positions at a time,
    and for the backward pass the others are saved what they take and give, in the compute format.

    parameters: as stored, and updated by the optimizer.
    compute: inputs of the matrix products and the residual stream.
    router: inputs of the product that gives the router's logits. In bfloat16, close calls between experts may go the
        other way.
    softmax: scores of attention as they are held, for execution.attention "dense". The other backends hold a block of
        them at a time, in float32.
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
    activations: in which a model that serves multiplies texts of several tokens, as a prefill does, with its quantized
        matrices: these stay as they are, and rows are quantized as they come (moe/ops/scaled/frozen.py). As `frozen`,
        "int8" or "fp8"; None widens the matrices. A single token's products wait for memory, and widen them always.
    cache: in which a model that serves keeps keys and values, with scales (moe/model/cache.py); None as `compute`.
    matmuls: in which the products with the weights of attention, experts, dense layers and the head are computed in
        training, forward and both backward ones (moe/ops/scaled); None in `compute`. Weights and activations between
        the products keep their formats, and the products with adapters and routers theirs.
    scaling: of what is brought into that format: by one scale a tensor, from its present largest magnitude ("tensor")
        or from those of past steps ("delayed"), by one a row of activations and a column of weights ("row"), or by one
        a block of 128 ("block").
    """

    parameters: Format = "float32"
    compute: Format = "bfloat16"
    router: Format = "float32"
    softmax: Format = "float32"
    gradients: Format = "float32"
    exchange: WireFormat = "bfloat16"
    gathered: EightBit | None = None
    frozen: Format | Quantized | None = None
    activations: EightBit | None = None
    cache: EightBit | None = None
    matmuls: EightBit | None = None
    scaling: Scaling = "tensor"

    def __post_init__(self) -> None:
        for name in ("parameters", "compute", "router", "softmax", "gradients"):
            value = getattr(self, name)
            if value not in ("float32", "bfloat16"):
                raise ConfigError(f"precision.{name}={value!r}: give 'float32' or 'bfloat16'")
        if self.exchange not in WIRE_FORMATS:
            raise ConfigError(f"precision.exchange={self.exchange!r}: give one of {', '.join(WIRE_FORMATS)}")
        for name in ("gathered", "activations", "cache", "matmuls"):
            value = getattr(self, name)
            if value not in (None, *EIGHT_BIT):
                raise ConfigError(f"precision.{name}={value!r}: give one of {', '.join(EIGHT_BIT)}, or none")
        known = (*get_args(Format), *get_args(Quantized))
        if self.frozen is not None and self.frozen not in known:
            raise ConfigError(f"precision.frozen={self.frozen!r}: give one of {', '.join(known)}, or none")
        if self.activations not in (None, self.frozen):
            raise ConfigError(
                f"precision.activations={self.activations!r} with precision.frozen={self.frozen!r}: give both "
                "as 'int8' or 'fp8', or activations=none"
            )
        if self.scaling not in get_args(Scaling):
            raise ConfigError(f"precision.scaling={self.scaling!r}: give one of {', '.join(get_args(Scaling))}")
        if self.scaling != "tensor" and self.matmuls is None:
            raise ConfigError(
                f"precision.scaling={self.scaling!r} with precision.matmuls=none: nothing is scaled; set "
                "precision.matmuls='fp8' or 'int8', or scaling='tensor'"
            )
        if self.matmuls is not None and self.quantized is not None:
            raise ConfigError(
                f"precision.matmuls={self.matmuls!r} with precision.frozen={self.frozen!r}: the frozen matrices would "
                "be rounded twice; set precision.frozen='bfloat16', or matmuls=none"
            )
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
    def recipe(self) -> Recipe | None:
        """Of products in 8 bits."""
        return None if self.matmuls is None else Recipe(self.matmuls, self.scaling)

    @property
    def wide(self) -> "Precision":
        """With all products in the compute format, as a model serves: a scale would make a text depend on others."""
        return replace(self, matmuls=None, scaling="tensor")

    @property
    def delayed(self) -> bool:
        """Whether products have histories, from which their scales come."""
        return self.recipe is not None and self.scaling == "delayed"

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
