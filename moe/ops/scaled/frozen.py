"""Products with weights that are quantized already, forward only: rows are quantized as they come (LLM.int8, arXiv
2208.07339 §2.1: a scale for each row of activations and each column of weights, which can be taken out of the sum)."""

import jax
import jax.numpy as jnp

from moe.ops.quantize import EIGHT_BITS, QuantizedWeight
from moe.ops.scaled.einsum import product
from moe.ops.scaled.grouped import BLOCKED, triton_products
from moe.ops.scaled.quantize import ALL, EACH, Scaled, quantize
from parallel.platform import platform


def frozen_einsum(spec: str, x: jax.Array, w: QuantizedWeight) -> jax.Array:
    """jnp.einsum(spec, x, w) in w's format, "int8" or "fp8", each row of x with a scale of its own.

    Sums are taken in int32 or float32.

    Returns:
        of x's dtype.
    """
    own, out = spec.replace(" ", "").split("->")[0].split(",")[0], spec.split("->")[1]
    shared = tuple(EACH if axis in out else ALL for axis in own)
    return product(spec, quantize(x, _dtype(w), shared), Scaled(w.values, w.scales), x.dtype)


def frozen_grouped_matmul(x_RD: jax.Array, w_EDF: QuantizedWeight, sizes_E: jax.Array) -> jax.Array:
    """`moe.ops.grouped_matmul.grouped_matmul` likewise, by Triton on GPUs and in blocks elsewhere."""
    owned_R1 = (jnp.arange(x_RD.shape[0]) < sizes_E.sum())[:, None]
    products = triton_products(interpret=False) if platform() == "gpu" else BLOCKED
    # Padding may hold anything, and what is not finite would be no number times zero.
    x = quantize(jnp.where(owned_R1, x_RD, 0), _dtype(w_EDF), (EACH, ALL))
    y_RF = products.rows(x, Scaled(w_EDF.values, w_EDF.scales), sizes_E, 0, x_RD.dtype)
    return jnp.where(owned_R1, y_RF, 0)


def _dtype(w: QuantizedWeight) -> jnp.dtype:
    return EIGHT_BITS["int8" if w.format == "int8" else "fp8"].dtype
