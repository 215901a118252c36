"""Adafactor (arXiv 1804.04235): of the second moments of a matrix, the means of its rows and columns alone.

As `optax.adafactor` without momentum and without `multiply_by_parameter_scale`, so that learning rates are those of
Adam. Means are those of one matrix (matrices.py), of one layer and one expert, where Optax would take the two longest
axes of a stack.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe.train.optimizers.matrices import MatrixAxes
from moe.train.optimizers.moments import by_leaf, parted

EPSILON = 1e-30
"""Added to squares (arXiv 1804.04235, table 4)."""
CLIP = 1.0
"""Largest root mean square of a matrix's update (arXiv 1804.04235 §6, d)."""
DECAY = 0.8
"""The second moments' decay in step t is 1 - t^-0.8 (arXiv 1804.04235 §7.2)."""


class Factors(NamedTuple):
    """Means of the squares of a matrix, f32: of each row and of each column; 1 long along the other's axes."""

    rows: jax.Array
    columns: jax.Array


class AdafactorState(NamedTuple):
    """steps: i32[], taken. squares: for each parameter Factors, or the means themselves of what is no matrix."""

    steps: jax.Array
    squares: Any


class _Stepped(NamedTuple):
    """Of one parameter."""

    update: jax.Array
    squares: Factors | jax.Array


def scale_by_adafactor(axes: Any, largest_decay: float = 0.999) -> optax.GradientTransformation:
    """
    Args:
        axes: for each parameter its MatrixAxes.
        largest_decay: of the second moments (a cap, as in arXiv 2106.04560).
    """

    def init(params: Any) -> AdafactorState:
        def zeros(own: MatrixAxes, parameter: jax.Array) -> Factors | jax.Array:
            return _means(jnp.zeros(parameter.shape, jnp.float32), own)

        return AdafactorState(jnp.zeros((), jnp.int32), by_leaf(zeros, axes, params))

    def update(gradients: Any, state: AdafactorState, params: Any = None):
        del params
        steps = optax.safe_increment(state.steps)
        decay = jnp.minimum(1 - steps.astype(jnp.float32) ** -DECAY, largest_decay)

        def step(own: MatrixAxes, gradient: jax.Array, squares: Any) -> _Stepped:
            gradient = gradient.astype(jnp.float32)
            found = _means(gradient**2 + EPSILON, own)
            squares = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, squares, found)
            mean = squares
            if own.is_matrix:
                mean = squares.rows * squares.columns / squares.rows.mean(own.rows, keepdims=True)
            wanted = gradient * jax.lax.rsqrt(mean)
            size = jnp.sqrt((wanted**2).mean(own.rows + own.columns, keepdims=True))
            return _Stepped(wanted / jnp.maximum(1.0, size / CLIP), squares)

        updates, squares = parted(_Stepped, by_leaf(step, axes, gradients, state.squares))
        return updates, AdafactorState(steps, squares)

    return optax.GradientTransformation(init, update)


def _means(squares: jax.Array, own: MatrixAxes) -> Factors | jax.Array:
    if not own.is_matrix:
        return squares
    return Factors(squares.mean(own.columns, keepdims=True), squares.mean(own.rows, keepdims=True))
