"""Formats of the moments that an optimizer keeps for each parameter: float32, bfloat16, or eight bits with one scale
for a block of values (arXiv 2110.02861 §2.1).

| format | values | a block's largest magnitude is |
|---|---|---|
| int8 | an index into the dynamic map: 256 numbers from -1 to 1, or 0 to 1 where none is negative | 1 |
| fp8 | float8 e4m3 | 448 |

The dynamic map (arXiv 2110.02861 §1.3, bitsandbytes' create_dynamic_map) has seven decades, each with half the numbers
of the decade above. FP8-LM (arXiv 2310.18313 §2.2) keeps the first moment in fp8, and the second in 16 bits.

Of second moments the root is kept: squares of gradients two decades apart are four apart, and steps, which are divided
by the root, are as exact as it is. Where gradients of a block lie a decade apart (log-normal), the 60th step of Adam is
off by 0.24 (int8) and 0.14 (fp8) of its norm, and with the squares themselves by 0.48 and 0.60.

Which parameters have them: matrices of the layers (`EIGHT_BITS`), from 4096 values a layer on, as bitsandbytes'
min_8bit_size. All else is float32: norms and routers are small, and of the embedding and the head most rows have no
gradient in a step, for which bitsandbytes, too, keeps 32 bits (StableEmbedding, arXiv 2110.02861 §2.3).

Blocks lie so that no device has a part of one: at most 256 values, along those axes that no mesh axis splits and along
the eighth parts of those that `tensor` splits. Along D, over which FSDP shares parameters out, they are one value long.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe.model.parameter import QUANTIZED_KINDS, ParameterSpec
from moe.ops.quantize import group_size
from parallel.layout import TENSOR_LETTERS

States = Literal["float32", "bfloat16", "int8", "fp8"]

EIGHT_BITS = QUANTIZED_KINDS
LEAST = 4096
"""Values of a parameter in one layer, from which on it has moments in eight bits."""
BLOCK = 256
"""Values that share a scale, at most."""
TENSOR_PARTS = 8
"""Devices of `tensor`, at most, over which no block is split: those of a node."""

_DECADES = 7
_FP8 = jnp.finfo(jnp.float8_e4m3fn)


class Blocks(NamedTuple):
    """values: uint8 or float8, of the parameter's shape. scales: f32, one for each block."""

    values: jax.Array
    scales: jax.Array


@dataclass(frozen=True)
class MomentFormat:
    """Of one parameter's moments.

    block: for int8 and fp8, the length of a block along each of the parameter's last axes; along those in front of
        them it is one value long.
    """

    name: States
    block: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (self.name in ("int8", "fp8")) != bool(self.block):
            raise ValueError(f"moments in {self.name} with block={self.block}: int8 and fp8 have blocks, others none")

    @property
    def bytes(self) -> float:
        """Of one moment, with its part of a scale."""
        if self.block:
            return 1 + 4 / math.prod(self.block)
        return jnp.dtype(self.name).itemsize


def format_of(spec: ParameterSpec, states: States) -> MomentFormat:
    """The format of a parameter's moments, by the rules above; bfloat16 is for every matrix."""
    axes = spec.axes.removeprefix("L")
    sizes = spec.shape[-len(axes) :]
    if states == "bfloat16" and len(axes) > 1:
        return MomentFormat("bfloat16")
    if states in ("int8", "fp8") and spec.kind in EIGHT_BITS and len(axes) > 1 and math.prod(sizes) >= LEAST:
        return MomentFormat(states, block_of(axes, sizes))
    return MomentFormat("float32")


