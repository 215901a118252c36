"""The routed experts' weights and their computation on rows sorted by expert."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe.model.adapter import LoraConfig, LowRank, Projection, Target, set_adapters
from moe.model.config import ModelConfig
from moe.model.execution import Execution
from moe.model.parameter import as_kept, matrix, placed, used
from moe.model.precision import Precision
from moe.model.products import Products, recorded, split_of, spread
from moe.ops.grouped_matmul import InStack, goes_by_blocks, grouped_matmul, grouped_matmul_in_stack, grouped_swiglu
from moe.ops.quantize import QuantizedWeight
from moe.ops.scaled import Recipe, Split, frozen_grouped_matmul, scaled_grouped_matmul
from moe.ops.swiglu import swiglu
from parallel.layout import Layout

Matrices = jax.Array | InStack | QuantizedWeight


class ExpertWeights(NamedTuple):
    """One layer's experts in the compute format, or left in their stack, or quantized where rows will be too:
    w_gate_EDF, w_up_EDF, w_down_EFD. Inside `jax.shard_map` E are this device's own, and F its part of their width.

    histories: of the three products, each as often as there are devices; empty where they have none.
    adapters: by target, what is added to the weights.
    """

    gate_EDF: Matrices
    up_EDF: Matrices
    down_EFD: Matrices
    histories: dict[str, jax.Array]
    adapters: dict[str, LowRank]


class Experts(nnx.Module):
    """E SwiGLU networks of width F, held as three stacked weights."""

    def __init__(self, config: ModelConfig, precision: Precision, *, rngs: nnx.Rngs) -> None:
        self.dtype = precision.compute_dtype
        self.products = Products(precision, ("gate", "up", "down"))
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

    def weights(self, layout: Layout, length: int, key: jax.Array | None) -> ExpertWeights:
        """The weights as used on texts of T tokens: each device holds its own experts, or its part of their width.

        Args:
            key: of this layer in this step, for the adapters' dropout.
        """
        keeps = self.products.keeps_weights(length)
        devices = 1 if layout.mesh is None else layout.mesh.size
        gate, up, down = (as_kept(w, layout) if keeps else used(w, self.dtype, layout) for w in self._matrices)
        histories = {name: spread(history[...], devices) for name, history in self.products.histories.items()}
        adapters = {name: adapter.of_experts(self.dtype, key, layout) for name, adapter in self.adapters.items()}
        return ExpertWeights(gate, up, down, histories, adapters)

    def reads_stacks(self, layout: Layout) -> bool:
        """Whether `weights` may be left where they stand: nothing gathers them, and nothing but products in the compute
        format reads them."""
        products = self.products
        return layout.mesh is None and products.recipe is None and not (products.histories or products.quantizes_rows)

    def have_read(self, stacks: dict[str, InStack]) -> None:
        """Takes over the stacks as `apply_experts` leaves them, by product."""
        for name, weight in zip(self.products.names, self._matrices, strict=True):
            if name in stacks:
                weight.set_value(stacks[name])

    @property
    def _matrices(self) -> tuple[nnx.Param, nnx.Param, nnx.Param]:
        return self.w_gate_EDF, self.w_up_EDF, self.w_down_EFD

    def specs(self, layout: Layout, length: int) -> ExpertWeights:
        """Where `weights` live, for `jax.shard_map`."""
        specs: list[Any] = [layout.used_spec(axes) for axes in ("EDF", "EDF", "EFD")]
        if self.products.keeps_weights(length):
            specs = [
                placed(w.get_value(), w.get_metadata("axes"), layout, lambda _, axes: layout.used_spec(axes))
                for w in self._matrices
            ]
        gate, up, down = specs
        histories: dict[str, Any] = {}
        for name in self.products.histories:
            each: Any = layout.each_device()
            histories[name] = each.spec
        adapters: dict[str, Any] = {name: adapter.specs(layout) for name, adapter in self.adapters.items()}
        return ExpertWeights(gate, up, down, histories, adapters)


def by_chunk(weights: ExpertWeights, chunks: int) -> list[ExpertWeights]:
    """A device's weights for each part of its rows."""
    histories = {name: spread(history[0], chunks) for name, history in weights.histories.items()}
    return [weights._replace(histories=jax.tree.map(lambda h, i=i: h[i], histories)) for i in range(chunks)]


