"""Groups' SwiGLU networks for CPU: all products of a block of rows one after the other.

What lies between them stays in the processor's caches, a block's rows are cut out once, and the backward pass is saved
nothing but the two products before the activation. There is one loop each way, where products by themselves have nine
in all, each of which XLA compiles for every height of a block.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe.ops.bits import as_bits, from_bits
from moe.ops.grouped_matmul.blocks import belong, multiply, over_blocks, over_blocks_with_gradients, put, take
from moe.ops.grouped_matmul.in_stack import InStack
from moe.ops.matmul import is_transposed_first, transposed
from moe.ops.places import entry
from moe.ops.swiglu import swiglu


class Network(NamedTuple):
    """The matrices of one SwiGLU network a group."""

    gate_EDF: InStack
    up_EDF: InStack
    down_EFD: InStack

    def of_group(self, e: jax.Array, dtype: Any) -> list[jax.Array]:
        """w_gate_DF, w_up_DF and w_down_FD."""
        return [w.matrix(e, dtype) for w in self]

    @property
    def landings(self) -> list[jax.Array | None]:
        return [w.landing_LEDF for w in self]


class _Rows(NamedTuple):
    """What the backward pass is saved. gate_RF and up_RF: products before the activation."""

    x_RD: jax.Array
    gates_R: jax.Array | None
    gate_RF: jax.Array
    up_RF: jax.Array


@jax.custom_vjp
def blocked_swiglu(
    x_RD: jax.Array, network: Network, sizes_E: jax.Array, gates_R: jax.Array | None
) -> tuple[jax.Array, list[jax.Array | None]]:
    """See `moe.ops.grouped_matmul.grouped_swiglu`. Returns y_RD, and the stacks' landings for what comes after."""
    (y_RD,) = _through(x_RD, gates_R, network, sizes_E, keeps_products=False)
    return y_RD, network.landings


def _forward(*given: Any):
    """Of `CustomVJPPrimal`: each tells whether a gradient of it is asked for."""
    x_RD, network, sizes_E, gates_R = jax.tree.map(lambda primal: primal.value, given)
    made = _through(x_RD, gates_R, network, sizes_E, keeps_products=True)
    # Of a loop's results JAX's checkpoints keep none, whatever their policy says; of these operations they do.
    y_RD, gate_RF, up_RF = (checkpoint_name(x, "experts") for x in made)
    landings: list[Any] = given[1].landings
    trained = [() if landing is not None and landing.perturbed else None for landing in landings]
    kept = Network(*(w._replace(landing_LEDF=None) for w in network))
    return (y_RD, network.landings), (_Rows(x_RD, gates_R, gate_RF, up_RF), kept, sizes_E, trained)


def _backward(saved, gradients):
    (rows, network, sizes_E, trained), (dy_RD, landings) = saved, jax.tree.map(_filled, gradients)
    # One loop makes all gradients, of which XLA would drop none that nobody asked for.
    dw_LEDF = [None if w is None else dw for w, dw in zip(trained, landings, strict=True)]
    dx_RD, dgates_R, dw_LEDF = _back(rows, network, sizes_E, dy_RD, dw_LEDF)
    nothing: Any = None
    return dx_RD, Network(*(InStack(nothing, nothing, dw) for dw in dw_LEDF)), None, dgates_R


blocked_swiglu.defvjp(_forward, _backward, symbolic_zeros=True)


def _filled(gradient: Any) -> jax.Array:
    zero = isinstance(gradient, jax.custom_derivatives.SymbolicZero)
    return jnp.zeros(gradient.shape, gradient.dtype) if zero else gradient


