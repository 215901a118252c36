"""How the parts of a weight are joined where they do not lie along its first axis."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec


def join_leading(
    weight: Array,
    place: int,
    sizes: Mapping[str, int],
    names: str | tuple[str, ...],
    used: PartitionSpec,
    constrain: Callable[[Array, PartitionSpec], Array],
) -> Array:
    """Gathers along an axis of the parts' own, which leads, and then moves it where it belongs.

    Parts arrive one behind the other. To join them along another axis XLA would have them in another order in memory,
    and to that end copy the whole stack of layers before the loop over them.

    Args:
        place: of the axis that the mesh axes `names` split. sizes: of the mesh axes.
        used: the sharding when gathered.
        constrain: states a sharding.
    """
    parts = math.prod(sizes[name] for name in ((names,) if isinstance(names, str) else names))
    before, width, after = weight.shape[:place], weight.shape[place], weight.shape[place + 1 :]
    leading_P = jnp.moveaxis(weight.reshape(*before, parts, width // parts, *after), place, 0)
    for split in (names, None):
        leading_P = constrain(leading_P, PartitionSpec(split, *used[:place], None, *used[place + 1 :]))
    return jnp.moveaxis(leading_P, 0, place).reshape(weight.shape)


def with_gradient(rearrange: Callable[[Array], Array], place: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """`rearrange`, which changes where x lies and no value of it, with x's gradient laid where `place` says.

    Of a gradient that is stated whole and then in parts XLA makes one scatter; as the transpose of `join_leading` it
    would sum it whole: twice the bytes.
    """
    rearranged = jax.custom_vjp(rearrange)
    rearranged.defvjp(lambda x: (rearrange(x), None), lambda _, dx: (place(dx),))
    return rearranged