def block_of(axes: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """How long a block is along each axis of a matrix."""
    block, left = [], BLOCK
    for letter, size in zip(reversed(axes), reversed(sizes), strict=True):
        whole = 1 if letter in "DE" else size
        if letter in TENSOR_LETTERS:
            whole = size // math.gcd(size, TENSOR_PARTS)
        length = group_size(whole, left)
        left //= length
        block.append(length)
    return tuple(reversed(block))


def encoded(x: jax.Array, format: MomentFormat, *, signed: bool) -> jax.Array | Blocks:
    """Moments as they are kept: the nearest values that the format has.

    In eight bits no second moment above zero becomes zero, for steps are divided by its root.

    Args:
        x: f32, with the parameter's axes, L among them or not.
        signed: whether it is a first moment; none of the second is negative.
    """
    if not format.block:
        return x.astype(format.name)
    in_map = format.name == "int8"
    top, least = (1.0, dynamic_map(signed)[1]) if in_map else (float(_FP8.max), float(_FP8.smallest_subnormal))
    cut = _cut(x if signed else jnp.sqrt(x), format.block)
    largest = jnp.abs(cut).max(tuple(range(1, cut.ndim, 2)), keepdims=True)
    scales = jnp.where(largest == 0, 1.0, largest / top)
    scaled = jnp.clip(cut / scales, -top, top)
    if not signed:
        scaled = jnp.where(cut > 0, jnp.maximum(scaled, least), scaled)
    values = _indices(scaled, signed) if in_map else scaled.astype(_FP8.dtype)
    return Blocks(values.reshape(x.shape), scales.reshape(cut.shape[::2]))


def decoded(kept: jax.Array | Blocks, *, signed: bool) -> jax.Array:
    """f32, of the parameter's shape."""
    if not isinstance(kept, Blocks):
        return kept.astype(jnp.float32)
    values, scales = kept
    wide = _at_indices(values, signed) if values.dtype == jnp.uint8 else values.astype(jnp.float32)
    block = tuple(size // count for size, count in zip(values.shape, scales.shape, strict=True))
    cut = _cut(wide, block)
    found = (cut * scales.reshape([n for count in scales.shape for n in (count, 1)])).reshape(values.shape)
    return found if signed else found**2


@lru_cache(maxsize=2)
def dynamic_map(signed: bool) -> np.ndarray:
    """f32[256], ascending: of seven decades the middles of equal parts, and 0 and 1."""
    numbers = [0.0, 1.0]
    for decade in range(_DECADES):
        parts = 2**decade if signed else 2 ** (decade + 1)
        bounds = np.linspace(0.1, 1.0, parts + 1)
        middles = 10.0 ** (decade - _DECADES + 1) * (bounds[1:] + bounds[:-1]) / 2
        numbers += [*middles, *(-middles if signed else ())]
    return np.sort(np.array(numbers)).astype(np.float32)


def _decades(signed: bool) -> list[tuple[int, float, int]]:
    """Of each decade, smallest first: the place of its first number above zero, what to multiply a number by to have it
    between 0.1 and 1, and how many numbers there are."""
    first, found = int(np.searchsorted(dynamic_map(signed), 0.0)) + 1, []
    for decade in range(_DECADES):
        parts = 2**decade if signed else 2 ** (decade + 1)
        found.append((first, 10.0 ** (_DECADES - 1 - decade), parts))
        first += parts
    return found


def _indices(x: jax.Array, signed: bool) -> jax.Array:
    """The place in the dynamic map of the number nearest to each x. Decade by decade, for a search would look numbers
    up in memory: XLA fuses this with what surrounds it, and keeps nothing in between."""
    numbers, size = dynamic_map(signed), jnp.abs(x)
    zero = int(np.searchsorted(numbers, 0.0))
    place = jnp.full(x.shape, zero, jnp.int32)
    for first, factor, parts in _decades(signed):
        inside = jnp.clip(jnp.floor((size * factor - 0.1) * (parts / 0.9)), 0, parts - 1).astype(jnp.int32)
        place = jnp.where(size > (numbers[first - 1] + numbers[first]) / 2, first + inside, place)
    if signed:
        place = jnp.where(x < 0, 2 * zero - place, place)
    return jnp.where(x > (numbers[-2] + numbers[-1]) / 2, 255, place).astype(jnp.uint8)


def _at_indices(places: jax.Array, signed: bool) -> jax.Array:
    """The inverse: f32."""
    zero = int(np.searchsorted(dynamic_map(signed), 0.0))
    place = places.astype(jnp.int32)
    size, value = jnp.abs(place - zero) + zero, jnp.zeros(places.shape, jnp.float32)
    for first, factor, parts in _decades(signed):
        middle = (0.1 + 0.9 * ((size - first).astype(jnp.float32) + 0.5) / parts) / factor
        value = jnp.where(size >= first, middle, value)
    return jnp.where(place == 255, 1.0, jnp.where(place < zero, -value, value))


def all_zero(formats: Any, params: Any, signed: bool) -> Any:
    """Moments of a run's beginning, in a tree like the parameters'; not by `encoded`, which XLA would work out, slowly,
    while it compiles."""

    def zeros(format: MomentFormat, parameter: jax.Array) -> jax.Array | Blocks:
        shape = parameter.shape
        if not format.block:
            return jnp.zeros(shape, format.name)
        values = jnp.zeros(shape, _FP8.dtype)
        if format.name == "int8":
            values = jnp.full(shape, np.searchsorted(dynamic_map(signed), 0.0), jnp.uint8)
        return Blocks(values, jnp.ones(_blocks(shape, format.block)[0], jnp.float32))

    return by_leaf(zeros, formats, params)


def all_encoded(formats: Any, tree: Any, signed: bool) -> Any:
    """`encoded` of a tree of moments. formats: a MomentFormat for each part of it."""
    return by_leaf(lambda format, x: encoded(x, format, signed=signed), formats, tree)


def all_decoded(kept: Any, signed: bool) -> Any:
    """The inverse, but for rounding."""
    return jax.tree.map(lambda x: decoded(x, signed=signed), kept, is_leaf=lambda x: isinstance(x, Blocks))


def widened(tree: Any) -> Any:
    """In float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def by_leaf(change: Callable, about: Any, tree: Any, *others: Any) -> Any:
    """`change` of what is known of each array of `tree`, such as its format, of the array, and of what the other trees
    have in its place.

    Args:
        about: one leaf for each part of `tree`; parts that Optax has masked out stay so.
    """

    def of(known: Any, part: Any, *rest: Any) -> Any:
        return jax.tree.map(partial(change, known), part, *rest)

    return jax.tree.map(of, about, tree, *others)


def parted(kind: type[Any], tree: Any) -> tuple[Any, ...]:
    """A tree of NamedTuples of one kind as a tree for each of their fields."""

    def field(name: str) -> Any:
        return jax.tree.map(lambda each: getattr(each, name), tree, is_leaf=lambda x: isinstance(x, kind))

    return tuple(field(name) for name in kind._fields)


def _cut(x: jax.Array, block: tuple[int, ...]) -> jax.Array:
    """Each axis as (blocks, values of one)."""
    counts, lengths = _blocks(x.shape, block)
    return x.reshape([n for pair in zip(counts, lengths, strict=True) for n in pair])


def _blocks(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Along each axis, how many blocks there are and how long they are: 1 along those in front."""
    lengths = (1,) * (len(shape) - len(block)) + block
    return tuple(size // length for size, length in zip(shape, lengths, strict=True)), lengths
