"""The routed experts' weights and their computation on rows sorted by expert."""

from typing import Any, NamedTuple

import jax
from flax import nnx

from moe.model.adapter import LoraConfig, LowRank, Projection, Target, set_adapters
from moe.model.config import ModelConfig
from moe.model.execution import Execution
from moe.model.parameter import matrix, used
from moe.model.precision import Precision
from moe.ops.grouped_matmul import grouped_matmul
from parallel.layout import Layout


class ExpertWeights(NamedTuple):
    """One layer's experts in the compute format: w_gate_EDF, w_up_EDF, w_down_EFD. Inside `jax.shard_map` E are this
    device's own, and F its part of their width.

    adapters: by target, what is added to the weights.
    """

    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array
    adapters: dict[str, LowRank]


class Experts(nnx.Module):
    """E SwiGLU networks of width F, held as three stacked weights."""

    def __init__(self, config: ModelConfig, precision: Precision, *, rngs: nnx.Rngs) -> None:
        self.dtype = precision.compute_dtype
        E, D, F = config.num_experts, config.d_model, config.d_expert
        self.w_gate_EDF = matrix("EDF", (E, D, F), "expert", config.init_std, precision, rngs)
        self.w_up_EDF = matrix("EDF", (E, D, F), "expert", config.init_std, precision, rngs)
        self.w_down_EFD = matrix("EFD", (E, F, D), "expert", config.init_std, precision, rngs)
        self.adapters: nnx.Dict = nnx.Dict()

    def adapt(self, config: LoraConfig, precision: Precision, *, rngs: nnx.Rngs) -> None:
        """Sets adapters beside the weights."""
        weights = {
            Projection.expert_gate: self.w_gate_EDF,
            Projection.expert_up: self.w_up_EDF,
            Projection.expert_down: self.w_down_EFD,
        }
        set_adapters(self.adapters, weights, config, precision, rngs=rngs)

    def weights(self, layout: Layout, key: jax.Array | None) -> ExpertWeights:
        """The weights as used: each device holds its own experts, or its part of their width.

        Args:
            key: of this layer in this step, for the adapters' dropout.
        """
        gate, up, down = (used(w, self.dtype, layout) for w in (self.w_gate_EDF, self.w_up_EDF, self.w_down_EFD))
        adapters = {name: adapter.of_experts(self.dtype, key, layout) for name, adapter in self.adapters.items()}
        return ExpertWeights(gate, up, down, adapters)

    def specs(self, layout: Layout) -> ExpertWeights:
        """Where `weights` live, for `jax.shard_map`."""
        specs: Any = [layout.used_spec(axes) for axes in ("EDF", "EDF", "EFD")]
        gate, up, down = specs
        return ExpertWeights(gate, up, down, {name: adapter.specs(layout) for name, adapter in self.adapters.items()})


def apply_experts(rows_RD: jax.Array, counts_E: jax.Array, weights: ExpertWeights, execution: Execution) -> jax.Array:
    """Applies expert e to the next counts_E[e] rows.

    Returns:
        y_RD, of the rows' dtype; zeros after the last expert's rows.
    """

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return grouped_matmul(x, w, counts_E, backend=execution.grouped_matmul)

    def adapted(target: Target, x: jax.Array, w: jax.Array) -> jax.Array:
        y = product(x, w)
        if target not in weights.adapters:
            return y
        a, b = weights.adapters[target]
        return y + product(product(x, a), b)

    with jax.named_scope("experts"):
        gate_RF = adapted("gate", rows_RD, weights.gate_EDF)
        up_RF = adapted("up", rows_RD, weights.up_EDF)
        hidden_RF = jax.nn.silu(gate_RF) * up_RF
        return adapted("down", hidden_RF, weights.down_EFD)
