"""The grouped product in 8 bits, forward and backward."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from moe.ops.grouped_matmul.blocked import rows_product, weights_product
from moe.ops.scaled.quantize import ALL, EACH, Scaled, quantize
from moe.ops.scaled.recipe import Recipe

Backend = Literal["auto", "blocked"]


def scaled_grouped_matmul(
    x_RD: jax.Array,
    w_EDF: jax.Array,
    sizes_E: jax.Array,
    recipe: Recipe,
    history: jax.Array | None = None,
    *,
    backend: Backend = "auto",
) -> jax.Array:
    """`moe.ops.grouped_matmul.grouped_matmul` with operands in 8 bits; its gradients likewise, from dy in 8 bits.

    Sums are taken in float32, of int8 in int32. What is kept for the backward pass are the 8-bit operands.

    Args:
        x_RD, w_EDF, sizes_E: as there. A scale of w is one expert's; one of x and of dy may be several experts'.

    Returns:
        y_RF of x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    R, E = x_RD.shape[0], w_EDF.shape[0]
    if x_RD.shape[1] != w_EDF.shape[1] or sizes_E.shape != (E,):
        raise ValueError(f"x_RD {x_RD.shape}, w_EDF {w_EDF.shape} and sizes_E {sizes_E.shape} must agree in D and E")
    if x_RD.dtype != w_EDF.dtype:
        raise ValueError(f"x_RD is {x_RD.dtype} and w_EDF {w_EDF.dtype}: cast both to the compute format")
    if recipe.scaling in ("delayed", "block") or history is not None:
        raise NotImplementedError('scaling "delayed" and "block" are not there yet: take "tensor" or "row"')
    if R == 0:
        return jnp.zeros((0, w_EDF.shape[2]), x_RD.dtype)
    return _grouped(recipe, x_RD, w_EDF, sizes_E)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(recipe: Recipe, x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _forward(recipe, x_RD, w_EDF, sizes_E)[0]


def _forward(recipe: Recipe, x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array):
    x_RD = _owned(x_RD, sizes_E)
    dtype, along = recipe.forward_dtype, EACH if recipe.scaling == "row" else ALL
    x_y, w_y = quantize(x_RD, dtype, (along, ALL)), quantize(w_EDF, dtype, (EACH, ALL, along))
    saved = x_y, w_y
    if recipe.scaling == "row":
        saved = quantize(x_RD, dtype, (ALL, EACH)), quantize(w_EDF, dtype, (EACH, EACH, ALL))
    return _rows(x_y, w_y, sizes_E, 0).astype(x_RD.dtype), (*saved, sizes_E)


def _backward(recipe: Recipe, saved, dy_RF: jax.Array):
    x, w, sizes_E = saved
    dy_RF = _owned(dy_RF, sizes_E)
    dtype, along = recipe.gradient_dtype, EACH if recipe.scaling == "row" else ALL
    dy_x, dy_w = quantize(dy_RF, dtype, (along, ALL)), quantize(dy_RF, dtype, (ALL, along))
    dx_RD, dw_EDF = _rows(dy_x, w, sizes_E, 1), _weights(x, dy_w, sizes_E)
    return dx_RD.astype(dy_RF.dtype), dw_EDF.astype(dy_RF.dtype), None


_grouped.defvjp(_forward, _backward)


def _owned(x_RD: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Zeros in the padding, which may hold anything."""
    return jnp.where((jnp.arange(x_RD.shape[0]) < sizes_E.sum())[:, None], x_RD, 0)


def _plain(x: Scaled) -> tuple[jax.Array, jnp.dtype]:
    """The values as the loops for CPU multiply them, and the format in which these sum."""
    if x.values.dtype == jnp.int8:
        return x.values, jnp.dtype(jnp.int32)
    # Every fp8 number is one of bfloat16.
    return x.values.astype(jnp.bfloat16), jnp.dtype(jnp.float32)


def _rows(x: Scaled, w: Scaled, sizes_E: jax.Array, contract_w: int) -> jax.Array:
    (a, dtype), (b, _) = _plain(x), _plain(w)
    y_RF = rows_product(a, b, sizes_E, contract_w, dtype).astype(jnp.float32)
    E, R = sizes_E.shape[0], a.shape[0]
    group_R = jnp.minimum(jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(R), side="right"), E - 1)
    scales_EF = w.scales.squeeze(1 + contract_w)
    return _owned(y_RF * x.scales * scales_EF[group_R], sizes_E)


def _weights(x: Scaled, dy: Scaled, sizes_E: jax.Array) -> jax.Array:
    (a, dtype), (b, _) = _plain(x), _plain(dy)
    dw_EDF = weights_product(a, b, sizes_E, dtype).astype(jnp.float32)
    return dw_EDF * x.scales[0, :, None] * dy.scales[0, None, :]
