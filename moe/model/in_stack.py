"""Experts' matrices that a loop over layers leaves in their stack (moe/ops/grouped_matmul/in_stack.py)."""

from typing import Any

import jax
from flax import nnx

from moe.model.block import Group
from moe.model.moe_layer import MoELayer
from moe.ops.grouped_matmul.in_stack import InStack, landing
from moe.ops.quantize import QuantizedWeight
from parallel.layout import Layout


def taken_out(stack: Group, weights: nnx.State, layout: Layout) -> tuple[list[Any], nnx.State]:
    """The stacked matrices that the loop's turns are to read in place, and the weights with landings instead of them.

    Args:
        stack: of groups of layers. weights: its parameters.
    """
    layers = [block.feed_forward for block in stack.blocks if isinstance(block.feed_forward, MoELayer)]
    if not layers or not all(layer.reads_stacks(layout) for layer in layers):
        return [], weights
    params, treedef = jax.tree.flatten(weights, is_leaf=_is_param)
    stacks = [jax.lax.stop_gradient(param.get_value()) for param in params if _is_experts(param)]
    left = [param.replace(_landing(param.get_value())) if _is_experts(param) else param for param in params]
    return stacks, jax.tree.unflatten(treedef, left)


def put_back(weights: nnx.State, stacks: list[Any], place: jax.Array) -> nnx.State:
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
        [
            param.replace(InStack(next(found), place, param.get_value())) if _is_experts(param) else param
            for param in params
        ],
    )


def _landing(stack: Any) -> jax.Array | None:
    return None if isinstance(stack, QuantizedWeight) else landing(stack)


def _is_param(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _is_experts(param: nnx.Variable) -> bool:
    return param.get_metadata("kind") == "expert"
