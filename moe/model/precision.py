"""Which number format each kind of tensor has: one policy, read by every module."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import jax.numpy as jnp
from jax.typing import DTypeLike

from moe.model.config import ConfigError
from moe.ops.quantize import EightBits, Quantized
from moe.ops.scaled import Format as Scaled
from moe.ops.scaled import Recipe, Scaling

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
    gradients: Format = "float32"
    exchange: Format = "bfloat16"
    frozen: Format | Quantized | None = None
    activations: EightBits | None = None
    cache: EightBits | None = None
    matmuls: Scaled | None = None
    scaling: Scaling = "tensor"

    def __post_init__(self) -> None:
        for name in ("parameters", "compute", "gradients", "exchange"):
            value = getattr(self, name)
            if value not in ("float32", "bfloat16"):
                raise ConfigError(f"precision.{name}={value!r}: give 'float32' or 'bfloat16'")
        known = (*get_args(Format), *get_args(Quantized))
        if self.frozen is not None and self.frozen not in known:
            raise ConfigError(f"precision.frozen={self.frozen!r}: give one of {', '.join(known)}, or none")
        if self.activations is not None and (
            self.activations not in get_args(EightBits) or self.activations != self.frozen
        ):
            raise ConfigError(
                f"precision.activations={self.activations!r} with precision.frozen={self.frozen!r}: give both "
                "as 'int8' or 'fp8', or activations=none"
            )
        if self.cache is not None and self.cache not in get_args(EightBits):
            told = ", ".join(get_args(EightBits))
            raise ConfigError(f"precision.cache={self.cache!r}: give one of {told}, or none for the compute format")
        if self.matmuls is not None and self.matmuls not in get_args(Scaled):
            raise ConfigError(f"precision.matmuls={self.matmuls!r}: give one of {', '.join(get_args(Scaled))}, or none")
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
