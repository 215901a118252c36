"""The grouped product in 8 bits, forward and backward."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe.ops.grouped_matmul import for_platform
from moe.ops.grouped_matmul.blocked import rows_product, weights_product
from moe.ops.grouped_matmul.triton import HIGHEST, height
from moe.ops.scaled.history import DY, W, X, next_history, quantize_delayed
from moe.ops.scaled.quantize import BLOCK, EACH, Scaled, multiplied, quantize, spread, sum_dtype, widened
from moe.ops.scaled.recipe import Recipe, Split
from moe.ops.scaled.triton import rows_kernel, weights_kernel
from parallel.platform import platform
from parallel.rows import bucket_of_place

Backend = Literal["auto", "blocked", "triton"]


def scaled_grouped_matmul(
    x_RD: jax.Array,
    w_EDF: jax.Array,
    sizes_E: jax.Array,
    recipe: Recipe,
    history: jax.Array | None = None,
    *,
    backend: Backend = "auto",
    split: Split = (),
) -> jax.Array:
    """`moe.ops.grouped_matmul.grouped_matmul` with operands in 8 bits; its gradients likewise, from dy in 8 bits.

    Sums are taken in float32, of int8 in int32. What is kept for the backward pass are the 8-bit operands. Rows after
    the last group's are padding, whatever they hold.

    Args:
        x_RD, w_EDF, sizes_E: as there. A scale of w is one expert's, but with "delayed"; one of x and dy may hold for
            rows of several.
        history: with "delayed" only, f32 [3, HISTORY_LENGTH]; its cotangent is the next one (`moe.ops.scaled.history`).
        backend: "blocked" for CPU, with float32 sums of exactly the 8-bit values; "triton" for NVIDIA GPUs; "auto"
            takes "triton" there and "blocked" elsewhere.
        split: inside `jax.shard_map`, the mesh axes that split R, D and F; scales are then those of the whole arrays.

    Returns:
        y_RF of x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, a history that is missing or not needed, or a backend that is
            unknown or not for this platform.
    """
    R, E = x_RD.shape[0], w_EDF.shape[0]
    if x_RD.shape[1] != w_EDF.shape[1] or sizes_E.shape != (E,):
        raise ValueError(f"x_RD {x_RD.shape}, w_EDF {w_EDF.shape} and sizes_E {sizes_E.shape} must agree in D and E")
    if x_RD.dtype != w_EDF.dtype:
        raise ValueError(f"x_RD is {x_RD.dtype} and w_EDF {w_EDF.dtype}: cast both to the compute format")
    recipe.check_history(history)
    if R == 0:
        return jnp.zeros((0, w_EDF.shape[2]), x_RD.dtype)
    chosen = for_platform(backend)
    if chosen not in ("blocked", "triton"):
        raise ValueError(f"execution.grouped_matmul={backend!r}: in 8 bits give 'auto', 'blocked' or 'triton'")
    if chosen == "triton" and platform() != "gpu":
        raise ValueError(f'backend "triton" needs an NVIDIA GPU, this is {platform()}: use "blocked" or "auto"')
    products = BLOCKED if chosen == "blocked" else triton_products(interpret=False)
    return grouped(recipe, products, split, x_RD, w_EDF, sizes_E, history)


class Products(NamedTuple):
    """A backend.

    rows: (x_RD, w_EDF, sizes_E, contract_w, dtype) → [R, F], each row times its expert's matrix, or with contract_w=1
        the matrix's transpose; the padding's rows may hold anything.
    weights: (x_RD, dy_RF, sizes_E, dtype) → [E, D, F], of each expert's rows of x, transposed, and of dy.
    """

    rows: Callable[[Scaled, Scaled, jax.Array, int, DTypeLike], jax.Array]
    weights: Callable[[Scaled, Scaled, jax.Array, DTypeLike], jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def grouped(
    recipe: Recipe,
    products: Products,
    split: Split,
    x_RD: jax.Array,
    w_EDF: jax.Array,
    sizes_E: jax.Array,
    history: jax.Array | None,
) -> jax.Array:
    """The product by a given backend, unguarded: compiled for a GPU where there is none, or interpreted in a test."""
    return _forward(recipe, products, split, x_RD, w_EDF, sizes_E, history)[0]


def _forward(recipe: Recipe, products: Products, split: Split, x_RD, w_EDF, sizes_E, history):
    x_RD, dtype = owned(x_RD, sizes_E), recipe.forward_dtype
    if history is not None:
        x, x_largest = quantize_delayed(x_RD, dtype, history, X)
        w, w_largest = quantize_delayed(w_EDF, dtype, history, W)
        saved, past = (x, w), (history, x_largest, w_largest)
    else:
        # An expert's scales are its own. The backward products sum over other axes, along which others share a scale.
        x, x_dw = (
            quantize(x_RD, dtype, recipe.shared("RD", out), recipe.over("RD", out, split)) for out in ("RF", "DF")
        )
        w, w_dx = (
            quantize(w_EDF, dtype, (EACH, *recipe.shared("DF", out, weight=True)), recipe.over("DF", out, split))
            for out in ("RF", "RD")
        )
        saved, past = (x_dw, w_dx), None
    y_RF = owned(products.rows(x, w, sizes_E, 0, x_RD.dtype), sizes_E)
    return y_RF, (*saved, sizes_E, past)


def _backward(recipe: Recipe, products: Products, split: Split, saved, dy_RF: jax.Array):
    x, w, sizes_E, past = saved
    dy_RF, dtype = owned(dy_RF, sizes_E), recipe.gradient_dtype
    history = None
    if past is not None:
        history, x_largest, w_largest = past
        dy, dy_largest = quantize_delayed(dy_RF, dtype, history, DY)
        dy_dx = dy_dw = dy
        history = next_history(history, (x_largest, w_largest, dy_largest))
    else:
        dy_dx, dy_dw = (
            quantize(dy_RF, dtype, recipe.shared("RF", out), recipe.over("RF", out, split), gradient=True)
            for out in ("RD", "DF")
        )
    dx_RD = owned(products.rows(dy_dx, w, sizes_E, 1, dy_RF.dtype), sizes_E)
    return dx_RD, products.weights(x, dy_dw, sizes_E, dy_RF.dtype), None, history


grouped.defvjp(_forward, _backward)


def owned(x_RD: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Zeros in the padding, which may hold anything."""
    return jnp.where((jnp.arange(x_RD.shape[0]) < sizes_E.sum())[:, None], x_RD, 0)


