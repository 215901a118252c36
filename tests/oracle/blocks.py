"""The 8-bit formats of the wire, with loops over numbers: what each becomes on its way."""

import math

import numpy as np

FORMATS = {"float8_e4m3fn": (3, -6, 448.0), "float8_e5m2": (2, -14, 57344.0), "int8": (None, None, 127.0)}
"""Bits of mantissa, the smallest exponent of a normal number, the largest number (OCP 8-bit Floating Point)."""


def on_the_wire(x_D: np.ndarray, element: str, block: int = 32) -> np.ndarray:
    """One row, rounded: blocks of `block` share the smallest power of two with which their largest still fits."""
    mantissa, smallest, largest = FORMATS[element]
    y_D = np.zeros(len(x_D))
    for start in range(0, len(x_D), block):
        most = max(abs(float(x)) for x in x_D[start : start + block])
        if not most:
            continue
        factor = 2.0 ** math.ceil(math.log2(most / largest))
        for place in range(start, min(start + block, len(x_D))):
            scaled = float(x_D[place]) / factor
            step = 1.0
            if mantissa is not None and scaled:
                step = 2.0 ** (max(math.floor(math.log2(abs(scaled))), smallest) - mantissa)
            # Python rounds halves to even.
            y_D[place] = round(scaled / step) * step * factor
    return y_D
