"""cuDNN's flash attention, on NVIDIA GPUs."""

import jax
import jax.numpy as jnp

from moe.ops.attention.view import View
from parallel.platform import platform

FORMATS = (jnp.bfloat16, jnp.float16)


def cudnn_attention(q_BTNH: jax.Array, k_BSMH: jax.Array, v_BSMH: jax.Array, view: View) -> jax.Array:
    """See `moe.ops.attention.attention`. With documents or positions it holds a mask of B·T·S, shared by all heads.

    Raises:
        ValueError: the platform is not a GPU, or the inputs are not bfloat16 or float16, as cuDNN's kernel needs.
    """
    if platform() != "gpu":
        raise ValueError(
            f'attention backend "cudnn" needs an NVIDIA GPU, this is {platform()}: use "dense", "chunked" or "auto"'
        )
    return cudnn_kernel(q_BTNH, k_BSMH, v_BSMH, view)


def cudnn_kernel(q_BTNH: jax.Array, k_BSMH: jax.Array, v_BSMH: jax.Array, view: View) -> jax.Array:
    """The call itself, unguarded, so that it can be compiled for a GPU on a machine that has none."""
    if q_BTNH.dtype not in FORMATS:
        raise ValueError(f'attention backend "cudnn" takes bfloat16 or float16, not {q_BTNH.dtype}: use "chunked"')
    if view.plain:
        return jax.nn.dot_product_attention(q_BTNH, k_BSMH, v_BSMH, is_causal=view.causal, implementation="cudnn")
    # Told that it is causal, the kernel leaves out the keys behind; a mask alone would have it compute all pairs.
    skips = view.causal and view.in_place
    allowed_BTS = view._replace(causal=view.causal and not skips).mask()
    y_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSMH, v_BSMH, mask=allowed_BTS[:, None], is_causal=skips, implementation="cudnn"
    )
    # The kernel gives the mean of all values to a query that sees no key.
    return jnp.where(allowed_BTS.any(-1)[:, :, None, None], y_BTNH, 0)
