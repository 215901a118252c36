"""How products are done in 8 bits: the format, what shares a scale, and where scales come from."""

from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
from jax.typing import DTypeLike

from moe.ops.scaled.quantize import ALL, BLOCK, EACH
from parallel.blocks import EightBit

Scaling = Literal["tensor", "delayed", "row", "block"]
Split = tuple[tuple[str, tuple[str, ...]], ...]
"""Inside `jax.shard_map`: (axis of an array, mesh axes that split it), for each axis that is split."""


@dataclass(frozen=True)
class Recipe:
    """Of a product of an activation and a weight, and of the two products of its backward pass.

    format: "fp8" is float8_e4m3fn for activations and weights and float8_e5m2 for incoming gradients (arXiv 2209.05433
        §3); "int8" is that for all three, and gradients are rounded so that they are right on average
        (`quantize.rounded`). GPUs have fp8 from compute capability 8.9 on (H20, H100, L20). Before, XLA multiplies
        dense fp8 in float16, right and no faster, and Triton's kernels (grouped, or of "block") do not compile: an A100
        has int8, from 8.0 on.
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

    format: EightBit
    scaling: Scaling

    def __post_init__(self) -> None:
        for name, choices in (("format", EightBit), ("scaling", Scaling)):
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

    def shared(self, own: str, out: str, *, weight: bool = False) -> tuple[int, ...]:
        """What shares a scale along each axis of an operand with the axes `own`, in a product whose result has the axes
        `out`: for `moe.ops.scaled.quantize`."""
        summed, kept = [axis for axis in own if axis not in out], [axis for axis in own if axis in out]
        match self.scaling:
            case "row":
                return tuple(ALL if axis in summed else EACH for axis in own)
            case "block":
                blocks = summed[-1:] + (kept[-1:] if weight else [])
                return tuple(BLOCK if axis in blocks else EACH for axis in own)
            case _:
                return (ALL,) * len(own)

    def over(self, own: str, out: str, split: Split) -> tuple[str, ...]:
        """Mesh axes over which goes on what shares a scale by `shared`. Blocks end with a device's part."""
        shared = dict(zip(own, self.shared(own, out), strict=True))
        return tuple(name for axis, names in split if shared.get(axis) == ALL for name in names)

    def check_history(self, history: object | None) -> None:
        """
        Raises:
            ValueError: there is none and one is needed, or the other way round.
        """
        if (self.scaling == "delayed") != (history is not None):
            raise ValueError(f'scaling={self.scaling!r}: a history is given with "delayed", and with nothing else')
