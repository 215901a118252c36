"""Adapters merged into the weights beside which they stand, and taken out again: W + alpha / J · A B (arXiv 2106.09685,
section 4.1). Of arrays on their devices, or piece by piece as weights are read.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial, reduce
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moe.model.adapter import LoraConfig
from moe.model.pieces import Piece, Source
from moe.ops.quantize import QuantizedWeight, dequantize


def merged(adapters: dict[str, Any], base: dict[str, Any], lora: LoraConfig) -> dict[str, Any]:
    """The parameters of a model without adapters that computes the same, to rounding; each weight where it was.

    A quantized weight that has an adapter is wide afterwards, in the adapter's format; the others stay as they are.

    Args:
        adapters, base: as nested dicts, as `TrainState.params` and `.frozen` have them.
    """
    return _with_added(adapters, base, lora.scale)


def unmerged(adapters: dict[str, Any], params: dict[str, Any], lora: LoraConfig) -> dict[str, Any]:
    """The base of which `merged` made `params`, to within one rounding of what was merged and one of the result. What
    was quantized comes back wide."""
    return _with_added(adapters, params, -lora.scale)


def weight_name(names: Any, target: str) -> str:
    """Of a layer's parameters that beside which the adapter `target` stands: "w_q_DNH" of "q"."""
    return next(name for name in names if name.startswith(f"w_{target}_"))


def _with_added(adapters: dict[str, Any], params: dict[str, Any], scale: float) -> dict[str, Any]:
    places = list(_places(adapters))
    given = []
    for module, target in places:
        weights, own = _at(params, module), _at(adapters, module)["adapters"][target]
        given.append((weights[weight_name(weights, target)], own["a"], own["b"]))
    arrays = [weight.values if isinstance(weight, QuantizedWeight) else weight for weight, _, _ in given]
    add = jax.jit(_added, out_shardings=[array.sharding for array in arrays])
    found: Any = jax.tree.map(lambda x: x, params, is_leaf=lambda x: isinstance(x, QuantizedWeight))
    for (module, target), new in zip(places, add(given, jnp.float32(scale)), strict=True):
        weights = _at(found, module)
        weights[weight_name(weights, target)] = new
    return found


def _places(adapters: dict[Any, Any], path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    """(where a module stands, target) of every adapter."""
    for name, inner in adapters.items():
        if name == "adapters":
            yield from ((path, target) for target in inner)
        else:
            yield from _places(inner, (*path, name))


def _at(tree: Any, path: tuple[Any, ...]) -> dict[str, Any]:
    return reduce(lambda inner, key: inner[key], path, tree)


def _added(given: list[tuple[Any, jax.Array, jax.Array]], scale: jax.Array) -> list[jax.Array]:
    """Each weight layer by layer, so that of what is computed in float32 one layer is there at a time."""
    return [jax.lax.map(partial(_added_to_layer, scale), each) for each in given]


def _added_to_layer(scale: jax.Array, layer: tuple[Any, jax.Array, jax.Array]) -> jax.Array:
    weight, a, b = layer
    is_quantized = isinstance(weight, QuantizedWeight)
    wide = dequantize(weight, jnp.float32) if is_quantized else weight.astype(jnp.float32)
    # With J twice; of experts E is in all three.
    experts = "E" if a.ndim + b.ndim - weight.ndim == 3 else ""
    inputs = "xyz"[: a.ndim - len(experts) - 1]
    outputs = "uvw"[: b.ndim - len(experts) - 1]
    product = f"{experts}{inputs}J,{experts}J{outputs}->{experts}{inputs}{outputs}"
    added = jnp.einsum(product, a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
    return (wide + scale * added).astype(a.dtype if is_quantized else weight.dtype)


class Factors(NamedTuple):
    """What is added to a piece of a model: scale · A B, where A's last axis and B's first are J and the others the
    piece's."""

    a: np.ndarray
    b: np.ndarray
    scale: float


class Adapters(Protocol):
    """Adapters that can be read piece by piece."""

    def factors(self, piece: Piece) -> Factors | None:
        """Those beside a piece of the model, or None where there is none."""


class StackedAdapters:
    """Adapters as a model's own parameters, stacked as its weights are; `Adapters`."""

    def __init__(self, source: Source, lora: LoraConfig) -> None:
        self.lora, self._source = lora, source

    def factors(self, piece: Piece) -> Factors | None:
        *module, name = piece.path
        target = str(name).split("_")[1]
        if target not in self.lora.targets:
            return None
        a, b = (self._source.read(replace(piece, path=(*module, "adapters", target, half))) for half in "ab")
        return Factors(a, b, self.lora.scale)


class MergedSource:
    """Weights with adapters merged into each piece as it is read; a `moe.model.pieces.Source`. They keep their
    formats: what is to be quantized is so after merging."""

    def __init__(self, base: Source, adapters: Adapters) -> None:
        self.base, self.adapters = base, adapters

    def dtype(self, piece: Piece) -> np.dtype:
        return self.base.dtype(piece)

    def read(self, piece: Piece) -> np.ndarray:
        values, factors = self.base.read(piece), self.adapters.factors(piece)
        if factors is None:
            return values
        a, b = (x.astype(np.float32) for x in (factors.a, factors.b))
        return (values.astype(np.float32) + factors.scale * np.tensordot(a, b, 1)).astype(values.dtype)
