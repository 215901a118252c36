"""The key-value cache: one K and one V for each cross-layer group, whatever the number of its layers.

With `precision.cache` "int8" or "fp8" each token's head is kept in 8 bits with a scale of its own, its largest
magnitude / 127 or 448 in bfloat16 (2 bytes for H values), and widened where attention reads it. A token is quantized by
itself when it comes, so what is kept of it depends on no other token, and no later one changes it. KIVI (arXiv
2402.02750 §3) finds keys to need scales by channel at 2 bits; at 8, scales by token serve both.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe.model.config import ModelConfig
from moe.ops.bits import as_bits, from_bits
from moe.ops.quantize import EIGHT_BITS, dequantize_rows, quantize_rows
from parallel.blocks import EightBit
from parallel.layout import SINGLE_DEVICE, Layout
from parallel.platform import platform


class Kept(NamedTuple):
    """Keys or values as the cache keeps them. scales_BTM: bf16; None where the values are wide."""

    values_BTMH: jax.Array
    scales_BTM: jax.Array | None

    def widened(self, dtype: DTypeLike) -> jax.Array:
        """x_BTMH in the compute format."""
        values_BTMH = from_bits(self.values_BTMH, jnp.bfloat16)
        if self.scales_BTM is None:
            return values_BTMH.astype(dtype)
        return dequantize_rows(values_BTMH, from_bits(self.scales_BTM, jnp.bfloat16), dtype)


def cache_axes() -> str:
    """Of keys and values as they are kept. XLA's products on CPU take a head's slots together, and would have a whole
    text turned around for each token; cuDNN takes a slot's heads together."""
    return "BMGSH" if platform() == "cpu" else "BGSMH"


def _heads_first() -> bool:
    return cache_axes().index("M") < cache_axes().index("S")


def _turned(x_BTMH: jax.Array) -> jax.Array:
    """Of one group, in the cache's order; and back again."""
    return x_BTMH.swapaxes(1, 2) if _heads_first() else x_BTMH


class StackCache(NamedTuple):
    """Keys and values of B rows for S slots in each of a stack's G groups, in the order of `cache_axes`; scales without
    the last axis.

    Keys have RoPE and, with a norm after RoPE, its division, but no key-norm weight: that differs from layer to layer
    of a group and is folded into the queries (moe/model/attention.py). The release keeps one cache a layer instead.
    On CPU, bfloat16 is kept as its bits, so that a token is written in place (moe/ops/bits.py).
    """

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None

    def kept(self, x_BTMH: jax.Array) -> Kept:
        """Keys or values in this cache's format."""
        dtype = self.keys.dtype
        if self.key_scales is None:
            return Kept(as_bits(x_BTMH.astype(jnp.bfloat16 if dtype == jnp.uint16 else dtype)), None)
        values_BTMH, scales_BTM = quantize_rows(x_BTMH, "int8" if dtype == jnp.int8 else "fp8", jnp.bfloat16)
        return Kept(values_BTMH, as_bits(scales_BTM))

    def group(self, index: jax.Array) -> "GroupCache":
        """The view through which one group reads and writes."""
        return GroupCache(self, index)


class KVCache(NamedTuple):
    """Keys and values of all layers, as their stacks stand in the model (moe/model/transformer.py)."""

    stacks: tuple[StackCache, ...]

    @property
    def num_rows(self) -> int:
        """B."""
        return self.stacks[0].keys.shape[0]

    @property
    def num_slots(self) -> int:
        """S."""
        return self.stacks[0].keys.shape[cache_axes().index("S")]

    @property
    def bytes_per_token(self) -> int:
        """Of one token of one row, over all groups and with scales, bytes."""
        return sum(x.nbytes // (self.num_rows * self.num_slots) for x in jax.tree.leaves(self))

    def with_rows(self, new: "KVCache", places_B: jax.Array) -> "KVCache":
        """With row b of another cache in place of the row places_B[b], from the first slot on; with a place beyond the
        last row, nowhere."""
        where = (places_B, *[slice(None)] * (cache_axes().index("S") - 1), slice(new.num_slots))
        return jax.tree.map(lambda old, new: old.at[where].set(new, mode="drop"), self, new)


class GroupCache(NamedTuple):
    """One group's part of its stack's cache, which is passed along so that it is written in place."""

    cache: StackCache
    group: jax.Array

    def append(
        self, k_BTMH: jax.Array, v_BTMH: jax.Array, start_B: jax.Array
    ) -> tuple[jax.Array, jax.Array, "GroupCache"]:
        """Writes the keys and values of T new tokens from slot start_B on.

        Returns:
            k_BSMH and v_BSMH of the group, old and new, in the format of the new ones; and the cache.
        """

        def write(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
            first: Any = (self.group, start, *[0] * (new.ndim - 1))
            return jax.lax.dynamic_update_slice(old, new[None], first)

        def write_heads(old: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
            # With a start of its own for each: of one slice XLA makes two updates, one for those who read it.
            return jax.vmap(write)(old, new, jnp.broadcast_to(start, len(new)))

        write_row = jax.vmap(write_heads if _heads_first() else write)
        k, v = (self.cache.kept(x_BTMH) for x_BTMH in (k_BTMH, v_BTMH))
        new = jax.tree.map(_turned, StackCache(k.values_BTMH, v.values_BTMH, k.scales_BTM, v.scales_BTM))
        cache: StackCache = jax.tree.map(lambda old, new: write_row(old, new, start_B), self.cache, new)
        read = partial(jax.lax.dynamic_index_in_dim, index=self.group, axis=cache_axes().index("G"), keepdims=False)
        own = jax.tree.map(lambda x: _turned(read(x)), cache)
        k_BSMH = Kept(own.keys, own.key_scales).widened(k_BTMH.dtype)
        v_BSMH = Kept(own.values, own.value_scales).widened(v_BTMH.dtype)
        return k_BSMH, v_BSMH, GroupCache(cache, self.group)


def empty_cache(
    config: ModelConfig,
    batch: int,
    num_slots: int,
    dtype: DTypeLike,
    layout: Layout = SINGLE_DEVICE,
    format: EightBit | None = None,
    unrolled: bool = False,
) -> KVCache:
    """A cache of zeros.

    Args:
        batch: B, rows; split over the mesh as a batch is.
        num_slots: S, tokens that a row can hold.
        dtype: of keys and values, usually the compute format.
        format: in which they are kept instead, with scales; None for none.
        unrolled: whether the model is.
    """
    values_dtype = dtype if format is None else EIGHT_BITS[format].dtype

    def of_stack(groups: int) -> StackCache:
        sizes = {"B": batch, "G": groups, "S": num_slots, "M": config.num_kv_heads}
        shape = [sizes[axis] for axis in cache_axes()[:-1]]
        keys, values = (as_bits(jnp.zeros((*shape, config.head_dim), values_dtype)) for _ in range(2))
        scales = [None, None] if format is None else [as_bits(jnp.ones(shape, jnp.bfloat16)) for _ in range(2)]
        return StackCache(keys, values, *scales)

    cache = KVCache(tuple(of_stack(groups) for _, groups in config.layer_groups(unrolled=unrolled)))
    return placed_cache(cache, layout.constrain)


def placed_cache(cache: KVCache, place: Callable[[jax.Array, str], Any]) -> Any:
    """`place` of each array, with the letters of its axes: scales lie where their values do."""
    return jax.tree.map(lambda x: place(x, cache_axes()[: x.ndim]), cache)
