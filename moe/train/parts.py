"""Trees like the parameters', taken apart: one stack of layers or all else, and of a stack one layer after the other.

Gradients, parameters and optimizer states are walked alike: trees like the parameters' are the only dicts in any of
them, and what else a state holds, such as a count of steps, belongs to all parts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax

from moe.model.parameter import is_spec

STACKS = "stacks"
"""Of a tree like the parameters', the stacks of layers by number."""


def in_trees(change: Callable, first: Any, *others: Any) -> Any:
    """`change` of every tree like the parameters' in `first`, with those that the others have in its place."""

    def changed(x: Any, *rest: Any) -> Any:
        return change(x, *rest) if isinstance(x, dict) else x

    return jax.tree.map(changed, first, *others, is_leaf=lambda x: isinstance(x, dict))


def part_of(number: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """One stack, or with None all but the stacks."""
    return {name: x for name, x in tree.items() if name != STACKS} if number is None else tree[STACKS][number]


def among_masked(number: Any, specs: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """A part in its place in the whole tree, whose rest is masked out: Optax passes over that."""
    masked = jax.tree.map(lambda _: optax.MaskedNode(), specs, is_leaf=is_spec)
    return masked | (part if number is None else {STACKS: masked[STACKS] | {number: part}})


def joined(rest: Any, stacks: dict[Any, Any]) -> Any:
    """The whole of what `part_of` took apart; what belongs to all parts is taken from the rest."""
    return in_trees(lambda rest, *each: rest | {STACKS: dict(zip(stacks, each, strict=True))}, rest, *stacks.values())


def repeat_of(stack: dict[str, Any]) -> int:
    return jax.tree.leaves(stack)[0].shape[0]


def layer_of(place: jax.Array, stack: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, place, keepdims=False), stack)


def with_layer(place: jax.Array, stack: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, place, 0), stack, layer)


def to_host(tree: Any) -> Any:
    """Inside `jax.jit`."""
    return jax.device_put(tree, jax.memory.Space.Host)


def fetched(tree: Any) -> Any:
    """Inside `jax.jit`: on the devices, wherever it waited."""
    return jax.device_put(tree, jax.memory.Space.Device)


def first_states(
    optimizer: optax.GradientTransformation, specs: dict[str, Any], params: dict[str, Any]
) -> optax.OptState:
    """`optimizer.init`, layer by layer into the hosts' memory; of what is not stacked, on the devices."""

    def begin(number: Any, part: dict[str, Any]) -> optax.OptState:
        return in_trees(partial(part_of, number), optimizer.init(among_masked(number, specs, part)))

    def one(number: Any, stack: dict[str, Any]) -> optax.OptState:
        return jax.lax.scan(lambda _, layer: (None, in_trees(to_host, begin(number, layer))), None, stack)[1]

    stacks = {number: one(number, stack) for number, stack in params[STACKS].items()}
    return joined(begin(None, part_of(None, params)), stacks)
