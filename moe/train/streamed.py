"""Gradients put to the hosts, and the optimizer's update, layer by layer: of what waits on their hosts the devices hold
one layer at a time.

Of each stack of layers a loop fetches one group's gradients and optimizer states, updates them together with the
group's parameters, and writes all back in place. What is not stacked is updated at once.
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
from moe.train.parts import (
    STACKS,
    among_masked,
    fetched,
    in_trees,
    joined,
    layer_of,
    part_of,
    repeat_of,
    to_host,
    with_layer,
)
from moe.train.state import Blueprint
from parallel.layout import LayoutConfig


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
    blueprint: Blueprint, objective: Callable, params: dict[str, Any], histories: dict[str, Any], given: tuple
) -> tuple[tuple[dict[str, Any], dict[str, Any]], Any]:
    """((gradients, the next histories), what the objective tells besides): gradients of the stacks on the host.

    Args:
        objective: of the parameters, the histories, what the stacks' gradients land in, and of `given`.
    """
    accumulated = jnp.dtype(blueprint.precision.gradients)
    stacks = params[STACKS]
    landing = jax.tree.map(lambda p: jnp.zeros(p.shape, accumulated), stacks)

    def of(rest: dict[str, Any], histories: dict[str, Any], landing: dict[int, Any]) -> Any:
        return objective(rest | {STACKS: stacks}, histories, landing, *given)

    take = jax.grad(of, argnums=(0, 1, 2), has_aux=True)
    (rest, following, landed), told = take(part_of(None, params), histories, to_host(landing))

    def summed(spec: ParameterSpec, gradient: jax.Array) -> jax.Array:
        return blueprint.layout.constrain_gradient(gradient.astype(accumulated), spec.axes)

    rest = jax.tree.map(summed, part_of(None, blueprint.specs), rest, is_leaf=is_spec)
    return (rest | {STACKS: landed}, following), told


def streamed_norm(gradients: dict[str, Any]) -> jax.Array:
    """The global norm of gradients, wherever they wait. f32[]"""
    squares = global_norm(fetched(part_of(None, gradients))) ** 2
    for stack in gradients[STACKS].values():

        def add(place: jax.Array, squares: jax.Array, stack: Any = stack) -> jax.Array:
            return squares + global_norm(fetched(layer_of(place, stack))) ** 2

        squares = jax.lax.fori_loop(0, repeat_of(stack), add, squares)
    return jnp.sqrt(squares)


def streamed_update(
    blueprint: Blueprint,
    gradients: dict[str, Any],
    told: dict[str, jax.Array],
    opt_state: optax.OptState,
    params: dict[str, Any],
) -> tuple[optax.OptState, dict[str, Any]]:
    """The optimizer's states and the parameters after a step, stacks where they were and the rest on the devices.

    Args:
        told: to the optimizer besides the gradients, such as the norm of all of them.
    """
    everything = (gradients, opt_state, params)
    after = _update(blueprint, told, None, *in_trees(partial(part_of, None), everything))
    stacks = {}
    for number in params[STACKS]:
        grads, *begin = in_trees(partial(part_of, number), everything)

        def one(place: jax.Array, carry: Any, number: Any = number, grads: Any = grads) -> Any:
            taken = in_trees(partial(layer_of, place), (grads, *carry))
            opt_state, params = _update(blueprint, told | {"layer": place}, number, *taken)
            if blueprint.layout.config.optimizer_states == "host":
                opt_state = in_trees(to_host, opt_state)
            return in_trees(partial(with_layer, place), carry, (opt_state, params))

        stacks[number] = jax.lax.fori_loop(0, repeat_of(grads), one, tuple(begin))
    return joined(after, stacks)


def _update(
    blueprint: Blueprint,
    told: dict[str, jax.Array],
    number: Any,
    gradients: Any,
    opt_state: optax.OptState,
    params: Any,
) -> tuple[optax.OptState, Any]:
    """Of one part as `part_of` gives it, on the devices. For Optax the other parts are masked out."""
    specs = part_of(number, blueprint.specs)

    def shared_out(tree: Any) -> Any:
        place = blueprint.layout.shard
        return jax.tree.map(lambda spec, x: place(x, spec.axes.removeprefix("L")), specs, tree, is_leaf=is_spec)

    gradients, params = shared_out(fetched(gradients)), shared_out(params)
    gradients, opt_state, params = in_trees(
        partial(among_masked, number, blueprint.specs), (gradients, fetched(opt_state), params)
    )
    update = optax.with_extra_args_support(blueprint.optimizer).update
    updates, opt_state = update(gradients, opt_state, params, **told)
    return in_trees(partial(part_of, number), (opt_state, optax.apply_updates(params, updates)))
