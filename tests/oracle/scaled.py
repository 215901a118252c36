"""Products in 8 bits, told anew in numpy: a table of numbers, a key for each value's scale, float64 sums."""

import math
import struct
from itertools import product

import numpy as np


def fp8_numbers(exponent_bits: int, mantissa_bits: int, largest: float) -> np.ndarray:
    """All finite numbers from 0 on, in the order of their codes (arXiv 2209.05433, table 1)."""
    bias = 2 ** (exponent_bits - 1) - 1
    numbers = []
    for exponent, mantissa in product(range(2**exponent_bits), range(2**mantissa_bits)):
        fraction = mantissa / 2**mantissa_bits
        numbers.append(fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias))
    return np.array([number for number in numbers if number <= largest])


NUMBERS = {
    "e4m3": fp8_numbers(4, 3, 448),
    "e5m2": fp8_numbers(5, 2, 57344),
    "int8": np.arange(128.0),
}


def nearest(x: np.ndarray, format: str) -> np.ndarray:
    """The format's nearest number, ties to the even code, at most its largest."""
    numbers, size = NUMBERS[format], np.abs(x)
    above = np.minimum(np.searchsorted(numbers, size), len(numbers) - 1)
    below = np.maximum(above - 1, 0)
    up, down = numbers[above] - size, size - numbers[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)) | (up < 0), above, below)
    return np.sign(x) * numbers[code]


def scale(largest: float, format: str) -> float:
    if largest == 0:
        return 1.0
    if format == "int8":
        return float(np.float32(largest) * np.float32(1 / 127))
    fraction, exponent = math.frexp(largest / NUMBERS[format][-1])
    return 2.0 ** (exponent - (fraction == 0.5))


def chance(value: float) -> float:
    """From 0 to below 1: 16 bits of MurmurHash3's finalizer of a float32's bits."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * factor % 2**32
    return (bits >> 16) / 2**16


def below_or_above(x: np.ndarray, divided: np.ndarray) -> np.ndarray:
    """int8's number below or above: above as often as it is near."""
    chances = np.reshape([chance(value) for value in x.flat], x.shape)
    return np.clip(np.floor((divided + chances).astype(np.float32)), -127, 127)


def rounded(x: np.ndarray, format: str, keys: np.ndarray | int, gradient: bool = False) -> np.ndarray:
    """x as the format with scales holds it; values of equal keys share a scale."""
    _, group = np.unique(np.broadcast_to(keys, x.shape), return_inverse=True)
    group = group.reshape(x.shape)
    largest = np.zeros(group.max() + 1)
    np.maximum.at(largest, group, np.abs(x))
    scales = np.array([scale(value, format) for value in largest])[group]
    divided = (x.astype(np.float32) * (np.float32(1) / scales.astype(np.float32))).astype(np.float64)
    if gradient and format == "int8":
        return below_or_above(x, divided) * scales
    return nearest(divided, format) * scales


def keys(shape: tuple[int, ...], own: str, out: str, scaling: str, weight: bool) -> np.ndarray | int:
    """A number for each value, the same where a scale is shared: of an operand with axes `own` in a product to axes
    `out`."""
    if scaling == "tensor":
        return 0
    summed = [letter for letter in own if letter not in out]
    kept = [letter for letter in own if letter in out]
    key = np.zeros(shape, np.int64)
    for letter, place, size in zip(own, np.indices(shape), shape, strict=True):
        if scaling == "row":
            place = 0 if letter in summed else place
        elif letter == summed[-1] or (weight and letter == kept[-1]):
            place = place // 128
        key = key * size + place
    return key


def einsum(spec: str, x, w, dy, format: str, scaling: str):
    """y, dx, dw."""
    operands, out = spec.split("->")
    a, b = operands.split(",")
    forward, backward = ("int8", "int8") if format == "int8" else ("e4m3", "e5m2")

    def hold(value, own, to, format, weight=False, gradient=False):
        return rounded(value, format, keys(value.shape, own, to, scaling, weight), gradient)

    y = np.einsum(spec, hold(x, a, out, forward), hold(w, b, out, forward, True))
    dx = np.einsum(f"{out},{b}->{a}", hold(dy, out, a, backward, gradient=True), hold(w, b, a, forward, True))
    dw = np.einsum(f"{a},{out}->{b}", hold(x, a, b, forward), hold(dy, out, b, backward, gradient=True))
    return y, dx, dw


def grouped(x_RD, w_EDF, sizes_E, dy_RF, format: str, scaling: str):
    """y, dx, dw; a scale of w is one expert's, and rows are scaled as if there were one."""
    forward, backward = ("int8", "int8") if format == "int8" else ("e4m3", "e5m2")
    rows = sum(sizes_E)
    x_RD, dy_RF = (np.where(np.arange(len(v))[:, None] < rows, v, 0) for v in (x_RD, dy_RF))

    def hold(value, own, to, format, weight=False, gradient=False):
        return rounded(value, format, keys(value.shape, own, to, scaling, weight), gradient)

    x_y, x_dw = hold(x_RD, "RD", "RF", forward), hold(x_RD, "RD", "DF", forward)
    dy_dx, dy_dw = (hold(dy_RF, "RF", to, backward, gradient=True) for to in ("RD", "DF"))
    y_RF, dx_RD, dw_EDF = np.zeros(dy_RF.shape), np.zeros(x_RD.shape), np.zeros(w_EDF.shape)
    row = 0
    for expert, size in enumerate(sizes_E):
        w_y, w_dx = hold(w_EDF[expert], "DF", "RF", forward, True), hold(w_EDF[expert], "DF", "RD", forward, True)
        for _ in range(size):
            y_RF[row], dx_RD[row] = x_y[row] @ w_y, w_dx @ dy_dx[row]
            dw_EDF[expert] += np.outer(x_dw[row], dy_dw[row])
            row += 1
    return y_RF, dx_RD, dw_EDF
