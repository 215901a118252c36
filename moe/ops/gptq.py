"""GPTQ (arXiv 2210.17323): 4-bit weights that are rounded one input after the other, each one's error made up for by
those that are not rounded yet.

What a layer's output loses is tr(ΔᵀHΔ), of the difference Δ between the weights and H = Σ x xᵀ over its inputs x. With
H⁻¹ = UᵀU, U upper triangular, the rounding error e of input i is best spread over the inputs behind it by -e·U_i,>i /
U_ii (§3, algorithm 1 and step 3). Here I are a matrix's inputs, O its outputs, G the inputs of a group.
"""

from functools import partial

import jax
import jax.numpy as jnp

from moe.ops.quantize import GROUPS, QuantizedWeight, group_scales, group_size, int4_codes, packed

DAMPING = 0.01
"""Share of H's mean diagonal that is added to it (§3, step 3: "Cholesky reformulation")."""


@partial(jax.jit, static_argnums=(2, 3))
def gptq_int4(
    w: jax.Array, hessian_II: jax.Array, summed: tuple[int, ...], damping: float = DAMPING
) -> QuantizedWeight:
    """`moe.ops.quantize.quantize(w, "int4", summed)`, with roundings that make up for one another.

    A group's scale is found when its turn comes, of weights that have taken over the errors before it. An input that
    was never seen, with zeros in H, is rounded to the nearest and takes over nothing.

    Args:
        w: a matrix whose axes that are summed over come first.
        hessian_II: f32, Σ x xᵀ over inputs x in the order of those axes.
        summed: those axes, counted from the end, as `quantize` takes them.

    Returns:
        not finite scales where H with its damping is no positive definite matrix.
    """
    axis, inputs = summed[-1], hessian_II.shape[0]
    group = group_size(w.shape[axis], GROUPS["int4"])
    w_IO = w.astype(jnp.float32).reshape(inputs, -1)
    diagonal_I = jnp.diagonal(hessian_II)
    mean = diagonal_I.mean()
    unseen_I = diagonal_I == 0
    damped_II = hessian_II + jnp.diag(damping * mean + jnp.where(unseen_I, mean, 0))
    factor_II = jnp.linalg.cholesky(damped_II)
    root_II = jax.scipy.linalg.solve_triangular(factor_II, jnp.eye(inputs), lower=True)
    u_II = jnp.linalg.cholesky(root_II.T @ root_II).T

    def one_group(w_IO: jax.Array, start: jax.Array):
        u_GI = jax.lax.dynamic_slice_in_dim(u_II, start, group)
        u_GG = jax.lax.dynamic_slice_in_dim(u_GI, start, group, axis=1)
        w_GO = jax.lax.dynamic_slice_in_dim(w_IO, start, group)
        scale_O = group_scales(jnp.abs(w_GO).max(0), "int4")
        wide_O = scale_O.astype(jnp.float32)

        def one_input(w_GO: jax.Array, i: jax.Array):
            codes_O = int4_codes(w_GO[i] / wide_O)
            error_O = (w_GO[i] - (codes_O.astype(jnp.float32) - 8) * wide_O) / u_GG[i, i]
            later_G = jnp.where(jnp.arange(group) > i, u_GG[i], 0)
            return w_GO - later_G[:, None] * error_O, (codes_O, error_O)

        _, (codes_GO, errors_GO) = jax.lax.scan(one_input, w_GO, jnp.arange(group))
        later_GI = jnp.where(jnp.arange(inputs) >= start + group, u_GI, 0)
        return w_IO - later_GI.T @ errors_GO, (codes_GO, scale_O)

    _, (codes, scales) = jax.lax.scan(one_group, w_IO, jnp.arange(0, inputs, group))
    scales = jnp.where(jnp.isfinite(u_II).all(), scales, jnp.nan)
    shape = list(w.shape)
    shape[axis] //= group
    return packed(codes.reshape(w.shape), scales.reshape(shape), "int4", axis)


def output_error(w: jax.Array, kept: jax.Array, hessian_II: jax.Array) -> jax.Array:
    """tr(ΔᵀHΔ), f32[]: the squared error of the outputs over the inputs of which H is the sum."""
    difference_IO = (w.astype(jnp.float32) - kept.astype(jnp.float32)).reshape(hessian_II.shape[0], -1)
    return jnp.einsum("IO,IJ,JO->", difference_IO, hessian_II, difference_IO)
