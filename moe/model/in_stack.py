"""Experts' matrices that a loop over layers leaves in their stack (moe/ops/grouped_matmul/in_stack.py)."""

from typing import Any

import jax
from flax import nnx

from moe.model.block import Group
from moe.model.moe_layer import MoELayer
from moe.ops.grouped_matmul.in_stack import InStack, landing
from parallel.layout import Layout


def taken_out(stack: Group, weights: nnx.State, layout: Layout) -> tuple[list[jax.Array], nnx.State]:
    """The stacked matrices that the loop's turns are to read in place, and the weights with landings instead of them.

    Args:
        stack: of groups of layers. weights: its parameters.
    """
    layers = [block.feed_forward for block in stack.blocks if isinstance(block.feed_forward, MoELayer)]
    if not layers or not all(layer.reads_stacks(layout) for layer in layers):
        return [], weights
    params, treedef = jax.tree.flatten(weights, is_leaf=_is_param)
    stacks = [jax.lax.stop_gradient(param[...]) for param in params if _is_experts(param)]
    landings = [param.replace(landing(param[...])) if _is_experts(param) else param for param in params]
    return stacks, jax.tree.unflatten(treedef, landings)


def put_back(weights: nnx.State, stacks: list[jax.Array], place: jax.Array) -> nnx.State:
    """One turn's weights, the matrices of the stacks among them.

    Args:
        place: i32[], the turn.
    """
    if not stacks:
        return weights
    params, treedef = jax.tree.flatten(weights, is_leaf=_is_param)
    found = iter(stacks)
    return jax.tree.unflatten(
        treedef,
        [param.replace(InStack(next(found), place, param[...])) if _is_experts(param) else param for param in params],
    )


def _is_param(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _is_experts(param: nnx.Variable) -> bool:
    return param.get_metadata("kind") == "expert"
