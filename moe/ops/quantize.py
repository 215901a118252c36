"""Weight-only quantization: matrices kept in 8 or 4 bits with scales, and widened again just before they are used.

| format | values | one scale for | as |
|---|---|---|---|
| int8 | whole numbers -127 … 127 | an output column | LLM.int8 (arXiv 2208.07339, eq. 3) |
| fp8 | float8 e4m3, to 448 | an output column | arXiv 2209.05433 |
| int4 | whole numbers -8 … 7, kept as 0 … 15 | 128 inputs of a column | GPTQ (arXiv 2210.17323 §4), AWQ (2306.00978) |
| nf4 | 16 quantiles of the normal distribution | 64 inputs of a column | QLoRA (arXiv 2305.14314, appendix E) |

All are symmetric: without zero points. int4's scale is the largest magnitude / 7.5, so that all 16 values are used
(compressed-tensors, calculate_qparams). Scales of columns are float32; those of groups bfloat16, 0.125 bits a value for
int4 and 0.25 for nf4. QLoRA's second quantization, of the scales, is not done.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from parallel.blocks import EightBit, magnitude

Quantized = Literal["int8", "fp8", "int4", "nf4"]


class Number(NamedTuple):
    """How a value is stored, and the largest one."""

    dtype: jnp.dtype
    largest: float


EIGHT_BITS: dict[EightBit, Number] = {
    "int8": Number(jnp.dtype(jnp.int8), 127.0),
    "fp8": Number(jnp.dtype(jnp.float8_e4m3fn), 448.0),
}
"""Single values, without groups: also for keys and values, and for the rows of a product."""

GROUPS: dict[str, int] = {"int4": 128, "nf4": 64}
"""Inputs that share a scale, at most."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""QLoRA, appendix E."""


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["format", "axis"])
@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix in a quantized format; a pytree, which may have further axes in front.

    values: int8, float8_e4m3fn, or uint8 with two neighbours along `axis` in a byte, the first in its low half.
    scales: of as many axes; 1 long along an axis that shares one, and along `axis` as long as there are groups.
    axis: counted from the end, the one along which groups lie and neighbours are packed.
    """

    values: jax.Array
    scales: jax.Array
    format: Quantized
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix it stands for."""
        shape = list(self.values.shape)
        shape[self.axis] *= 2 if self.format in GROUPS else 1
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """Of the stored values."""
        return self.values.dtype


def quantize(w: jax.Array, format: Quantized, summed: tuple[int, ...]) -> QuantizedWeight:
    """The nearest representable values, with the largest magnitude of each column or group as its scale.

    Args:
        w: float, of any shape.
        summed: the axes that a product sums over, counted from the end. Groups lie along the last of them, and are as
            long as the largest divisor of its size allows.

    Raises:
        ValueError: a format that is none, or an odd number of values to pack in pairs.
    """
    if format not in get_args(Quantized):
        raise ValueError(f"format {format!r}: give one of {', '.join(get_args(Quantized))}")
    axis = summed[-1]
    w = w.astype(jnp.float32)
    if format == "int8" or format == "fp8":
        largest = jnp.abs(w).max(summed, keepdims=True)
        scales = jnp.where(largest == 0, 1.0, largest / EIGHT_BITS[format].largest)
        return QuantizedWeight(_nearest(w / scales, format), scales, format, axis)
    size = w.shape[axis]
    if size % 2:
        raise ValueError(f"{format} packs pairs along an axis of {size} values: make it even, or take int8 or fp8")
    group = group_size(size, GROUPS[format])
    scales = group_scales(jnp.abs(_cut(w, axis, group)).max(w.ndim + axis + 1), format)
    scaled = w / jnp.repeat(scales.astype(jnp.float32), group, axis)
    if format == "int4":
        codes = int4_codes(scaled)
    else:
        table = jnp.array(NF4, jnp.float32)
        codes = jnp.searchsorted((table[1:] + table[:-1]) / 2, scaled, method="compare_all").astype(jnp.uint8)
    return packed(codes, scales, format, axis)


def group_scales(largest: jax.Array, format: Quantized) -> jax.Array:
    """bf16: of groups in "int4" or "nf4" whose largest magnitudes are these."""
    return jnp.where(largest == 0, 1.0, largest / (7.5 if format == "int4" else 1.0)).astype(jnp.bfloat16)


def int4_codes(scaled: jax.Array) -> jax.Array:
    """u8, 0 … 15: the nearest of -8 … 7, plus 8."""
    return jnp.clip(jnp.round(scaled) + 8, 0, 15).astype(jnp.uint8)


def packed(codes: jax.Array, scales: jax.Array, format: Quantized, axis: int) -> QuantizedWeight:
    """A matrix of 0 … 15, with two neighbours along `axis` in a byte."""
    pairs = _cut(codes, axis, 2)
    low, high = (jax.lax.index_in_dim(pairs, i, codes.ndim + axis + 1, keepdims=False) for i in (0, 1))
    return QuantizedWeight(low | (high << 4), scales, format, axis)


def dequantize(w: QuantizedWeight, dtype: DTypeLike) -> jax.Array:
    """The matrix in the compute format; rounded once, from float32."""
    values, axis = w.values, w.values.ndim + w.axis
    if w.format in GROUPS:
        codes = jnp.stack([values & 15, values >> 4], axis + 1).reshape(w.shape)
        wide = codes.astype(jnp.float32) - 8 if w.format == "int4" else jnp.array(NF4, jnp.float32)[codes]
        scales = jnp.repeat(w.scales.astype(jnp.float32), w.shape[axis] // w.scales.shape[axis], axis)
    else:
        wide, scales = values.astype(jnp.float32), w.scales
    return (wide * scales).astype(dtype)


def quantize_rows(x: jax.Array, format: EightBit, scales: DTypeLike = jnp.float32) -> tuple[jax.Array, jax.Array]:
    """Each row, along the last axis, with the scale of its largest magnitude.

    Args:
        scales: their format. A row whose scale it cannot hold becomes zeros.

    Returns:
        values of x's shape, and scales without its last axis. What is not finite in a row leaves its scale not finite.
    """
    x = x.astype(jnp.float32)
    found = (magnitude(x).max(-1) / EIGHT_BITS[format].largest).astype(scales)
    found = jnp.where(found == 0, 1, found)
    return _nearest(x / found[..., None].astype(jnp.float32), format), found


def dequantize_rows(values: jax.Array, scales: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rows in the compute format; rounded once, from float32."""
    return (values.astype(jnp.float32) * scales[..., None].astype(jnp.float32)).astype(dtype)


def _nearest(scaled: jax.Array, format: EightBit) -> jax.Array:
    """The nearest values. A rounded scale may leave the largest a little above what the format holds."""
    dtype, largest = EIGHT_BITS[format]
    return jnp.clip(jnp.round(scaled) if format == "int8" else scaled, -largest, largest).astype(dtype)


def group_size(size: int, limit: int) -> int:
    """The largest divisor of `size` up to `limit`."""
    return next(group for group in range(min(size, limit), 0, -1) if size % group == 0)


def _cut(x: jax.Array, axis: int, group: int) -> jax.Array:
    """`axis`, counted from the end, as (groups, group)."""
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], -1, group, *x.shape[at + 1 :])
