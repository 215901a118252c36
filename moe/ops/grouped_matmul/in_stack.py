"""A layer's matrices left where they stand, among those of all layers.

A loop over layers that hands each turn its layer's matrices copies them all; the product on CPU reads one matrix after
the other, and may be told where they are instead. Their gradients are written into the stack's in the same way: it
goes backward through the loop, from layer to layer, as a value that each product hands on.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe.ops.bits import as_bits, from_bits
from moe.ops.places import entry
from moe.ops.quantize import QuantizedWeight, dequantize


class InStack(NamedTuple):
    """E matrices of one layer.

    stack_LEDF: those of all layers, in any format; what is bfloat16 may be given as its bits. It gets no gradient.
    layer: i32[], the layer's number in the stack.
    landing_LEDF: the stack in float32, of which no product reads the values, and which gets the gradient; None where
        there is none, as of what is frozen or quantized. A product takes over that of what comes after it, and sets its
        own layer's.
    """

    stack_LEDF: jax.Array | QuantizedWeight
    layer: jax.Array
    landing_LEDF: jax.Array | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack_LEDF.shape[1:]

    def matrix(self, e: jax.Array, dtype: DTypeLike) -> jax.Array:
        """That of group e, i32[]."""
        found = jax.tree.map(lambda x: from_bits(entry(as_bits(x), (self.layer, e)), jnp.bfloat16), self.stack_LEDF)
        return dequantize(found, dtype) if isinstance(found, QuantizedWeight) else found.astype(dtype)


def alone(w_EDF: jax.Array) -> InStack:
    """Matrices of which there is no stack but their own."""
    # A reshape: what only moves numbers no checkpoint keeps (moe/model/remat.py).
    stack_1EDF = w_EDF.reshape(1, *w_EDF.shape)
    return InStack(stack_1EDF, jnp.int32(0), stack_1EDF.astype(jnp.float32))
