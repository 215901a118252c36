"""The key-value cache: one K and one V for each cross-layer group, whatever the number of its layers.

With `precision.cache` "int8" or "fp8" each token's head is kept in 8 bits with a scale of its own, its largest
magnitude / 127 or 448 in bfloat16 (2 bytes for H values), and widened where attention reads it. A token is quantized by
itself when it comes, so what is kept of it depends on no other token, and no later one changes it. KIVI (arXiv
2402.02750 §3) finds keys to need scales by channel at 2 bits; at 8, scales by token serve both.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe.model.config import ModelConfig
from moe.ops.bits import as_bits, from_bits
from moe.ops.quantize import EIGHT_BITS, dequantize_rows, quantize_rows
from parallel.blocks import EightBit
from parallel.layout import SINGLE_DEVICE, Layout


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


class StackCache(NamedTuple):
    """Keys and values of B rows for S slots in each of a stack's G groups.

    Keys have RoPE and, with a norm after RoPE, its division, but no key-norm weight: that differs from layer to layer
    of a group and is folded into the queries (moe/model/attention.py). The release keeps one cache a layer instead.
    On CPU, bfloat16 is kept as its bits, so that a token is written in place (moe/ops/bits.py).
    """

    k_BGSMH: jax.Array
    v_BGSMH: jax.Array
    k_scales_BGSM: jax.Array | None = None
    v_scales_BGSM: jax.Array | None = None

    def kept(self, x_BTMH: jax.Array) -> Kept:
        """Keys or values in this cache's format."""
        dtype = self.k_BGSMH.dtype
        if self.k_scales_BGSM is None:
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
    def num_slots(self) -> int:
        """S."""
        return self.stacks[0].k_BGSMH.shape[2]

    @property
    def bytes_per_token(self) -> int:
        """Of one token of one row, over all groups and with scales, bytes."""
        return sum(x.nbytes // (x.shape[0] * x.shape[2]) for x in jax.tree.leaves(self))


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

        def write(cache_GS: jax.Array, new_T: jax.Array, start: jax.Array) -> jax.Array:
            first = (self.group, start) + (0,) * (new_T.ndim - 1)
            return jax.lax.dynamic_update_slice(cache_GS, new_T[None], first)

        k, v = (self.cache.kept(x_BTMH) for x_BTMH in (k_BTMH, v_BTMH))
        new = StackCache(k.values_BTMH, v.values_BTMH, k.scales_BTM, v.scales_BTM)
        cache: StackCache = jax.tree.map(lambda old, new: jax.vmap(write)(old, new, start_B), self.cache, new)
        own = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, self.group, 1, keepdims=False), cache)
        k_BSMH = Kept(own.k_BGSMH, own.k_scales_BGSM).widened(k_BTMH.dtype)
        v_BSMH = Kept(own.v_BGSMH, own.v_scales_BGSM).widened(v_BTMH.dtype)
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
        shape = (batch, groups, num_slots, config.num_kv_heads)
        keys, values = (as_bits(jnp.zeros((*shape, config.head_dim), values_dtype)) for _ in range(2))
        scales = [None, None] if format is None else [as_bits(jnp.ones(shape, jnp.bfloat16)) for _ in range(2)]
        return StackCache(keys, values, *scales)

    cache = KVCache(tuple(of_stack(groups) for _, groups in config.layer_groups(unrolled=unrolled)))
    return placed_cache(cache, layout.constrain)


def placed_cache(cache: KVCache, place: Callable[[jax.Array, str], Any]) -> Any:
    """`place` of each array, with the letters of its axes: scales lie where their values do."""
    return jax.tree.map(lambda x: place(x, "BGSMH"[: x.ndim]), cache)
