"""Products of activations with weights: in the compute format, or in 8 bits (moe/ops/scaled).

A product may have a history: the largest magnitudes of what went into it, f32[3, H], of the activation, the weight and
the gradient of the result, newest first. With delayed scaling its scales come from these. A history's gradient is no
derivative: it is the next history, which the backward pass knows.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from moe.model.parameter import as_kept, used
from moe.model.precision import Precision
from moe.ops.matmul import PRODUCT, weight_einsum
from moe.ops.scaled import Recipe, Split, frozen_einsum, new_history, scaled_einsum
from moe.ops.scaled.history import DY
from moe.ops.scaled.quantize import ALL, largest_magnitude
from parallel.layout import Layout


class MagnitudeHistory(nnx.Variable):
    """f32[3, H], of one product; see above."""


class Products(nnx.Module):
    """The products of one part of a layer with its weights, by name."""

    def __init__(self, precision: Precision, names: tuple[str, ...], *, largest_gradient: float = 0.0) -> None:
        """
        Args:
            largest_gradient: the largest magnitude of the results' gradients, where it is known before the first step.
        """
        self.names = names
        self.dtype, self.recipe = precision.compute_dtype, precision.recipe
        self.quantizes_rows = precision.activations is not None
        self.histories: nnx.Dict = nnx.Dict()
        if precision.delayed:
            for name in names:
                self.histories[name] = MagnitudeHistory(new_history().at[DY, 0].set(largest_gradient))

    def __call__(self, name: str, spec: str, x: jax.Array, weight: nnx.Param, layout: Layout) -> jax.Array:
        """The einsum of x, in the compute format, and a weight. x: [B, T, ...]."""
        if self.keeps_weights(x.shape[1]):
            return frozen_einsum(spec, x, as_kept(weight, layout))
        w = used(weight, self.dtype, layout)
        return product(spec, x, w, self.recipe, self.history(name), local=layout.mesh is None)

    def keeps_weights(self, length: int) -> bool:
        """Whether texts of T tokens are multiplied with quantized matrices as these are."""
        return self.quantizes_rows and length > 1

    def watch(self, stack: tuple[int, ...]) -> None:
        """Gives each product a history, of one step where it has none.

        Args:
            stack: the axis of stacked layers, where they are.
        """
        for name in self.names:
            if name not in self.histories:
                self.histories[name] = MagnitudeHistory(jnp.zeros((*stack, 3, 1), jnp.float32))

    def history(self, name: str) -> jax.Array | None:
        return self.histories[name][...] if name in self.histories else None


def product(
    spec: str,
    x: jax.Array,
    w: jax.Array,
    recipe: Recipe | None,
    history: jax.Array | None,
    split: Split = (),
    *,
    local: bool = True,
) -> jax.Array:
    """The einsum of an activation and a weight, in x's format.

    Args:
        split: inside `jax.shard_map`, by which mesh axes each axis is split.
        local: whether each array is whole on one device, or the code runs inside `jax.shard_map`.
    """
    if recipe is None:
        return recorded(weight_einsum(spec, x, w, local=local), x, w, history)
    if recipe.scaling == "delayed":
        y = scaled_einsum(spec, x, w, recipe, history, split=split)
    else:
        y = recorded(scaled_einsum(spec, x, w, recipe, split=split), x, w, history)
    return checkpoint_name(y, PRODUCT)


def recorded(
    y: jax.Array, x: jax.Array, w: jax.Array, history: jax.Array | None, owned: jax.Array | bool = True
) -> jax.Array:
    """y, the product of x and w, whose largest magnitudes go into the history, where there is one.

    Args:
        owned: bool, which rows of x and y count.
    """
    if history is None:
        return y
    return _recorded(y, jax.lax.stop_gradient((largest(jnp.where(owned, x, 0)), largest(w))), history, owned)


@jax.custom_vjp
def _recorded(y, of_operands, history, owned):
    return y


def _forward(y, of_operands, history, owned):
    return y, (of_operands, history, owned)


def _backward(saved, dy):
    of_operands, history, owned = saved
    newest = jnp.stack([*of_operands, largest(jnp.where(owned, dy, 0))])[:, None]
    return dy, None, jnp.concatenate([newest, history[:, :-1]], axis=1), None


_recorded.defvjp(_forward, _backward)


def split_of(axes: str, spec: PartitionSpec) -> Split:
    """What `spec` says of an array with these axes."""
    names = ((names,) if isinstance(names, str) else tuple(names or ()) for names in spec)
    return tuple((axis, each) for axis, each in zip(axes, names, strict=False) if each)


def largest(x: jax.Array) -> jax.Array:
    """The largest magnitude, f32[]; infinity where one is not finite."""
    return largest_magnitude(x, (ALL,) * x.ndim).reshape(())


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def spread(history: jax.Array, times: int) -> jax.Array:
    """A history for each of several parts of a product, [times, 3, H]; it takes their largest magnitudes."""
    return jnp.broadcast_to(history, (times, *history.shape))


spread.defvjp(lambda history, times: (spread(history, times), None), lambda times, _, following: (following.max(0),))
