"""A model's parameters as pieces: one layer's array, or one expert's, of the stacked parameters."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from moe.model.config import ModelConfig
from moe.model.parameter import QUANTIZED_KINDS, ParameterSpec, placed, quantized
from moe.ops.quantize import Quantized, QuantizedWeight
from parallel.layout import Layout

Path = tuple[str | int, ...]
"""The keys that lead to a parameter in the nested dicts."""


@dataclass(frozen=True)
class Piece:
    """
    path: of the stacked parameter.
    index: where in its leading axes the piece stands: () or (group,) or (group, expert).
    shape, axes: of the piece alone; axes has a letter for each axis.
    layer: number of the layer it belongs to, from 0; None outside the layers.
    """

    path: Path
    index: tuple[int, ...]
    shape: tuple[int, ...]
    axes: str
    layer: int | None

    @property
    def name(self) -> str:
        """The stacked parameter's name."""
        return ".".join(map(str, self.path))


class Source(Protocol):
    """Weights that can be read piece by piece."""

    def dtype(self, piece: Piece) -> np.dtype:
        """In which the piece is stored."""

    def read(self, piece: Piece) -> np.ndarray:
        """The piece's values, of its shape; or a QuantizedWeight, where the source's matrices are quantized already."""


def parameters(specs: dict[str, Any], path: Path = ()) -> Iterator[tuple[Path, ParameterSpec]]:
    """All parameters of the nested dicts, in their order."""
    for key, value in specs.items():
        if isinstance(value, ParameterSpec):
            yield (*path, key), value
        else:
            yield from parameters(value, (*path, key))


def leading_axes(spec: ParameterSpec) -> int:
    """How many of a parameter's axes its pieces are taken from: of layers, and of experts."""
    if not spec.axes.startswith("L"):
        return 0
    return 2 if spec.kind == "expert" else 1


def pieces(config: ModelConfig, specs: dict[str, Any]) -> list[Piece]:
    """All pieces of a model, those of a stacked parameter one after the other as they lie in memory."""
    first_layers, layer = [], 0
    for dense, repeat in config.layer_groups():
        first_layers.append((layer, len(dense)))
        layer += len(dense) * repeat
    found = []
    for path, spec in parameters(specs):
        if path[0] != "stacks":
            found.append(Piece(path, (), spec.shape, spec.axes, None))
            continue
        first, layers_per_group = first_layers[int(path[1])]
        stacked = leading_axes(spec)
        for index in np.ndindex(spec.shape[:stacked]):
            layer = first + index[0] * layers_per_group + int(path[3])
            found.append(Piece(path, index, spec.shape[stacked:], spec.axes[stacked:], layer))
    return found


def load(
    source: Source,
    config: ModelConfig,
    specs: dict[str, Any],
    layout: Layout,
    dtype: DTypeLike | None = None,
    format: Quantized | None = None,
    *,
    unrolled: bool = False,
) -> dict[str, Any]:
    """The parameters as nested dicts of arrays, each device taking its part of one piece after the other.

    The host holds one piece at a time, whatever the model's size; devices that belong to other processes are left to
    them, and pieces that no device here keeps are not read.

    Args:
        dtype: of the arrays; None as stored.
        format: of matrices that can be quantized, each piece as it arrives; None to leave them. That of a source whose
            matrices are quantized already.
        unrolled: whether they are for an unrolled model (moe/model/transformer.py), rather than one of `specs`.

    Raises:
        WeightsError: a piece is missing or damaged.
        LayoutError: a parameter does not divide over the mesh.
    """
    stacked: dict[Path, _Stacked] = {}
    by_path = dict(parameters(specs))
    for piece in pieces(config, specs):
        place, spec = piece, by_path[piece.path]
        if unrolled and piece.layer is not None:
            place, spec = _in_its_own_stack(piece, config), spec._replace(shape=(1, *spec.shape[1:]))
        if place.path not in stacked:
            stored = source.dtype(piece) if dtype is None else dtype
            stacked[place.path] = _Stacked(spec, layout, stored, format if spec.kind in QUANTIZED_KINDS else None)
        stacked[place.path].take(place, partial(source.read, piece))
    tree: dict[Any, Any] = {}
    for path, array in stacked.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = array.whole()
    return tree


