"""Which tensor was the first that went wrong in a step: for a step that is computed once more, outside of training.

The model's products note the largest magnitudes of what goes into them (moe/model/products.py): of an activation and a
weight in the forward pass, of a gradient in the backward one. The first of them in the order in which they are computed
that is not finite, or with delayed scaling far beyond what its scale was made for, is told.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from moe.model.config import ModelConfig
from moe.model.products import MagnitudeHistory
from moe.model.transformer import Transformer
from moe.ops.scaled import Recipe
from moe.ops.scaled.history import DY, W, X
from moe.ops.scaled.quantize import ALL, EACH, largest_magnitude, scales_for
from moe.train.checkpoint import named
from moe.train.data import Batch
from moe.train.histories import OVERFLOW
from moe.train.objective import make_objective
from moe.train.state import Blueprint, TrainState, fresh_model
from moe.train.step import split_batch, step_key

_PRODUCTS = ("k", "v", "q", "o", "gate", "up", "down", "head")
"""Within a part of a layer, in the order in which they are computed."""


class Seen(NamedTuple):
    """A tensor of the step.

    name: what it is, and of which layer. largest: its largest magnitude.
    known: from which delayed scaling made its scale; 0 where nothing was known.
    limit: from which on it counts as an overflow.
    dtype: in which products take it; None for what is no operand of one.
    """

    name: str
    largest: float
    known: float = 0.0
    limit: float = np.inf
    dtype: DTypeLike | None = None

    @property
    def is_wrong(self) -> bool:
        return not np.isfinite(self.largest) or self.largest > self.limit


def first_wrong(
    blueprint: Blueprint, state: TrainState, batch: Batch, *, seed: int, microbatches: int, loss_chunk: int
) -> str | None:
    """Of the step from `state` with `batch`, which are those before it: a sentence, or None where all is well.

    Args: as of `moe.train.step.make_train_step`.
    """
    graph, unseen = _watched(blueprint)
    watched, histories = replace(blueprint, graph=graph), state.histories or unseen
    objective = make_objective(watched, microbatches=microbatches, loss_chunk=loss_chunk)

    def magnitudes(state: TrainState, histories: Any, batch: Batch) -> Any:
        num_targets = jnp.maximum(batch.weights_BT.sum(), 1.0)
        parts = jax.tree.map(lambda x: split_batch(x, microbatches, blueprint.layout), batch)

        def one(_, numbered):
            number, part = numbered
            given = (state.balance, state.frozen, part, jax.random.fold_in(step_key(seed, state.step), number))
            take = jax.grad(objective, argnums=(0, 1), has_aux=True)
            (grads, following), _ = take(state.params, histories, None, *given, num_targets)
            grads = blueprint.by_axes(blueprint.layout.constrain_gradient, grads)
            return None, (_by_layer(grads), jax.tree.map(lambda h: h[..., 0], following))

        of_parts = jax.lax.scan(one, None, (jnp.arange(microbatches), parts))[1]
        grads, products = jax.tree.map(lambda x: x.max(0), of_parts)
        return [_by_layer(state.params), _by_layer(state.frozen)], products, grads

    weights, products, gradients = jax.device_get(jax.jit(magnitudes)(state, histories, batch))
    order = [
        *(seen for part in weights for seen in _tensors(blueprint.config, "the weight", part)),
        *_operands(blueprint, products, jax.device_get(histories)),
        *_tensors(blueprint.config, "the gradient of", gradients),
    ]
    found = next((each for each in order if each.is_wrong), None)
    return None if found is None else _told(found, blueprint.precision.recipe)


def _watched(blueprint: Blueprint) -> tuple[nnx.GraphDef, Any]:
    """The model with a history for each product, and histories of nothing."""

    def model() -> Transformer:
        given = (blueprint.config, blueprint.precision, blueprint.execution, blueprint.lora)
        model = fresh_model(*given, jax.random.key(0))
        model.watch()
        return model

    abstract = nnx.eval_shape(model)
    unseen = nnx.to_pure_dict(nnx.state(abstract, MagnitudeHistory))
    return nnx.graphdef(abstract), jax.tree.map(lambda h: jnp.zeros(h.shape, h.dtype), unseen)


def _by_layer(tree: Any) -> Any:
    """The largest magnitudes of arrays, infinity where a number is not finite; of those in "stacks" by layer."""

    def largest(path: Any, x: jax.Array) -> jax.Array:
        stacked = any(getattr(key, "key", None) == "stacks" for key in path)
        by_layer = (EACH, *(ALL,) * (x.ndim - 1)) if stacked else (ALL,) * x.ndim
        return largest_magnitude(x.astype(jnp.float32), by_layer).reshape(-1 if stacked else ())

    return jax.tree_util.tree_map_with_path(largest, tree)


def _tensors(config: ModelConfig, what: str, largest: dict[str, Any]) -> Iterator[Seen]:
    for name, values in named(largest).items():
        for group, value in enumerate(np.atleast_1d(values)):
            layer, part = _place(config, name, group)
            yield Seen(f"{what} {part}{'' if layer is None else f' of layer {layer}'}", float(value))


def _operands(blueprint: Blueprint, products: dict[str, Any], histories: dict[str, Any]) -> Iterator[Seen]:
    """What goes into the products, in the order in which they are computed: forward, and then the gradients back."""
    found = []
    before = named(histories)
    for name, values in named(products).items():
        history = before[name].reshape(-1, 3, before[name].shape[-1])
        for group, (largest, past) in enumerate(zip(values.reshape(-1, 3), history, strict=True)):
            layer, part = _place(blueprint.config, name, group)
            where, _, product = part.replace("products.histories.", "").rpartition(".")
            told = f"{where or 'the head'}'s product{f' {product!r} of layer {layer}' if where else ''}"
            found.append(((np.inf if layer is None else layer, where, _PRODUCTS.index(product)), told, largest, past))
    found.sort(key=lambda each: each[0])
    recipe = blueprint.precision.recipe
    forward, backward = (None, None) if recipe is None else (recipe.forward_dtype, recipe.gradient_dtype)

    def seen(name: str, which: int, largest: np.ndarray, past: np.ndarray, dtype: DTypeLike | None) -> Seen:
        known = float(past[which].max())
        limit = OVERFLOW * known if past[which, -1] > 0 else np.inf
        return Seen(name, float(largest[which]), known, limit, dtype)

    for _, told, largest, past in found:
        yield seen(f"the activation that goes into {told}", X, largest, past, forward)
        yield seen(f"the weight in {told}", W, largest, past, forward)
    for _, told, largest, past in reversed(found):
        yield seen(f"the gradient that comes back to {told}", DY, largest, past, backward)


def _place(config: ModelConfig, name: str, group: int) -> tuple[int | None, str]:
    """The layer, and the rest of a name such as "stacks.0.blocks.1.attention.w_q_DNH", in one group of its stack."""
    _, found, inside = name.partition("stacks.")
    if not found:
        return None, name
    stack, _, block, part = inside.split(".", 3)
    groups = config.layer_groups()
    first = sum(len(dense) * repeat for dense, repeat in groups[: int(stack)])
    return first + group * len(groups[int(stack)][0]) + int(block), part


def _told(found: Seen, recipe: Recipe | None) -> str:
    finite = np.isfinite(found.largest)
    problem = f"over its format's range more than {OVERFLOW:g} times" if finite else "not finite"
    largest = f"{found.largest:.6g}" if finite else "infinite, or no number"
    sentence = f"the first tensor that is {problem} is {found.name}: its largest magnitude is {largest}"
    if recipe is None or found.dtype is None:
        return sentence
    if recipe.scaling in ("row", "block"):
        return f"{sentence}, with a scale for each {recipe.scaling} ({recipe.format})"
    if recipe.scaling == "delayed" and not found.known:
        return f"{sentence}, its scale one that is presumed before a first step ({recipe.format})"
    scale = float(scales_for(jnp.float32(found.known or found.largest), found.dtype))
    return f"{sentence}, its scale {scale:.6g} ({jnp.dtype(found.dtype).name}, {recipe.scaling})"
