"""Rows sorted by group, each group with its own matrix: one signature, several backends."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from moe.ops.grouped_matmul.blocked import blocked_matmul
from moe.ops.grouped_matmul.in_stack import InStack
from moe.ops.grouped_matmul.ragged import ragged_matmul
from moe.ops.grouped_matmul.triton import triton_matmul
from parallel.platform import platform

Backend = Literal["auto", "blocked", "ragged", "triton"]


def grouped_matmul(
    x_RD: jax.Array, w_EDF: jax.Array | InStack, sizes_E: jax.Array, *, backend: Backend = "auto"
) -> jax.Array:
    """y[r] = x[r] @ w[e], where group e owns the next sizes_E[e] rows; accumulated in float32.

    Rows after the last group's are padding: their output and gradient are zero, whatever they hold, and they add
    nothing to the gradient of w. A group without rows has exactly zero weight gradient.

    Args:
        x_RD: rows sorted by group.
        w_EDF: one matrix a group, of x's dtype; or where these stand, in any format, if the backend `reads_stacks`.
        sizes_E: i32, rows of each group; their sum is at most R.
        backend: "blocked" loops over blocks of rows, for CPU; "ragged" is jax.lax.ragged_dot, which XLA may
            lower to a product over all groups; "triton" is a Pallas kernel for NVIDIA GPUs; "auto" takes "triton"
            there and "blocked" elsewhere.

    Returns:
        y_RF of x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a backend that is unknown or not for this platform.
    """
    R, E = x_RD.shape[0], w_EDF.shape[0]
    if x_RD.shape[1] != w_EDF.shape[1] or sizes_E.shape != (E,):
        raise ValueError(f"x_RD {x_RD.shape}, w_EDF {w_EDF.shape} and sizes_E {sizes_E.shape} must agree in D and E")
    chosen = for_platform(backend)
    if isinstance(w_EDF, InStack):
        if not reads_stacks(backend):
            raise ValueError(f"the grouped product {chosen!r} reads no stacks: give it one layer's matrices")
    elif x_RD.dtype != w_EDF.dtype:
        raise ValueError(f"x_RD is {x_RD.dtype} and w_EDF {w_EDF.dtype}: cast both to the compute format")
    if R == 0:
        return jnp.zeros((0, w_EDF.shape[2]), x_RD.dtype)
    if chosen not in _BACKENDS:
        raise ValueError(f"execution.grouped_matmul={backend!r}: give 'auto' or one of {', '.join(_BACKENDS)}")
    return _BACKENDS[chosen](x_RD, w_EDF, sizes_E)


def reads_stacks(backend: Backend) -> bool:
    """Whether the product takes matrices where they stand among those of all layers, as `InStack`."""
    return for_platform(backend) == "blocked"


def for_platform(backend: str) -> str:
    """The backend that "auto" stands for here; any other as it is."""
    if backend != "auto":
        return backend
    return "triton" if platform() == "gpu" else "blocked"


_BACKENDS: dict[str, Callable[[jax.Array, Any, jax.Array], jax.Array]] = {
    "blocked": blocked_matmul,
    "ragged": ragged_matmul,
    "triton": triton_matmul,
}
