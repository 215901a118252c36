"""Updates of parameters that are stored in bfloat16, whose steps are too coarse for most of them: three ways to lose
nothing on average. Each wraps a transformation, which then sees gradients and parameters in float32.

| | bytes a parameter, besides its own 2 | source |
|---|---|---|
| float32 copies, of which the parameters are the rounded values | 4 | arXiv 1710.03740 §3.1 |
| Kahan's compensation: what rounding lost is added to the next update | 2 | arXiv 2010.06192 |
| stochastic rounding: up or down, by chance, so that the mean is right | 0 | arXiv 2010.06192 |
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe.train.optimizers.moments import widened

Rounding = Literal["nearest", "stochastic", "kahan"]


class MasterWeights(NamedTuple):
    """master: the parameters in float32. inner: states of the optimizer that updates them."""

    master: Any
    inner: optax.OptState


class Compensated(NamedTuple):
    """compensation: what the parameters have too much, in their format. inner: states of the optimizer."""

    compensation: Any
    inner: optax.OptState


def with_master_weights(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner` on float32 copies of the parameters; its updates are what leads the parameters to the copies, rounded."""
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> MasterWeights:
        master = widened(params)
        return MasterWeights(master, inner.init(master))

    def update(gradients: Any, state: MasterWeights, params: Any, **told: Any):
        updates, inner_state = inner.update(widened(gradients), state.inner, state.master, **told)
        master = optax.apply_updates(state.master, updates)
        rounded = jax.tree.map(lambda p, m: m.astype(p.dtype), params, master)
        return _leading_to(rounded, params), MasterWeights(master, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def with_kahan_compensation(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner`, whose updates are corrected by what rounding the parameters lost in the steps before."""
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Compensated:
        return Compensated(jax.tree.map(jnp.zeros_like, params), inner.init(params))

    def update(gradients: Any, state: Compensated, params: Any, **told: Any):
        wide = widened(params)
        updates, inner_state = inner.update(widened(gradients), state.inner, wide, **told)
        wanted = jax.tree.map(lambda u, c: u - c.astype(jnp.float32), updates, state.compensation)
        rounded = jax.tree.map(lambda p, wide, y: (wide + y).astype(p.dtype), params, wide, wanted)
        taken = _leading_to(rounded, params)
        compensation = jax.tree.map(lambda p, t, y: (t - y).astype(p.dtype), params, taken, wanted)
        return taken, Compensated(compensation, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def with_stochastic_rounding(
    inner: optax.GradientTransformation, stacked: Any
) -> optax.GradientTransformationExtraArgs:
    """`inner`, after whose updates the parameters are rounded by chance. Parameters are in bfloat16.

    Its `update` takes `key`, another one in each step; every parameter and every layer folds in its own number, so that
    the numbers drawn are the same on every mesh. It takes `layer`, i32[], where it is given one layer of each stack.

    Args:
        stacked: for each parameter, whether its first axis is that of the layers.
    """
    inner = optax.with_extra_args_support(inner)
    places, structure = jax.tree.flatten(stacked)
    numbers = jax.tree.unflatten(structure, range(len(places)))

    def update(gradients: Any, state: Any, params: Any, *, key: jax.Array, layer: jax.Array | None = None, **told: Any):
        wide = widened(params)
        updates, state = inner.update(widened(gradients), state, wide, **told)

        def rounded(number: int, in_layers: bool, wide: Any, updates: Any) -> Any:
            own = jax.random.fold_in(key, number)

            def one(w: jax.Array, u: jax.Array) -> jax.Array:
                return rounded_by_chance(w + u, _bits(own, w.shape, in_layers, layer))

            return jax.tree.map(one, wide, updates)

        return _leading_to(jax.tree.map(rounded, numbers, stacked, wide, updates), params), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def rounded_by_chance(x: jax.Array, bits: jax.Array) -> jax.Array:
    """One of the two nearest bfloat16 values, the nearer one more often: x on average.

    Args:
        x: f32. bits: u16, random, of the same shape.
    """
    lower = (jax.lax.bitcast_convert_type(x, jnp.uint32) + bits.astype(jnp.uint32)) & jnp.uint32(0xFFFF0000)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(lower, jnp.float32), x).astype(jnp.bfloat16)


def _bits(key: jax.Array, shape: tuple[int, ...], stacked: bool, layer: jax.Array | None) -> jax.Array:
    def of_layer(place: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.bits(jax.random.fold_in(key, place), shape, jnp.uint16)

    if not stacked:
        return jax.random.bits(key, shape, jnp.uint16)
    if layer is not None:
        return of_layer(layer, shape)
    return jax.vmap(lambda place: of_layer(place, shape[1:]))(jnp.arange(shape[0]))


def _leading_to(wanted: Any, params: Any) -> Any:
    """The updates by which Optax comes from the parameters to the wanted ones. f32"""

    def towards(w: jax.Array, p: jax.Array) -> jax.Array:
        return w.astype(jnp.float32) - p.astype(jnp.float32)

    return jax.tree.map(towards, wanted, params)
