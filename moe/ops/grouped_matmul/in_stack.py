"""A layer's matrices left where they stand, among those of all layers.

A loop over layers that hands each turn its layer's matrices copies them all; the product on CPU reads one matrix after
the other, and may be told where they are instead.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe.ops.bits import as_bits, from_bits
from moe.ops.quantize import QuantizedWeight, dequantize


class InStack(NamedTuple):
    """E matrices of one layer.

    stack_LEDF: those of all layers, in any format; what is bfloat16 may be given as its bits. It gets no gradient.
    layer: i32[], the layer's number in the stack.
    landing_EDF: an array that no product reads, and whose gradient is the matrices'; None where they are quantized.
    """

    stack_LEDF: jax.Array | QuantizedWeight
    layer: jax.Array
    landing_EDF: jax.Array | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack_LEDF.shape[1:]

    def matrices(self, e: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Those of the groups e, i32 of any shape."""
        found = jax.tree.map(lambda x: from_bits(as_bits(x)[self.layer, e], jnp.bfloat16), self.stack_LEDF)
        return dequantize(found, dtype) if isinstance(found, QuantizedWeight) else found.astype(dtype)

    def landed(self, dw_EDF: jax.Array) -> "InStack":
        """The gradient of this, for `jax.custom_vjp`: that of the landing alone."""
        nothing: Any = None
        landing_EDF = self.landing_EDF
        return InStack(nothing, nothing, None if landing_EDF is None else dw_EDF.astype(landing_EDF.dtype))


@jax.custom_vjp
def landing(stack_LEDF: jax.Array) -> jax.Array:
    """Zeros, whose gradient becomes that of the stack; of which a turn's part is its `landing_EDF`."""
    return jnp.zeros_like(stack_LEDF)


landing.defvjp(lambda stack_LEDF: (landing(stack_LEDF), None), lambda _, gradient: (gradient,))
