"""Gradients put to the hosts, and the optimizer's update, layer by layer: of what waits on their hosts the devices hold
one layer at a time.

Of each stack of layers a loop fetches one group's gradients and optimizer states, updates them together with the
group's parameters, and writes all back in place. What is not stacked is updated at once.

Gradients, optimizer states and parameters are walked alike: trees like the parameters' are the only dicts in any of
them, and what else a state holds, such as a count of steps, belongs to all parts and is taken over once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe.model.config import ConfigError
from moe.model.parameter import ParameterSpec, is_spec
from moe.train.optimizer import global_norm
from moe.train.state import Blueprint
from parallel.layout import LayoutConfig

_STACKS = "stacks"
"""Of a tree like the parameters', the stacks of layers by number."""


def streams(layout: LayoutConfig, stages: int) -> bool:
    """Whether the update goes layer by layer. Layers that are shared out over stages are fetched together."""
    return stages == 1 and bool(layout.on_host)


def check_landing(layout: LayoutConfig, stages: int, microbatches: int) -> None:
    """
    Raises:
        ConfigError: layout.gradients="host" where the gradients of several microbatches are added up.
    """
    if layout.gradients == "host" and (stages > 1 or microbatches > 1):
        which = f"mesh.stage={stages}" if stages > 1 else f"training.microbatches={microbatches}"
        raise ConfigError(
            f"layout.gradients='host' with {which}: gradients that are added up over microbatches would go to the host "
            "and back each time; set layout.gradients='device', or use one stage and one microbatch"
        )


def landed_gradients(
    blueprint: Blueprint, objective: Callable, params: dict[str, Any], given: tuple
) -> tuple[dict[str, Any], Any]:
    """(gradients, what the objective tells besides): those of the stacks on the host.

    Args:
        objective: of the parameters, of what the stacks' gradients land in, and of `given`.
    """
    accumulated = jnp.dtype(blueprint.precision.gradients)
    stacks = params[_STACKS]
    landing = jax.tree.map(lambda p: jnp.zeros(p.shape, accumulated), stacks)

    def of(rest: dict[str, Any], landing: dict[int, Any]) -> Any:
        return objective(rest | {_STACKS: stacks}, landing, *given)

    take = jax.grad(of, argnums=(0, 1), has_aux=True)
    (rest, landed), told = take(_part(None, params), jax.device_put(landing, jax.memory.Space.Host))

    def summed(spec: ParameterSpec, gradient: jax.Array) -> jax.Array:
        return blueprint.layout.constrain_gradient(gradient.astype(accumulated), spec.axes)

    rest = jax.tree.map(summed, _part(None, blueprint.specs), rest, is_leaf=is_spec)
    return rest | {_STACKS: landed}, told


def streamed_norm(gradients: dict[str, Any]) -> jax.Array:
    """The global norm of gradients, wherever they wait. f32[]"""
    squares = global_norm(_fetched(_part(None, gradients))) ** 2
    for stack in gradients[_STACKS].values():

        def add(place: jax.Array, squares: jax.Array, stack: Any = stack) -> jax.Array:
            return squares + global_norm(_fetched(_layer(place, stack))) ** 2

        squares = jax.lax.fori_loop(0, _repeat(stack), add, squares)
    return jnp.sqrt(squares)


def streamed_update(
    blueprint: Blueprint, gradients: dict[str, Any], norm: jax.Array, opt_state: optax.OptState, params: dict[str, Any]
) -> tuple[optax.OptState, dict[str, Any]]:
    """The optimizer's states and the parameters after a step, stacks where they were and the rest on the devices.

    Args:
        norm: of all gradients.
    """
    everything = (gradients, opt_state, params)
    after = _update(blueprint, norm, None, *_in_trees(partial(_part, None), everything))
    stacks = {}
    for number in params[_STACKS]:
        grads, *begin = _in_trees(partial(_part, number), everything)

        def one(place: jax.Array, carry: Any, number: Any = number, grads: Any = grads) -> Any:
            taken = _in_trees(partial(_layer, place), (grads, *carry))
            opt_state, params = _update(blueprint, norm, number, *taken)
            if blueprint.layout.config.optimizer_states == "host":
                opt_state = _in_trees(partial(jax.device_put, device=jax.memory.Space.Host), opt_state)
            return _in_trees(partial(_with_layer, place), carry, (opt_state, params))

        stacks[number] = jax.lax.fori_loop(0, _repeat(grads), one, tuple(begin))
    return _in_trees(
        lambda rest, *each: rest | {_STACKS: dict(zip(stacks, each, strict=True))}, after, *stacks.values()
    )


def _update(
    blueprint: Blueprint, norm: jax.Array, number: Any, gradients: Any, opt_state: optax.OptState, params: Any
) -> tuple[optax.OptState, Any]:
    """Of one part as `_part` gives it, on the devices. For Optax the other parts are masked out."""
    specs = _part(number, blueprint.specs)

    def shared_out(tree: Any) -> Any:
        place = blueprint.layout.shard
        return jax.tree.map(lambda spec, x: place(x, spec.axes.removeprefix("L")), specs, tree, is_leaf=is_spec)

    masked = jax.tree.map(lambda _: optax.MaskedNode(), blueprint.specs, is_leaf=is_spec)
    gradients, params = shared_out(_fetched(gradients)), shared_out(params)
    gradients, opt_state, params = _in_trees(
        partial(_with_part, number, masked), (gradients, _fetched(opt_state), params)
    )
    updates, opt_state = optax.with_extra_args_support(blueprint.optimizer).update(
        gradients, opt_state, params, norm=norm
    )
    return _in_trees(partial(_part, number), (opt_state, optax.apply_updates(params, updates)))


def _in_trees(change: Callable, first: Any, *others: Any) -> Any:
    """`change` of every tree like the parameters' in `first`, with those that the others have in its place."""

    def changed(x: Any, *rest: Any) -> Any:
        return change(x, *rest) if isinstance(x, dict) else x

    return jax.tree.map(changed, first, *others, is_leaf=lambda x: isinstance(x, dict))


def _part(number: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """One stack, or with None all but the stacks."""
    return {name: x for name, x in tree.items() if name != _STACKS} if number is None else tree[_STACKS][number]


def _with_part(number: Any, tree: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    return tree | (part if number is None else {_STACKS: tree[_STACKS] | {number: part}})


def _repeat(stack: dict[str, Any]) -> int:
    return jax.tree.leaves(stack)[0].shape[0]


def _layer(place: jax.Array, stack: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, place, keepdims=False), stack)


def _with_layer(place: jax.Array, stack: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, place, 0), stack, layer)


def _fetched(tree: Any) -> Any:
    return jax.device_put(tree, jax.memory.Space.Device)
