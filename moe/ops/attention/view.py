"""What each query may see."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class View(NamedTuple):
    """Which keys each query may see; the arguments of `attention` with their defaults filled in.

    query_positions_BT: i32, the key slot at which a query stands.
    segments_BT, segments_BS: i32, the document of each query and key; 0 is padding, or a cache's empty slot.
    causal: whether keys behind the query's place are hidden.
    in_place: true where no positions were given, so that query t stands at slot t.
    plain: true where neither positions nor segments were given, so that `causal` says everything.
    """

    query_positions_BT: jax.Array
    segments_BT: jax.Array
    segments_BS: jax.Array
    causal: bool
    in_place: bool
    plain: bool

    def mask(self) -> jax.Array:
        """bool [B, T, S]: true where the query may see the key."""
        key_positions_S = jnp.arange(self.segments_BS.shape[1])
        queries = self.query_positions_BT[:, :, None], self.segments_BT[:, :, None]
        return visible(*queries, key_positions_S, self.segments_BS[:, None], self.causal)


def visible(
    query_positions: jax.Array,
    query_segments: jax.Array,
    key_positions: jax.Array,
    key_segments: jax.Array,
    causal: bool,
) -> jax.Array:
    """bool, of arrays that broadcast: same document, no padding, and with `causal` no key behind the query's place."""
    allowed = (query_segments == key_segments) & (query_segments != 0)
    if causal:
        allowed &= key_positions <= query_positions
    return allowed
