"""Gradients that the backward pass puts into the hosts' memory layer by layer, so that the devices never hold them all.

JAX gives a gradient the memory of what it is the gradient of. So each weight gets a landing: an array on the host that
no product reads, and whose gradient is the weight's.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from parallel.layout import Layout


def land(weights: nnx.State, landing: dict[str, Any], layout: Layout) -> nnx.State:
    """A layer's weights as they are, whose gradients become those of `landing`, in its formats.

    Args:
        landing: arrays on the host, as nested dicts with the weights' names.
    """
    params, treedef = jax.tree.flatten(weights, is_leaf=lambda x: isinstance(x, nnx.Variable))
    landed = [
        param.replace(_land(layout, param.get_metadata("axes"), where.dtype, param[...], where))
        for param, where in zip(params, jax.tree.leaves(landing), strict=True)
    ]
    return jax.tree.unflatten(treedef, landed)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _land(layout: Layout, axes: str, dtype: jnp.dtype, weight: jax.Array, landing: jax.Array) -> jax.Array:
    return weight


def _forward(layout, axes, dtype, weight, landing):
    return weight, None


def _backward(layout, axes, dtype, _, gradient):
    summed = layout.constrain_gradient(gradient.astype(dtype), axes)
    return jnp.zeros_like(gradient), jax.device_put(summed, jax.memory.Space.Host)


_land.defvjp(_forward, _backward)
