"""The key-value cache: one K and one V for each cross-layer group, whatever the number of its layers."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe.model.config import ModelConfig
from parallel.layout import SINGLE_DEVICE, Layout


class GroupCache(NamedTuple):
    """One group's part of the whole cache, which is passed along so that it is written in place."""

    k_BGSMH: jax.Array
    v_BGSMH: jax.Array
    group: jax.Array

    def append(
        self, k_BTMH: jax.Array, v_BTMH: jax.Array, start_B: jax.Array
    ) -> tuple[jax.Array, jax.Array, "GroupCache"]:
        """Writes the keys and values of T new tokens from slot start_B on.

        Returns:
            k_BSMH and v_BSMH of the group, old and new, and the cache.
        """

        def write(cache_GSMH: jax.Array, new_TMH: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(cache_GSMH, new_TMH[None], (self.group, start, 0, 0))

        k_BGSMH = jax.vmap(write)(self.k_BGSMH, k_BTMH.astype(self.k_BGSMH.dtype), start_B)
        v_BGSMH = jax.vmap(write)(self.v_BGSMH, v_BTMH.astype(self.v_BGSMH.dtype), start_B)
        k_BSMH, v_BSMH = (jax.lax.dynamic_index_in_dim(x, self.group, 1, keepdims=False) for x in (k_BGSMH, v_BGSMH))
        return k_BSMH, v_BSMH, GroupCache(k_BGSMH, v_BGSMH, self.group)


class KVCache(NamedTuple):
    """Keys and values of B rows for S slots in each of G groups, each array [B, G, S, M, H].

    Keys have RoPE and, with a norm after RoPE, its division, but no key-norm weight: that differs from layer to layer
    of a group and is folded into the queries (moe/model/attention.py). The release keeps one cache a layer instead.
    """

    k_BGSMH: jax.Array
    v_BGSMH: jax.Array

    @property
    def num_slots(self) -> int:
        """S."""
        return self.k_BGSMH.shape[2]

    @property
    def bytes_per_token(self) -> int:
        """Of one token of one row, over all groups, bytes."""
        return sum(x.nbytes // (x.shape[0] * x.shape[2]) for x in self)

    def group(self, index: jax.Array) -> GroupCache:
        """The view through which one group reads and writes."""
        return GroupCache(self.k_BGSMH, self.v_BGSMH, index)


def empty_cache(
    config: ModelConfig, batch: int, num_slots: int, dtype: DTypeLike, layout: Layout = SINGLE_DEVICE
) -> KVCache:
    """A cache of zeros.

    Args:
        batch: B, rows; split over the mesh as a batch is.
        num_slots: S, tokens that a row can hold.
        dtype: of keys and values, usually the compute format.
    """
    groups = math.ceil(config.num_layers / config.cla_factor)
    shape = (batch, groups, num_slots, config.num_kv_heads, config.head_dim)
    return KVCache(*(layout.constrain(jnp.zeros(shape, dtype), "BGSMH") for _ in range(2)))
