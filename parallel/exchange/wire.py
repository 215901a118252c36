"""How rows look while they travel."""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from parallel.blocks import EIGHT_BIT, EightBit, element_of, pack_rows, packed_width, unpack_rows

Wide = Literal["float32", "bfloat16"]
WireFormat = Wide | EightBit

WIRE_FORMATS: tuple[WireFormat, ...] = (*get_args(Wide), *EIGHT_BIT)


def carry(
    rows_RD: jax.Array, move: Callable[[jax.Array], jax.Array], wire: WireFormat | None, *, gradient: bool = False
) -> jax.Array:
    """`move`, which brings rows to other places, with the rows in the wire's format; as they are where that is None.

    Args:
        move: gives rows of zero bytes where none arrive.
        gradient: whether the rows are gradients.
    """
    if wire is None:
        return move(rows_RD)
    if wire == "float32" or wire == "bfloat16":
        return move(rows_RD.astype(wire)).astype(rows_RD.dtype)
    element = element_of(wire, gradient=gradient)
    return unpack_rows(move(pack_rows(rows_RD, element)), rows_RD.shape[1], element).astype(rows_RD.dtype)


def bytes_of_row(width: int, wire: WireFormat | None) -> int:
    """Of `width` numbers on the wire, exponents and all; 0 without one."""
    if wire is None:
        return 0
    if wire in ("float32", "bfloat16"):
        return width * jnp.dtype(wire).itemsize
    return packed_width(width)
