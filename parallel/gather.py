"""How the parts of a weight are joined: in which order, and in which format they travel."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from parallel.blocks import Blocks, EightBit, block_size, element_of, from_blocks, to_blocks
from parallel.made_again import made_again


def join(
    weight: Array,
    place: int,
    sizes: Mapping[str, int],
    stored: PartitionSpec,
    used: PartitionSpec,
    constrain: Callable[[Array, PartitionSpec], Array],
) -> Array:
    """All of a weight, for use.

    Args:
        place: of the axis that is split at rest and not in use.
        sizes: of the mesh axes. stored, used: the shardings. constrain: states one.
    """
    # Said of what may just have been cast, or XLA may gather what it is cast from, as where it is computed again.
    weight = constrain(weight, stored)
    if place > 0 and (names := stored[place]):
        weight = _join_leading(weight, place, sizes, names, used, constrain)
    return constrain(weight, used)


def in_8_bits(weight: Array, place: int, parts: int, format: EightBit, join: Callable[[Array], Array]) -> Array:
    """`join`, with the weight in blocks of 8 bits (parallel/blocks.py), which lie inside the parts.

    Args:
        place: of the axis that is split, along which the blocks lie.
        parts: into which it is split.
    """
    block, element = block_size(weight.shape[place] // parts), element_of(format)
    blocks = Blocks(*map(join, to_blocks(weight, element, place, block)))
    return from_blocks(blocks, element, place, block).astype(weight.dtype)


def _join_leading(
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
    """`rearrange`, which changes where x lies and at most rounds its values, with x's gradient laid where `place` says.

    Of a gradient that is stated whole and then in parts XLA makes one scatter; as the transpose of `join` it
    would sum it whole: twice the bytes.
    """
    rearranged = jax.custom_vjp(rearrange)
    rearranged.defvjp(lambda x: (made_again(rearrange)(x), None), lambda _, dx: (place(dx),))
    return rearranged
