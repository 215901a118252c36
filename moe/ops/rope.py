"""Rotary position embedding in the `rotate_half` convention: element i turns with element i + H/2."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

RopeTables = tuple[jax.Array, jax.Array]
"""cos and sin, each f32 [B, T, H/2]."""


def rope_tables(
    positions_BT: jax.Array,
    head_dim: int,
    *,
    theta: float = 10_000.0,
    ntk_alpha: float | None = None,
    frequencies: DTypeLike = jnp.float32,
) -> RopeTables:
    """cos and sin of position · base^(-2i/H) for i < H/2 (Su et al., arXiv 2104.09864, eq. 15).

    base is theta, or theta · ntk_alpha^(H/(H-2)) (released code, HunYuanDynamicNTKAlphaRotaryEmbedding).

    Args:
        positions_BT: i32, the place of each token in its document.
        head_dim: H, even.
        frequencies: the format to which base^(-2i/H) is rounded; angles are computed from them in float32.

    Raises:
        ValueError: `head_dim` is odd, or 2 together with `ntk_alpha`.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim}: RoPE turns pairs of elements, give an even number")
    if ntk_alpha is not None and head_dim == 2:
        raise ValueError(f"head_dim=2 with ntk_alpha={ntk_alpha}: alpha's power H/(H-2) needs a head_dim of at least 4")
    base = theta if ntk_alpha is None else theta * ntk_alpha ** (head_dim / (head_dim - 2))
    inverse_base = 1.0 / base ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BT[..., None].astype(jnp.float32) * inverse_base.astype(frequencies).astype(jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTNH: jax.Array, tables: RopeTables) -> jax.Array:
    """Turns each head's vector by the angles of its token's position, in float32.

    Returns:
        of x's shape and dtype.
    """
    cos, sin = (table[:, :, None, :] for table in tables)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