def rows_split(layout: Layout) -> Split:
    """By which mesh axes rows and the experts' width are split on the devices that `apply_experts` runs on."""
    tokens = [name for _, names in split_of("BT", layout.activation_spec("BT")) for name in names]
    rows = dict.fromkeys([*tokens, *layout.expert_axes])
    width = dict(split_of("EDF", layout.used_spec("EDF"))).get("F", ())
    return ("R", tuple(rows)), ("F", width)


def apply_experts(
    rows_RD: jax.Array,
    counts_E: jax.Array,
    weights: ExpertWeights,
    execution: Execution,
    recipe: Recipe | None = None,
    split: Split = (),
    gates_R: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, InStack]]:
    """Applies expert e to the next counts_E[e] rows.

    Args:
        weights: of one part of the rows, as `by_chunk` gives them.
        recipe: of products in 8 bits. split: what `rows_split` gives.
        gates_R: f32, by which each row's output is multiplied; None for 1.

    Returns:
        y_RD, of the rows' dtype; zeros after the last expert's rows. And by product, the stacks that were read.
    """
    if recipe is None and _one_loop(rows_RD, weights, execution):
        matrices: Any = weights.gate_EDF, weights.up_EDF, weights.down_EFD
        with jax.named_scope("experts"):
            y_RD, stacks = grouped_swiglu(rows_RD, matrices, counts_E, gates_R, backend=execution.grouped_matmul)
        by_product = dict(zip(("gate", "up", "down"), stacks, strict=True))
        return y_RD, by_product if isinstance(weights.gate_EDF, InStack) else {}
    read: dict[str, InStack] = {}
    owned_R1 = (jnp.arange(len(rows_RD)) < counts_E.sum())[:, None]
    backend: Any = execution.grouped_matmul
    grouped = partial(grouped_matmul, sizes_E=counts_E, backend=backend)

    def product(name: str, x: jax.Array, w: Matrices, axes: Split) -> jax.Array:
        history = weights.histories.get(name)
        if isinstance(w, QuantizedWeight):
            return frozen_grouped_matmul(x, w, counts_E)
        if isinstance(w, InStack):
            y, read[name] = grouped_matmul_in_stack(x, w, counts_E, backend=backend)
            return y
        if recipe is None:
            return recorded(grouped(x, w), x, w, history, owned_R1)
        multiply = partial(scaled_grouped_matmul, x, w, counts_E, recipe, backend=backend, split=axes)
        if recipe.scaling == "delayed":
            return multiply(history)
        return recorded(multiply(), x, w, history, owned_R1)

    def adapted(target: Target, x: jax.Array, w: Matrices, axes: Split) -> jax.Array:
        y = product(target, x, w, axes)
        if target not in weights.adapters:
            return y
        a, b = weights.adapters[target]
        return y + grouped(grouped(x, a), b)

    # `down` sums over F.
    down_split = tuple(({"F": "D"}.get(axis, axis), names) for axis, names in split)
    with jax.named_scope("experts"):
        gate_RF = adapted("gate", rows_RD, weights.gate_EDF, split)
        up_RF = adapted("up", rows_RD, weights.up_EDF, split)
        return adapted("down", swiglu(gate_RF, up_RF, gates_R), weights.down_EFD, down_split), read


def _one_loop(rows_RD: jax.Array, weights: ExpertWeights, execution: Execution) -> bool:
    """Whether all products of the experts are made in one loop: nothing is added to one, or told of it. Of fewer rows
    than experts each product takes the matrices one by one."""
    plain = not (weights.histories or weights.adapters or isinstance(weights.gate_EDF, QuantizedWeight))
    return plain and goes_by_blocks(execution.grouped_matmul) and len(rows_RD) >= weights.gate_EDF.shape[0]