def _blocked_rows(x: Scaled, w: Scaled, sizes_E: jax.Array, contract_w: int, dtype: DTypeLike) -> jax.Array:
    if x.scales.shape[1] > 1 or w.scales.shape[1 + contract_w] > 1:
        return rows_product(widened(x), widened(w), sizes_E, contract_w, jnp.float32).astype(dtype)
    y_RF = rows_product(multiplied(x), multiplied(w), sizes_E, contract_w, sum_dtype(x)).astype(jnp.float32)
    R, F = y_RF.shape
    scales_EF = spread(w.scales.squeeze(1 + contract_w), (w.scales.shape[0], F))
    group_R = bucket_of_place(jnp.cumsum(sizes_E), jnp.arange(R))
    scales_RF = scales_EF[group_R] if scales_EF.shape[0] > 1 else scales_EF
    return (y_RF * x.scales * scales_RF).astype(dtype)


def _blocked_weights(x: Scaled, dy: Scaled, sizes_E: jax.Array, dtype: DTypeLike) -> jax.Array:
    if x.scales.shape[0] > 1:
        return weights_product(widened(x), widened(dy), sizes_E, jnp.float32).astype(dtype)
    dw_EDF = weights_product(multiplied(x), multiplied(dy), sizes_E, sum_dtype(x)).astype(jnp.float32)
    return (dw_EDF * x.scales[0, :, None] * dy.scales[0, None, :]).astype(dtype)


BLOCKED = Products(_blocked_rows, _blocked_weights)


def triton_products(*, interpret: bool) -> Products:
    """The kernels, with their scales laid out as they read them."""

    def rows(x: Scaled, w: Scaled, sizes_E: jax.Array, contract_w: int, dtype: DTypeLike) -> jax.Array:
        scales_EDF = jnp.swapaxes(w.scales, 1, 2) if contract_w else w.scales
        (R, D), E, F = x.values.shape, sizes_E.shape[0], w.values.shape[2 - contract_w]
        parts = max(x.scales.shape[1], scales_EDF.shape[1])
        values = w.values
        if not contract_w and height(R, E) == HIGHEST:
            # A copy in the layout that tensor cores want. For few rows, as in decoding, it costs more than it saves.
            values, contract_w = jnp.swapaxes(values, 1, 2), 1
        if parts > 1 and D % BLOCK:
            raise ValueError(f'scaling "block" on a GPU needs widths that divide by {BLOCK}, not {D}: take "row"')
        scales_RS = jnp.broadcast_to(x.scales, (R, parts))
        scales_ESF = jnp.broadcast_to(spread(scales_EDF, (*scales_EDF.shape[:2], F)), (E, parts, F))
        return rows_kernel(x.values, scales_RS, values, scales_ESF, sizes_E, contract_w, dtype, interpret)

    def weights(x: Scaled, dy: Scaled, sizes_E: jax.Array, dtype: DTypeLike) -> jax.Array:
        parts, D, F = x.scales.shape[0], x.values.shape[1], dy.values.shape[1]
        scales_SD, scales_SF = jnp.broadcast_to(x.scales, (parts, D)), jnp.broadcast_to(dy.scales, (parts, F))
        return weights_kernel(x.values.T, scales_SD, dy.values.T, scales_SF, sizes_E, dtype, interpret)

    return Products(rows, weights)
