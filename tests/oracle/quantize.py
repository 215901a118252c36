"""Weight-only quantization, value by value: what is left of a matrix after it is stored and read again."""

import itertools

import ml_dtypes
import numpy as np

# arXiv 2305.14314, appendix E.
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32,
)  # fmt: skip


def dequantized(w: np.ndarray, format: str, summed: tuple[int, ...]) -> np.ndarray:
    """w as `format` keeps it; see moe/ops/quantize.py for the arguments."""
    found = np.empty_like(w)
    grouped = [summed[-1]] if format in ("int4", "nf4") else list(summed)
    others = [range(1 if axis - w.ndim in grouped else size) for axis, size in enumerate(w.shape)]
    for place in itertools.product(*others):
        column: list[int | slice] = [slice(None) if axis - w.ndim in grouped else i for axis, i in enumerate(place)]
        values = w[tuple(column)]
        flat = values.reshape(-1)
        size = len(flat)
        limit = {"int4": 128, "nf4": 64}.get(format, size)
        group = max(n for n in range(1, limit + 1) if size % n == 0)
        parts = [_kept(flat[first : first + group], format) for first in range(0, size, group)]
        found[tuple(column)] = np.concatenate(parts).reshape(values.shape)
    return found


def _kept(values: np.ndarray, format: str) -> np.ndarray:
    largest = np.float32(max(abs(float(v)) for v in values))
    if largest == 0:
        return np.zeros_like(values)
    if format == "fp8":
        scale = largest / np.float32(448)
        return np.array([np.float32(ml_dtypes.float8_e4m3fn(min(max(v / scale, -448), 448))) * scale for v in values])
    if format == "nf4":
        scale = np.float32(ml_dtypes.bfloat16(largest))
        return np.array([min(NF4, key=lambda code: abs(code - v / scale)) * scale for v in values])
    low, high = (-127, 127) if format == "int8" else (-8, 7)
    scale = largest / np.float32((high - low) / 2)
    if format == "int4":
        scale = np.float32(ml_dtypes.bfloat16(scale))
    return np.array([min(max(np.round(v / scale), low), high) * scale for v in values], np.float32)
