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
    stacks = _experts_of(weights)
    return jax.lax.stop_gradient(stacks), _with_experts(weights, [_landing(stack) for stack in stacks])


def put_back(weights: nnx.State, stacks: list[Any], place: jax.Array) -> nnx.State:
    """One turn's weights, the matrices of the stacks among them.

    Args:
        place: i32[], the turn.
    """
    if not stacks:
        return weights
    in_place = [InStack(stack, place, where) for stack, where in zip(stacks, _experts_of(weights), strict=True)]
    return _with_experts(weights, in_place)


def _experts_of(weights: nnx.State) -> list[Any]:
    return [param.get_value() for param in jax.tree.leaves(weights, is_leaf=_is_param) if _is_experts(param)]


def _with_experts(weights: nnx.State, values: list[Any]) -> nnx.State:
    """The weights with these in place of the experts', in the order of `_experts_of`."""
    given = iter(values)
    return jax.tree.map(lambda p: p.replace(next(given)) if _is_experts(p) else p, weights, is_leaf=_is_param)


def _landing(stack: Any) -> jax.Array | None:
    return None if isinstance(stack, QuantizedWeight) else landing(stack)


def _is_param(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _is_experts(param: nnx.Variable) -> bool:
    return param.get_metadata("kind") == "expert"
