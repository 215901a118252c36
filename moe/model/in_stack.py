"""Experts' matrices that a loop over layers leaves in their stack (moe/ops/grouped_matmul/in_stack.py)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe.model.block import Group
from moe.model.moe_layer import MoELayer
from moe.ops.grouped_matmul.in_stack import InStack
from moe.ops.quantize import QuantizedWeight
from parallel.layout import Layout


class Stacks(NamedTuple):
    """matrices: of all layers, one stack for each of the experts' products. landings: what goes through the loop for
    their gradients; None for those that get none."""

    matrices: list[Any]
    landings: list[jax.Array | None]


def taken_out(stack: Group, weights: nnx.State, layout: Layout, *, trained: bool) -> tuple[Stacks, nnx.State]:
    """The stacked matrices that the loop's turns are to read in place, and the weights without them.

    Args:
        stack: of groups of layers. weights: its parameters. trained: whether these get gradients.
    """
    layers = [block.feed_forward for block in stack.blocks if isinstance(block.feed_forward, MoELayer)]
    if not layers or not all(layer.reads_stacks(layout) for layer in layers):
        return Stacks([], []), weights
    matrices = _experts_of(weights)
    # Nothing reads these values, so none are made. On CPU XLA updates no bfloat16 in place (moe/ops/bits.py).
    landings = [w.astype(jnp.float32) if trained and not isinstance(w, QuantizedWeight) else None for w in matrices]
    return Stacks(jax.lax.stop_gradient(matrices), landings), _with_experts(weights, [None] * len(matrices))


def put_back(weights: nnx.State, stacks: Stacks, place: jax.Array) -> nnx.State:
    """One turn's weights, the matrices of the stacks among them.

    Args:
        place: i32[], the turn.
    """
    if not stacks.matrices:
        return weights
    return _with_experts(weights, [InStack(w, place, where) for w, where in zip(*stacks, strict=True)])


def landings_after(group: Group) -> list[jax.Array | None]:
    """The landings for the next turn, after a group has read its matrices."""
    return [w.landing_LEDF for w in _experts_of(nnx.state(group, nnx.Param)) if isinstance(w, InStack)]


def _experts_of(weights: nnx.State) -> list[Any]:
    return [param.get_value() for param in jax.tree.leaves(weights, is_leaf=_is_param) if _is_experts(param)]


def _with_experts(weights: nnx.State, values: list[Any]) -> nnx.State:
    """The weights with these in place of the experts', in the order of `_experts_of`."""
    given = iter(values)
    return jax.tree.map(lambda p: p.replace(next(given)) if _is_experts(p) else p, weights, is_leaf=_is_param)


def _is_param(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _is_experts(param: nnx.Variable) -> bool:
    return param.get_metadata("kind") == "expert"
