"""Products with weights that are quantized already, forward only: rows are quantized as they come (LLM.int8, arXiv
2208.07339 §2.1: a scale for each row of activations and each column of weights, which can be taken out of the sum)."""

import jax

from moe.ops.quantize import QuantizedWeight
from moe.ops.scaled.einsum import product
from moe.ops.scaled.grouped import BLOCKED, owned, triton_products
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
    return product(spec, quantize(x, w.values.dtype, shared), Scaled(w.values, w.scales), x.dtype)


def frozen_grouped_matmul(x_RD: jax.Array, w_EDF: QuantizedWeight, sizes_E: jax.Array) -> jax.Array:
    """`moe.ops.grouped_matmul.grouped_matmul` likewise, by Triton on GPUs and in blocks elsewhere."""
    products = triton_products(interpret=False) if platform() == "gpu" else BLOCKED
    # What is not finite would be no number times zero.
    x = quantize(owned(x_RD, sizes_E), w_EDF.values.dtype, (EACH, ALL))
    return owned(products.rows(x, Scaled(w_EDF.values, w_EDF.scales), sizes_E, 0, x_RD.dtype), sizes_E)
