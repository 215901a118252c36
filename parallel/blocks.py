"""Numbers in 8 bits, for the wire: blocks of 32 neighbours share a power of two, whose exponent takes a byte more.

These are MXFP8 and, up to a constant factor, MXINT8 (OCP Microscaling Formats v1.0, table 1), with the exponent rounded
up, so that nothing is clipped (arXiv 2506.08027). Because the factor is a power of two, a number from a block is exact
in bfloat16, and quantizing it again changes nothing: rows may travel in several steps.

A float32 factor for 128 numbers would take the same bytes. Root mean square errors, in percent of that of the numbers,
for 512 rows of 6400 normal numbers, and in brackets with one column in 256 thirty times as large:

| | int8 | e4m3 | e5m2 |
|---|---|---|---|
| 32, power of two | 0.83 (1.6) | 2.7 (2.6) | 5.3 (5.3) |
| 128, float32 | 0.65 (2.1) | 2.6 (1.5) | 5.1 (3.0) |
| a row, float32 | 0.89 (8.2) | 2.6 (2.4) | 5.3 (4.8) |

A block with a number in it that is not finite arrives with none that is. Blocks of zero bytes are zeros.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

EightBit = Literal["fp8", "int8"]
"""fp8 has 3 bits of mantissa for values (e4m3), and 2 for gradients (e5m2)."""

EIGHT_BIT: tuple[EightBit, ...] = get_args(EightBit)

Element = Literal["float8_e4m3fn", "float8_e5m2", "int8"]

BLOCK = 32
"""Numbers that share a factor (OCP Microscaling Formats v1.0, table 1)."""

_LARGEST: dict[Element, float] = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}
_MANTISSA_BITS = 23
_INFINITE = 255


class Blocks(NamedTuple):
    """An array in 8 bits.

    bits: u8, of its shape.
    exponents: u8, one for each block. A factor is 2^(exponent - 127).
    """

    bits: Array
    exponents: Array


def element_of(format: EightBit, *, gradient: bool = False) -> Element:
    """What `format` keeps values in, or their gradients."""
    if format == "int8":
        return "int8"
    return "float8_e5m2" if gradient else "float8_e4m3fn"


def magnitude(x: Array) -> Array:
    """|x|, infinity where it is no number: XLA's maximum on CPU may lose a nan (xla_cpu_enable_fast_min_max), but no
    infinity."""
    return jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))


def num_blocks(size: int, block: int = BLOCK) -> int:
    """Of an axis; the last may be short."""
    return -(-size // block)


def block_size(size: int) -> int:
    """The divisor of `size` nearest to 32, for blocks that must fill an axis of that size."""
    divisors = (block for block in range(1, size + 1) if size % block == 0)
    return min(divisors, key=lambda block: max(block / BLOCK, BLOCK / block))


def to_blocks(x: Array, element: Element, axis: int, block: int = BLOCK) -> Blocks:
    """
    Args:
        x: float.
        axis: along which `block` neighbours share a factor; not negative.
    """
    cut = _cut(x.astype(jnp.float32), axis, block)
    exponents = _exponents(magnitude(cut).max(axis + 1) / _LARGEST[element])
    scaled = cut / jnp.expand_dims(_factors(exponents), axis + 1)
    if element == "int8":
        scaled = jnp.round(scaled)
    bits = jax.lax.bitcast_convert_type(scaled.astype(element), jnp.uint8)
    return Blocks(_joined(bits, axis, x.shape[axis]), exponents)


def from_blocks(x: Blocks, element: Element, axis: int, block: int = BLOCK) -> Array:
    """The inverse, f32."""
    values = jax.lax.bitcast_convert_type(_cut(x.bits, axis, block), element).astype(jnp.float32)
    return _joined(values * jnp.expand_dims(_factors(x.exponents), axis + 1), axis, x.bits.shape[axis])


def pack_rows(rows_RD: Array, element: Element) -> Array:
    """Each row as the bytes of its numbers and, behind them, of its blocks' exponents: one array, one message.

    Returns:
        u8, `packed_width(D)` wide.
    """
    return jnp.concatenate(to_blocks(rows_RD, element, axis=1), axis=1)


def unpack_rows(packed: Array, width: int, element: Element) -> Array:
    """The inverse; width: D. rows_RD f32."""
    return from_blocks(Blocks(packed[:, :width], packed[:, width:]), element, axis=1)


def packed_width(width: int) -> int:
    """Bytes of a row of `width` numbers."""
    return width + num_blocks(width)


def _exponents(least: Array) -> Array:
    """Of the smallest powers of two that are no less than these, u8; 255 for what is not finite."""
    bits = jax.lax.bitcast_convert_type(least, jnp.uint32)
    rounded_up = (bits + jnp.uint32(2**_MANTISSA_BITS - 1)) >> _MANTISSA_BITS
    return jnp.clip(rounded_up, 1, _INFINITE).astype(jnp.uint8)


def _factors(exponents: Array) -> Array:
    """Their powers of two, f32: infinity for 255, and 0 for 0, which `to_blocks` never gives."""
    return jax.lax.bitcast_convert_type(exponents.astype(jnp.uint32) << _MANTISSA_BITS, jnp.float32)


def _cut(x: Array, axis: int, block: int) -> Array:
    """`axis` as (blocks, block), the last one filled up with zeros."""
    blocks = num_blocks(x.shape[axis], block)
    missing = blocks * block - x.shape[axis]
    if missing:
        x = jnp.pad(x, [(0, missing if place == axis else 0) for place in range(x.ndim)])
    return x.reshape(*x.shape[:axis], blocks, block, *x.shape[axis + 1 :])


def _joined(cut: Array, axis: int, size: int) -> Array:
    """The inverse."""
    whole = cut.reshape(*cut.shape[:axis], -1, *cut.shape[axis + 2 :])
    return jax.lax.slice_in_dim(whole, 0, size, axis=axis)