def _with_rows(sizes_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """i32_E, the groups with rows before the others, and how many they are. JAX is not told the number of turns: of a
    loop that it knows to the end, a checkpoint keeps what is made within, the groups' matrices among it."""
    return jnp.argsort(sizes_E == 0, stable=True).astype(jnp.int32), (sizes_E > 0).sum(dtype=jnp.int32)


def _through(
    x_RD: jax.Array, gates_R: jax.Array | None, network: Network, sizes_E: jax.Array, *, keeps_products: bool
) -> list[jax.Array]:
    """y_RD; and with `keeps_products` gate_RF and up_RF."""
    ends_E = jnp.cumsum(sizes_E.astype(jnp.int32))
    order_E, num_groups = _with_rows(sizes_E)

    def group(i, made):
        e = entry(order_E, (i,))
        end, size = entry(ends_E, (e,)), entry(sizes_E, (e,))
        w_gate_DF, w_up_DF, w_down_FD = network.of_group(e, x_RD.dtype)

        def block(height, row, made):
            x_bD, first = take(x_RD, height, row)
            gate_bF, up_bF = (multiply(x_bD, w_DF, 1, 0, x_RD.dtype) for w_DF in (w_gate_DF, w_up_DF))
            hidden_bF = swiglu(gate_bF, up_bF, None if gates_R is None else take(gates_R, height, row)[0])
            y_bD = multiply(hidden_bF, w_down_FD, 1, 0, x_RD.dtype)
            mine_b = belong(first, height, row, end)
            return [put(all_, first, part, mine_b) for all_, part in zip(made, (y_bD, gate_bF, up_bF), strict=False)]

        return over_blocks(len(x_RD), end - size, size, block, made)

    _, D, F = network.gate_EDF.shape
    made = [as_bits(jnp.zeros((len(x_RD), width), x_RD.dtype)) for width in ((D, F, F) if keeps_products else (D,))]
    return [from_bits(x, x_RD.dtype) for x in jax.lax.fori_loop(0, num_groups, group, made)]


def _back(
    rows: _Rows, network: Network, sizes_E: jax.Array, dy_RD: jax.Array, dw_LEDF: list[jax.Array | None]
) -> tuple[jax.Array, jax.Array | None, list[jax.Array | None]]:
    """dx_RD, dgates_R, and dw_LEDF, zero in this layer, with that set; None where there is none."""
    num_rows, dtype = dy_RD.shape[0], dy_RD.dtype
    ends_E = jnp.cumsum(sizes_E.astype(jnp.int32))
    order_E, num_groups = _with_rows(sizes_E)

    def group(i, made):
        e = entry(order_E, (i,))
        w_DF = network.of_group(e, dtype)

        def block(height, row, end, made):
            dx_RD, dgates_R = made
            first = take(dy_RD, height, row)[1]
            mine_b = belong(first, height, row, end)
            dx_bD, dgates_b, factors = _block_back(rows, dy_RD, w_DF, height, row, mine_b)
            if dgates_b is not None:
                dgates_R = put(dgates_R[:, None], first, dgates_b[:, None], mine_b)[:, 0]
            return (put(dx_RD, first, dx_bD, mine_b), dgates_R), [_outer(*factors[n]) for n in trained]

        end, size = entry(ends_E, (e,)), entry(sizes_E, (e,))
        return over_blocks_with_gradients(num_rows, end, size, block, made, (network.gate_EDF.layer, e))

    trained = [n for n, dw in enumerate(dw_LEDF) if dw is not None]
    zeros = as_bits(jnp.zeros_like(dy_RD)), None if rows.gates_R is None else jnp.zeros_like(rows.gates_R)
    given = [dw for dw in dw_LEDF if dw is not None]
    (dx_RD, dgates_R), found = jax.lax.fori_loop(0, num_groups, group, (zeros, given))
    return from_bits(dx_RD, dtype), dgates_R, [None if dw is None else found.pop(0) for dw in dw_LEDF]


def _block_back(
    rows: _Rows, dy_RD: jax.Array, w_DF: list[jax.Array], height: int, row: jax.Array, mine_b: jax.Array
) -> tuple[jax.Array, jax.Array | None, list[tuple[jax.Array, jax.Array]]]:
    """Of one block's rows, those that are `mine_b`: dx_bD, dgates_b, and for each of its group's matrices what the
    gradient is `_outer` of."""

    def own(x: jax.Array) -> jax.Array:
        x_b, _ = take(x, height, row)
        return jnp.where(jnp.expand_dims(mine_b, tuple(range(1, x_b.ndim))), x_b, 0)

    w_gate_DF, w_up_DF, w_down_FD = w_DF
    (x_bD, gates_b, gate_bF, up_bF), dy_bD = jax.tree.map(own, rows), own(dy_RD)
    hidden_bF, pull = jax.vjp(swiglu, gate_bF, up_bF, gates_b)
    dgate_bF, dup_bF, dgates_b = pull(multiply(dy_bD, w_down_FD, 1, 1, dy_bD.dtype))
    dx_bD = multiply(dgate_bF, w_gate_DF, 1, 1, jnp.float32) + multiply(dup_bF, w_up_DF, 1, 1, jnp.float32)
    return dx_bD.astype(dy_RD.dtype), dgates_b, [(x_bD, dgate_bF), (x_bD, dup_bF), (hidden_bF, dy_bD)]


def _outer(x_bD: jax.Array, dy_bF: jax.Array) -> jax.Array:
    """f32[D, F]: the block's rows of x, transposed, times those of dy."""
    if is_transposed_first(x_bD.dtype):
        return multiply(transposed(x_bD), dy_bF, 1, 0, jnp.float32)
    return multiply(x_bD, dy_bF, 0, 0, jnp.float32)