def unrolled(tree: dict[str, Any]) -> dict[str, Any]:
    """The nested dicts of an unrolled model, from arrays of all layers."""
    if "stacks" not in tree:
        return tree
    groups: list[Any] = []
    for _, stack in sorted(tree["stacks"].items()):
        repeat = len(jax.tree.leaves(stack)[0])
        groups += (jax.tree.map(lambda x, i=i: x[i : i + 1], stack) for i in range(repeat))
    return tree | {"stacks": dict(enumerate(groups))}


def _in_its_own_stack(piece: Piece, config: ModelConfig) -> Piece:
    """Where a piece stands in an unrolled model."""
    _, stack, *rest = piece.path
    before = sum(repeat for _, repeat in config.layer_groups()[: int(stack)])
    return replace(piece, path=("stacks", before + piece.index[0], *rest), index=(0, *piece.index[1:]))


class _Stacked:
    """One stacked parameter while its pieces arrive: of one array, or of two where it is quantized."""

    def __init__(self, spec: ParameterSpec, layout: Layout, dtype: DTypeLike, format: Quantized | None) -> None:
        self.dtype, self.format = jnp.dtype(dtype), format
        stack = jax.ShapeDtypeStruct(spec.shape, self.dtype)
        abstract = jax.eval_shape(lambda values: self._stored(values, spec.axes.removeprefix("L")), stack)
        self.arrays = placed(abstract, spec.axes, layout, lambda x, axes: _Buffers(x, layout.stored(axes, x.shape)))

    def take(self, piece: Piece, read: Callable[[], Any]) -> None:
        """Reads what belongs in a piece's place, if a device here keeps a part of it, and puts it there."""
        arrays = jax.tree.leaves(self.arrays)
        if any(array.keeps(piece) for array in arrays):
            values = jax.tree.leaves(self._stored(read(), piece.axes))
            for array, part in zip(arrays, values, strict=True):
                array.take(piece, part)

    def whole(self) -> Any:
        return jax.tree.map(_Buffers.whole, self.arrays)

    def _stored(self, values: Any, axes: str) -> Any:
        if isinstance(values, QuantizedWeight):
            return values
        if self.format is None:
            return values.astype(self.dtype)
        return jax.jit(quantized, static_argnums=(1, 2))(jnp.asarray(values), axes, self.format)


class _Buffers:
    """One array while its pieces arrive: a buffer on each device that keeps a part of it."""

    def __init__(self, array: jax.ShapeDtypeStruct, sharding: Sharding | None) -> None:
        self.shape = array.shape
        self.sharding: Sharding = sharding or SingleDeviceSharding(jax.devices()[0])
        self.parts = {
            device: tuple(part.indices(size)[:2] for part, size in zip(index or (), self.shape, strict=True))
            for device, index in self.sharding.addressable_devices_indices_map(self.shape).items()
        }
        self.buffers = {
            device: jnp.zeros([stop - start for start, stop in part], array.dtype, device=device)
            for device, part in self.parts.items()
        }

    def keeps(self, piece: Piece) -> bool:
        return any(_holds(part, piece) for part in self.parts.values())

    def take(self, piece: Piece, values: Any) -> None:
        """Puts each device's part of a piece in its place."""
        values = np.asarray(values)
        for device, part in self.parts.items():
            if _holds(part, piece):
                own = values[tuple(slice(start, stop) for start, stop in part[len(piece.index) :])]
                own = own.reshape((1,) * len(piece.index) + own.shape)
                at = [i - start for i, (start, _) in zip(piece.index, part, strict=False)] + [0] * len(piece.shape)
                self.buffers[device] = _put(self.buffers[device], jax.device_put(own, device), at)

    def whole(self) -> jax.Array:
        buffers = list(self.buffers.values())
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, buffers)


def _holds(part: tuple[tuple[int, int], ...], piece: Piece) -> bool:
    """Whether a device that keeps `part` of a stacked parameter keeps any of a piece."""
    return all(start <= i < stop for i, (start, stop) in zip(piece.index, part, strict=False))


@jax.jit(donate_argnums=0)
def _put(buffer: jax.Array, part: jax.Array, at: list[int]) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, part, at)


def num_bytes(piece: Piece, dtype: np.dtype) -> int:
    """Of one piece as stored."""
    return math.prod(piece.shape) * dtype.itemsize
