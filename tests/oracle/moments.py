"""Numpy loops: moments in eight bits, and Adam upon them."""

import ml_dtypes
import numpy as np


def dynamic_map(signed: bool) -> list[float]:
    """Decade by decade: 10^-6 … 10^0 times the middles of equal parts of 0.1 … 1."""
    numbers = [0.0, 1.0]
    for decade in range(-6, 1):
        parts = 2 ** (decade + 6) * (1 if signed else 2)
        for part in range(parts):
            middle = 10.0**decade * (0.1 + 0.9 * (part + 0.5) / parts)
            numbers += [middle, -middle] if signed else [middle]
    return sorted(numbers)


def in_eight_bits(x: np.ndarray, format: str, signed: bool) -> np.ndarray:
    """One block's values as they come back from eight bits; f64."""
    kept = x if signed else np.sqrt(x)
    largest = float(np.abs(kept).max())
    if largest == 0:
        return np.zeros_like(x)
    found = []
    for value in kept.ravel():
        share = float(value) / largest
        if format == "int8":
            numbers = dynamic_map(signed)
            if not signed and value > 0:
                numbers = numbers[1:]
            nearest = min(numbers, key=lambda number, share=share: abs(number - share))
        else:
            nearest = float(np.float32(share * 448).astype(ml_dtypes.float8_e4m3fn)) / 448
            if not signed and value > 0 and nearest == 0:
                nearest = 2.0**-9 / 448
        found.append(nearest * largest)
    back = np.reshape(found, x.shape)
    return back if signed else back**2


def adam(gradients: list[np.ndarray], format: str, b1: float, b2: float, eps: float) -> list[np.ndarray]:
    """Directions of Adam for one block of values, step by step."""
    m, v, directions = np.zeros_like(gradients[0]), np.zeros_like(gradients[0]), []
    for step, g in enumerate(gradients, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        directions.append(m / (1 - b1**step) / (np.sqrt(v / (1 - b2**step)) + eps))
        m, v = in_eight_bits(m, format, True), in_eight_bits(v, format, False)
    return directions
