"""The routed experts' weights and their computation on rows sorted by expert."""

from typing import Any, NamedTuple

import jax
from flax import nnx

from moe.model.config import ModelConfig
from moe.model.execution import Execution
from moe.model.parameter import matrix, used
from moe.model.precision import Precision
from moe.ops.grouped_matmul import grouped_matmul
from moe.ops.swiglu import swiglu
from parallel.layout import Layout


class ExpertWeights(NamedTuple):
    """One layer's experts in the compute format: w_gate_EDF, w_up_EDF, w_down_EFD. Inside `jax.shard_map` E are this
    device's own, and F its part of their width."""

    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array


class Experts(nnx.Module):
    """E SwiGLU networks of width F, held as three stacked weights."""

    def __init__(self, config: ModelConfig, precision: Precision, *, rngs: nnx.Rngs) -> None:
        self.dtype = precision.compute_dtype
        E, D, F = config.num_experts, config.d_model, config.d_expert
        self.w_gate_EDF = matrix("EDF", (E, D, F), "expert", config.init_std, precision, rngs)
        self.w_up_EDF = matrix("EDF", (E, D, F), "expert", config.init_std, precision, rngs)
        self.w_down_EFD = matrix("EFD", (E, F, D), "expert", config.init_std, precision, rngs)

    def weights(self, layout: Layout) -> ExpertWeights:
        """The weights as used: each device holds its own experts, or its part of their width."""
        return ExpertWeights(*(used(w, self.dtype, layout) for w in (self.w_gate_EDF, self.w_up_EDF, self.w_down_EFD)))

    def specs(self, layout: Layout) -> ExpertWeights:
        """Where `weights` live, for `jax.shard_map`."""
        specs: Any = [layout.used_spec(axes) for axes in ("EDF", "EDF", "EFD")]
        return ExpertWeights(*specs)


def apply_experts(
    rows_RD: jax.Array,
    counts_E: jax.Array,
    weights: ExpertWeights,
    execution: Execution,
    gates_R: jax.Array | None = None,
) -> jax.Array:
    """Applies expert e to the next counts_E[e] rows.

    Args:
        gates_R: f32, by which each row's output is multiplied; None for 1.

    Returns:
        y_RD, of the rows' dtype; zeros after the last expert's rows.
    """
    with jax.named_scope("experts"):
        gate_RF = grouped_matmul(rows_RD, weights.gate_EDF, counts_E, backend=execution.grouped_matmul)
        up_RF = grouped_matmul(rows_RD, weights.up_EDF, counts_E, backend=execution.grouped_matmul)
        hidden_RF = swiglu(gate_RF, up_RF, gates_R)
        return grouped_matmul(hidden_RF, weights.down_EFD, counts_E, backend=execution.grouped_matmul)
