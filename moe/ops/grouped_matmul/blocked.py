"""The grouped product for CPU: a loop over groups, and in it one over blocks of the group's own rows.

Trip counts follow `sizes_E`, so the work is that of the rows that exist, whatever R and E are. Fewer rows than groups,
as when a few texts are continued by a token each, take their matrices one by one instead: a loop over groups would move
all of them.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

BLOCK = 128


@jax.custom_vjp
def blocked_matmul(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """See `moe.ops.grouped_matmul.grouped_matmul`."""
    return rows_product(x_RD, w_EDF, sizes_E, 0, x_RD.dtype)


def _forward(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array):
    return blocked_matmul(x_RD, w_EDF, sizes_E), (x_RD, w_EDF, sizes_E)


def _backward(saved, dy_RF: jax.Array):
    x_RD, w_EDF, sizes_E = saved
    dx_RD = rows_product(dy_RF, w_EDF, sizes_E, 1, dy_RF.dtype)
    return dx_RD, weights_product(x_RD, dy_RF, sizes_E, jnp.float32).astype(w_EDF.dtype), None


blocked_matmul.defvjp(_forward, _backward)


def _blocks(size: jax.Array, block: int) -> jax.Array:
    return (size + block - 1) // block


def _take(x_RD: jax.Array, row: jax.Array, end: jax.Array, block: int):
    """The block that begins at `row`, or the last whole one; its first row, and which of its rows are in [row, end)."""
    first = jnp.minimum(row, x_RD.shape[0] - block)
    rows = first + jnp.arange(block, dtype=jnp.int32)
    mine_R1 = ((rows >= row) & (rows < end))[:, None]
    return jax.lax.dynamic_slice_in_dim(x_RD, first, block), first, mine_R1


def rows_product(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, contract_w: int, dtype: DTypeLike) -> jax.Array:
    """Each row times its group's matrix, or with contract_w=1 the matrix's transpose, summed in `dtype`."""
    if x_RD.shape[0] < w_EDF.shape[0]:
        return _few_rows_product(x_RD, w_EDF, sizes_E, contract_w, dtype)
    block = min(BLOCK, x_RD.shape[0])
    ends_E = jnp.cumsum(sizes_E.astype(jnp.int32))

    def group(e, y_RF):
        w_DF, end = w_EDF[e], ends_E[e]
        start = end - sizes_E[e]

        def rows(i, y_RF):
            x_bD, first, mine = _take(x_RD, start + i * block, end, block)
            dims = (((1,), (contract_w,)), ((), ()))
            y_bF = jax.lax.dot_general(x_bD, w_DF, dims, preferred_element_type=dtype)
            before_bF = jax.lax.dynamic_slice_in_dim(y_RF, first, block)
            return jax.lax.dynamic_update_slice_in_dim(y_RF, jnp.where(mine, y_bF, before_bF), first, 0)

        return jax.lax.fori_loop(0, _blocks(sizes_E[e], block), rows, y_RF)

    y_RF = jnp.zeros((x_RD.shape[0], w_EDF.shape[2 - contract_w]), dtype)
    return jax.lax.fori_loop(0, w_EDF.shape[0], group, y_RF)


def _few_rows_product(
    x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, contract_w: int, dtype: DTypeLike
) -> jax.Array:
    group_R = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(x_RD.shape[0]), side="right")
    owned_R1 = (group_R < w_EDF.shape[0])[:, None]
    dims = (((1,), (1 + contract_w,)), ((0,), (0,)))
    w_RDF = w_EDF[jnp.minimum(group_R, w_EDF.shape[0] - 1)]
    return jnp.where(owned_R1, jax.lax.dot_general(x_RD, w_RDF, dims, preferred_element_type=dtype), 0)


def weights_product(x_RD: jax.Array, dy_RF: jax.Array, sizes_E: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`dtype` [E, D, F]: the product of each group's rows of x, transposed, and of dy."""
    block = min(BLOCK, x_RD.shape[0])
    ends_E = jnp.cumsum(sizes_E.astype(jnp.int32))

    def group(_, e):
        end = ends_E[e]
        start = end - sizes_E[e]

        def rows(i, dw_DF):
            x_bD, _, mine = _take(x_RD, start + i * block, end, block)
            dy_bF, _, _ = _take(dy_RF, start + i * block, end, block)
            x_bD, dy_bF = jnp.where(mine, x_bD, 0), jnp.where(mine, dy_bF, 0)
            dims = (((0,), (0,)), ((), ()))
            return dw_DF + jax.lax.dot_general(x_bD, dy_bF, dims, preferred_element_type=dtype)

        zeros_DF = jnp.zeros((x_RD.shape[1], dy_RF.shape[1]), dtype)
        return None, jax.lax.fori_loop(0, _blocks(sizes_E[e], block), rows, zeros_DF)

    return jax.lax.scan(group, None, jnp.arange(sizes_E.shape[0]))[1]
