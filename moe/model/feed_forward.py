"""The SwiGLU feed-forward network (arXiv 2002.05202): dense layers and shared experts."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe.model.parameter import Kind, matrix, used
from moe.model.precision import Precision
from moe.ops.swiglu import swiglu
from parallel.layout import Layout


class FeedForward(nnx.Module):
    """down(silu(gate(x)) · up(x)), without biases (released code, HunYuanMLP)."""

    def __init__(self, d_model: int, width: int, kind: Kind, std: float, precision: Precision, *, rngs: nnx.Rngs):
        self.dtype = precision.compute_dtype
        self.w_gate_DF = matrix("DF", (d_model, width), kind, std, precision, rngs)
        self.w_up_DF = matrix("DF", (d_model, width), kind, std, precision, rngs)
        self.w_down_FD = matrix("FD", (width, d_model), kind, std, precision, rngs)

    def __call__(self, x_BTD: jax.Array, layout: Layout) -> jax.Array:
        w_gate_DF, w_up_DF, w_down_FD = (
            used(w, self.dtype, layout) for w in (self.w_gate_DF, self.w_up_DF, self.w_down_FD)
        )
        gate_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, w_gate_DF)
        up_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, w_up_DF)
        hidden_BTF = layout.constrain(swiglu(gate_BTF, up_BTF), "BTF")
        return layout.constrain(jnp.einsum("BTF,FD->BTD", hidden_BTF, w_down_FD), "BTD")
