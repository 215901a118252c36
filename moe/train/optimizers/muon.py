"""Muon as Moonlight has it (arXiv 2502.16982): the momentum of each matrix, orthogonalized.

Matrices are those of attention, experts and dense layers, one for each layer and each expert; the heads of a projection
belong to one matrix. All else is for another optimizer. Where the momentum is shared out over devices, each first
gathers whole matrices, as many as are its share, by all-to-alls; then it orthogonalizes those alone, and sends the
parts back. Every matrix is orthogonalized as on a single device, and the momentum is kept shared out. Where there are
more devices than matrices of a parameter some have none. `optax.contrib.muon` leaves to XLA who does what, and divides
the momentum by 1 - b^t, as the paper does not.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from moe.model.parameter import QUANTIZED_KINDS
from moe.train.optimizers.matrices import matrix_axes
from moe.train.optimizers.moments import Blocks, MomentFormat, all_zero, by_leaf, decoded, encoded, parted
from parallel.layout import SINGLE_DEVICE, Layout

MATRICES = QUANTIZED_KINDS
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial that each step applies to the singular values (arXiv 2502.16982 §2.1)."""
STEPS = 5
UPDATE_SIZE = 0.2
"""Root mean square of an update, as that of AdamW's usually is (arXiv 2502.16982 §2.2)."""


class MuonState(NamedTuple):
    """momentum: like the parameters, each in its format."""

    momentum: Any


class _Stepped(NamedTuple):
    """Of one parameter."""

    update: jax.Array
    momentum: jax.Array | Blocks


@dataclass(frozen=True)
class Orthogonalized:
    """One parameter: its axes by letter, L and E the matrices' numbers, and its momentum's format."""

    axes: str
    format: MomentFormat


def scale_by_muon(
    parameters: Any, momentum: float = 0.95, layout: Layout = SINGLE_DEVICE, dtype: DTypeLike = jnp.float32
) -> optax.GradientTransformation:
    """Nesterov's momentum, orthogonalized and of AdamW's size.

    Args:
        parameters: for each of them Orthogonalized.
        layout: by which they are shared out.
        dtype: in which matrices are orthogonalized; the released code has bfloat16.
    """

    def init(params: Any) -> MuonState:
        return MuonState(all_zero(jax.tree.map(lambda own: own.format, parameters), params, signed=True))

    def update(gradients: Any, state: MuonState, params: Any = None):
        del params

        def step(own: Orthogonalized, gradient: jax.Array, kept: Any) -> _Stepped:
            gradient = gradient.astype(jnp.float32)
            summed = momentum * decoded(kept, signed=True) + gradient
            direction = orthogonalized((gradient + momentum * summed).astype(dtype), own.axes, layout)
            return _Stepped(direction.astype(jnp.float32), encoded(summed, own.format, signed=True))

        updates, kept = parted(_Stepped, by_leaf(step, parameters, gradients, state.momentum))
        return updates, MuonState(kept)

    return optax.GradientTransformation(init, update)


def orthogonalized(x: jax.Array, axes: str, layout: Layout) -> jax.Array:
    """Every matrix of a parameter made nearly orthogonal, its root mean square `UPDATE_SIZE` where it has full rank.

    Args:
        x: of the parameter's whole shape, with its letters; in the format that products are to have.
    """
    rows, leading = len(matrix_axes(axes).rows), len(axes) - len(axes.removeprefix("L").removeprefix("E"))
    if layout.mesh is None:
        return newton_schulz(x.reshape(-1, *x.shape[leading:]), rows).reshape(x.shape)
    spec, sizes = layout.sharded_spec(axes, x.shape[0]), layout.mesh.shape
    split = [(place - leading + 1, names) for place, names in enumerate(spec) if place >= leading and names]
    taken = {name for names in spec for name in _names(names)}
    copies = tuple(name for name in sizes if name not in taken)
    shares = math.prod(sizes[name] for name in (*copies, *(each for _, names in split for each in _names(names))))

    def on_device(part: jax.Array) -> jax.Array:
        batch = part.reshape(-1, *part.shape[leading:])
        count = math.ceil(len(batch) / shares) * shares
        own = jnp.pad(batch, [(0, count - len(batch)), *[(0, 0)] * (batch.ndim - 1)])
        own_count = count // math.prod(sizes[name] for name in copies)
        own = jax.lax.dynamic_slice_in_dim(own, jax.lax.axis_index(copies) * own_count, own_count)
        for place, names in split:
            own = jax.lax.all_to_all(own, names, 0, place, tiled=True)
        own = newton_schulz(own, rows)
        for place, names in reversed(split):
            own = jax.lax.all_to_all(own, names, place, 0, tiled=True)
        return jax.lax.all_gather(own, copies, tiled=True)[: len(batch)].reshape(part.shape)

    return layout.shard_map(on_device, (spec,), spec)(x)


def newton_schulz(x: jax.Array, rows: int) -> jax.Array:
    """The nearly orthogonal factor of each of some matrices, times `UPDATE_SIZE` and the root of its longer side
    (arXiv 2502.16982 §2; released code).

    Args:
        x: matrices by number, the first `rows` of the other axes being rows, and the rest columns.
    """
    matrices = x.reshape(len(x), math.prod(x.shape[1 : rows + 1]), -1)
    upright = matrices.shape[1] > matrices.shape[2]
    y = matrices.mT if upright else matrices
    size = jnp.sqrt((y.astype(jnp.float32) ** 2).sum((1, 2), keepdims=True))
    y = (y / (size + 1e-7)).astype(x.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        square = y @ y.mT
        y = a * y + (b * square + c * (square @ square)) @ y
    scale = UPDATE_SIZE * math.sqrt(max(matrices.shape[1:]))
    return scale * (y.mT if upright else y).reshape(x.shape)


def _names(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names or ()
