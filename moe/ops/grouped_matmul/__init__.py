"""Rows sorted by group, each group with its own matrix: one signature, several backends."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from moe.ops.grouped_matmul.blocked import blocked_matmul, blocked_matmul_in_stack
from moe.ops.grouped_matmul.blocked_swiglu import Network, blocked_swiglu
from moe.ops.grouped_matmul.in_stack import InStack, alone
from moe.ops.grouped_matmul.ragged import ragged_matmul
from moe.ops.grouped_matmul.triton import triton_matmul
from parallel.platform import platform

Backend = Literal["auto", "blocked", "ragged", "triton"]


def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, *, backend: Backend = "auto") -> jax.Array:
    """y[r] = x[r] @ w[e], where group e owns the next sizes_E[e] rows; accumulated in float32.

    Rows after the last group's are padding: their output and gradient are zero, whatever they hold, and they add
    nothing to the gradient of w. A group without rows has exactly zero weight gradient.

    Args:
        x_RD: rows sorted by group.
        w_EDF: one matrix a group, of x's dtype.
        sizes_E: i32, rows of each group; their sum is at most R.
        backend: "blocked" loops over blocks of rows, for CPU; "ragged" is jax.lax.ragged_dot, which XLA may
            lower to a product over all groups; "triton" is a Pallas kernel for NVIDIA GPUs; "auto" takes "triton"
            there and "blocked" elsewhere.

    Returns:
        y_RF of x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a backend that is unknown or not for this platform.
    """
    _check_shapes(x_RD, w_EDF, sizes_E)
    if x_RD.dtype != w_EDF.dtype:
        raise ValueError(f"x_RD is {x_RD.dtype} and w_EDF {w_EDF.dtype}: cast both to the compute format")
    if not x_RD.shape[0]:
        return jnp.zeros((0, w_EDF.shape[2]), x_RD.dtype)
    chosen = for_platform(backend)
    if chosen not in _BACKENDS:
        raise ValueError(f"execution.grouped_matmul={backend!r}: give 'auto' or one of {', '.join(_BACKENDS)}")
    return _BACKENDS[chosen](x_RD, w_EDF, sizes_E)


def grouped_matmul_in_stack(
    x_RD: jax.Array, w_EDF: InStack, sizes_E: jax.Array, *, backend: Backend = "auto"
) -> tuple[jax.Array, InStack]:
    """`grouped_matmul` with matrices where they stand, for backends that `goes_by_blocks`.

    Returns:
        y_RF of x's dtype, and the stack for what reads it after this. A layer's matrices are multiplied once.

    Raises:
        ValueError: shapes that do not fit, or a backend that reads no stacks.
    """
    _check_shapes(x_RD, w_EDF, sizes_E)
    if not goes_by_blocks(backend):
        raise ValueError(f"the grouped product {for_platform(backend)!r} reads no stacks: use `grouped_matmul`")
    if not x_RD.shape[0]:
        return jnp.zeros((0, w_EDF.shape[2]), x_RD.dtype), w_EDF
    y_RF, landing_LEDF = blocked_matmul_in_stack(x_RD, w_EDF, sizes_E)
    return y_RF, w_EDF._replace(landing_LEDF=landing_LEDF)


def grouped_swiglu(
    x_RD: jax.Array,
    matrices: Sequence[jax.Array | InStack],
    sizes_E: jax.Array,
    gates_R: jax.Array | None = None,
    *,
    backend: Backend = "auto",
) -> tuple[jax.Array, list[InStack]]:
    """The groups' SwiGLU networks: two grouped products, `swiglu` of them, and a third product.

    For backends that `goes_by_blocks`; all is done in one loop.

    Args:
        x_RD: rows sorted by group.
        matrices: w_gate_EDF, w_up_EDF and w_down_EFD, of x's dtype, or in their stacks.
        gates_R: f32, by which each row's activation is multiplied; None for 1.

    Returns:
        y_RD of x's dtype, and the stacks for what reads them after this, for matrices that are in one.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a backend that does each product by itself.
    """
    if not goes_by_blocks(backend):
        raise ValueError(f"the grouped product {for_platform(backend)!r} is one by itself: use `grouped_matmul` thrice")
    for w in matrices:
        if not isinstance(w, InStack) and w.dtype != x_RD.dtype:
            raise ValueError(f"x_RD is {x_RD.dtype} and the matrices {w.dtype}: cast both to the compute format")
    network = Network(*(w if isinstance(w, InStack) else alone(w) for w in matrices))
    E, D, F = network.gate_EDF.shape
    shapes = [w.shape for w in network]
    if x_RD.shape[1] != D or sizes_E.shape != (E,) or shapes != [(E, D, F), (E, D, F), (E, F, D)]:
        raise ValueError(f"x_RD {x_RD.shape}, matrices {shapes} and sizes_E {sizes_E.shape} must agree in D, E and F")
    if not x_RD.shape[0]:
        return x_RD, list(network)
    y_RD, landings = blocked_swiglu(x_RD, network, sizes_E, gates_R)
    return y_RD, [w._replace(landing_LEDF=landing) for w, landing in zip(network, landings, strict=True)]


def _check_shapes(x_RD: jax.Array, w_EDF: jax.Array | InStack, sizes_E: jax.Array) -> None:
    if x_RD.shape[1] != w_EDF.shape[1] or sizes_E.shape != w_EDF.shape[:1]:
        raise ValueError(f"x_RD {x_RD.shape}, w_EDF {w_EDF.shape} and sizes_E {sizes_E.shape} must agree in D and E")


def goes_by_blocks(backend: Backend) -> bool:
    """Whether the product loops over blocks of rows. It then takes matrices where they stand among those of all layers,
    as `InStack`, and can make all products of a SwiGLU network in one loop."""
    return for_platform(backend) == "blocked"


def for_platform(backend: str) -> str:
    """The backend that "auto" stands for here; any other as it is."""
    if backend != "auto":
        return backend
    return "triton" if platform() == "gpu" else "blocked"


_BACKENDS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "blocked": blocked_matmul,
    "ragged": ragged_matmul,
    "triton": triton_matmul,
}
