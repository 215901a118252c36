"""The SwiGLU feed-forward network (arXiv 2002.05202): dense layers and shared experts."""

import jax
from flax import nnx

from moe.model.adapter import LoraConfig, Projection, adapted, set_adapters
from moe.model.parameter import Kind, matrix
from moe.model.precision import Precision
from moe.model.products import Products
from moe.ops.swiglu import swiglu
from parallel.layout import Layout


class FeedForward(nnx.Module):
    """down(silu(gate(x)) · up(x)), without biases (released code, HunYuanMLP)."""

    def __init__(self, d_model: int, width: int, kind: Kind, std: float, precision: Precision, *, rngs: nnx.Rngs):
        self.products = Products(precision, ("gate", "up", "down"))
        self.w_gate_DF = matrix("DF", (d_model, width), kind, std, precision, rngs)
        self.w_up_DF = matrix("DF", (d_model, width), kind, std, precision, rngs)
        self.w_down_FD = matrix("FD", (width, d_model), kind, std, precision, rngs)
        self.adapters: nnx.Dict = nnx.Dict()

    def adapt(self, config: LoraConfig, precision: Precision, *, rngs: nnx.Rngs) -> None:
        """Sets adapters beside the matrices."""
        weights = {
            Projection.gate: self.w_gate_DF,
            Projection.up: self.w_up_DF,
            Projection.down: self.w_down_FD,
        }
        set_adapters(self.adapters, weights, config, precision, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, layout: Layout, key: jax.Array | None = None) -> jax.Array:
        """y_BTD. key: of this layer in this step, for the adapters' dropout."""
        gate_BTF = self.products("gate", "BTD,DF->BTF", x_BTD, self.w_gate_DF, layout)
        gate_BTF = adapted(self.adapters, "gate", x_BTD, gate_BTF, layout, key)
        up_BTF = self.products("up", "BTD,DF->BTF", x_BTD, self.w_up_DF, layout)
        up_BTF = adapted(self.adapters, "up", x_BTD, up_BTF, layout, key)
        hidden_BTF = layout.constrain(swiglu(gate_BTF, up_BTF), "BTF")
        y_BTD = self.products("down", "BTF,FD->BTD", hidden_BTF, self.w_down_FD, layout)
        return layout.constrain(adapted(self.adapters, "down", hidden_BTF, y_BTD, layout, key), "BTD")
