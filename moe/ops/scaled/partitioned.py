"""Dense products in 8 bits for NVIDIA GPUs, where XLA has no right kernel: the grouped one with one group.

XLA cannot split a kernel's call over a mesh by itself: it is told here which axis of an array is which letter of the
einsum. Where what is summed over is split, each device sums its part, and the parts are summed in float32.
"""

import math
from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from moe.ops.scaled.quantize import BLOCK, Scaled, scaled_along_the_sum, spread
from moe.ops.scaled.triton import rows_kernel


def kernel_einsum(spec: str, a: Scaled, b: Scaled, *, interpret: bool = False) -> jax.Array:
    """f32: the einsum, whose operands may have a scale for each BLOCK along the last axis that is summed over.

    Raises:
        ValueError: with such scales that axis is neither a multiple of BLOCK nor a smaller one of 32; without them the
            numbers that are summed are no multiple of 32; or the operands are summed over in different orders.
    """
    left, right, out = letters = tuple(spec.replace("->", ",").split(","))
    summed, others = ([axis for axis in own if axis not in out] for own in (left, right))
    sizes = [a.values.shape[left.index(axis)] for axis in summed]
    blocks = scaled_along_the_sum(a, left, out) or scaled_along_the_sum(b, right, out)
    if summed != others or (blocks and sizes[-1] % BLOCK and (sizes[-1] > BLOCK or sizes[-1] % 32)):
        raise ValueError(
            f'{spec}: scaling "block" on a GPU sums over the same axes in the same order in both operands, the last of '
            f'them a multiple of {BLOCK} or a smaller one of 32, not {sizes[-1]}: take "row"'
        )
    if math.prod(sizes) % 32:
        raise ValueError(
            f"{spec}: int8 on a GPU sums over a multiple of 32 numbers, not {math.prod(sizes)}: take fp8, or widths "
            "and sequences that divide by 32"
        )
    return _over_the_mesh(letters, interpret)(a.values, a.scales, b.values, b.scales)


@cache
def _over_the_mesh(letters: tuple[str, str, str], interpret: bool) -> Callable[..., jax.Array]:
    """f32: the product of values and scales of a and of b."""
    a, b, out = letters

    @custom_partitioning
    def einsum(a_values, a_scales, b_values, b_scales):
        return _on_one_device(letters, Scaled(a_values, a_scales), Scaled(b_values, b_scales), interpret)

    def partition(mesh, arguments, result):
        axes = _axes_of_letters(letters, arguments, result)
        summed = tuple(name for letter in a if letter not in out for name in axes[letter])

        def on_each_device(*arrays):
            y = einsum.fun(*arrays)
            return jax.lax.psum(y, summed) if summed else y

        def sharding(own: str, shape: tuple[int, ...]) -> NamedSharding:
            whole = [size == 1 for size in shape]
            return NamedSharding(
                mesh, PartitionSpec(*(None if one else axes[x] or None for x, one in zip(own, whole, strict=True)))
            )

        given = tuple(sharding(own, x.shape) for own, x in zip((a, a, b, b), arguments, strict=True))
        return mesh, on_each_device, sharding(out, result.shape), given

    # A letter's blocks are an axis of their own to the partitioner: they are laid as `partition` says.
    blocks = [" ".join(f"{side}{i}" for i in range(len(own))) for side, own in (("x", a), ("w", b))]
    values = {own: " ".join(own) for own in letters}
    einsum.def_partition(
        partition=partition,
        sharding_rule=f"{values[a]}, {blocks[0]}, {values[b]}, {blocks[1]} -> {values[out]}",
        reduction_factors=tuple(letter for letter in a if letter not in out),
    )
    return einsum


def _axes_of_letters(letters: tuple[str, str, str], arguments, result) -> dict[str, tuple[str, ...]]:
    """The mesh axes that each letter is split over: those summed over as in a, the others as in the result, less what
    would use an axis twice or cut a block."""
    a, b, out = letters
    taken: set[str] = set()
    found: dict[str, tuple[str, ...]] = {}
    a_values, a_scales, b_values, b_scales = arguments
    order = [x for x in a if x not in out] + list(out)
    for letter in order:
        source, own = (a_values, a) if letter not in out else (result, out)
        spec = source.sharding.spec
        place = own.index(letter)
        names = spec[place] if place < len(spec) else None
        names = (names,) if isinstance(names, str) else tuple(names or ())
        parts = math.prod(source.sharding.mesh.shape[name] for name in names)
        whole = all(
            scales.shape[of.index(letter)] in (1, values.shape[of.index(letter)])
            or values.shape[of.index(letter)] % (parts * BLOCK) == 0
            for of, values, scales in ((a, a_values, a_scales), (b, b_values, b_scales))
            if letter in of
        )
        found[letter] = names if whole and not taken & set(names) else ()
        taken |= set(found[letter])
    return found


def _on_one_device(letters: tuple[str, str, str], a: Scaled, b: Scaled, interpret: bool) -> jax.Array:
    left, right, out = letters
    summed = [axis for axis in left if axis not in out]
    rows, columns = ([axis for axis in own if axis in out] for own in (left, right))
    x_MK, scales_MS = (_flat(array, left, rows, summed) for array in (a.values, _kept_spread(a, left, out)))
    w_NK, scales_NS = (_flat(array, right, columns, summed) for array in (b.values, _kept_spread(b, right, out)))
    parts = max(scales_MS.shape[1], scales_NS.shape[1])
    scales_MS, scales_NS = (jnp.broadcast_to(s, (s.shape[0], parts)) for s in (scales_MS, scales_NS))
    y_MN = rows_kernel(
        x_MK, scales_MS, w_NK[None], scales_NS.T[None], jnp.full(1, len(x_MK), jnp.int32), 1, jnp.float32, interpret
    )
    sizes = dict(zip(left + right, a.values.shape + b.values.shape, strict=True))
    y = y_MN.reshape([sizes[axis] for axis in rows + columns])
    return y.transpose([(rows + columns).index(axis) for axis in out])


def _kept_spread(x: Scaled, own: str, out: str) -> jax.Array:
    """The scales, repeated along the axes that are kept, but not along those that are summed over."""
    sizes = zip(own, x.values.shape, x.scales.shape, strict=True)
    shape = tuple(size if axis in out else blocks for axis, size, blocks in sizes)
    return jnp.broadcast_to(spread(x.scales, shape), shape)


def _flat(x: jax.Array, own: str, rows: list[str], columns: list[str]) -> jax.Array:
    """[rows, columns]."""
    x = x.transpose([own.index(axis) for axis in rows + columns])
    return x.reshape(math.prod(x.shape[: len(rows)]), -1)
