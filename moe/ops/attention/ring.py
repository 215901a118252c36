"""Ring attention (arXiv 2310.01889): each device keeps the queries of its part of the sequences, and the keys and
values of all parts travel round the ring.

Causality would leave the first device of the ring with almost nothing to do. So a sequence of P parts is taken as 2P
chunks, and device p computes with chunks p and 2P-1-p, which together see as much as those of any other device
(zig-zag, arXiv 2407.21783, section 3.3.2). They go there and come back in here: outside, parts are in order.
"""

from functools import partial

import jax
import jax.numpy as jnp

from moe.ops.attention.chunked import attend_backward, attend_forward, whole_blocks


def ring_attention(
    q_BTNH: jax.Array, k_BTMH: jax.Array, v_BTMH: jax.Array, segments_BT: jax.Array, axis: str
) -> jax.Array:
    """Inside `jax.shard_map`: causal attention over whole sequences, of which each device along `axis` has its part.

    The same numbers as `moe.ops.attention.attention` with these documents. Holds f32 scores of one block, as "chunked".

    Args:
        q_BTNH, k_BTMH, v_BTMH: T positions of the sequence, those of the first device first; N a multiple of M.
        segments_BT: i32, the document of each token, 0 for padding.
        axis: the mesh axis.

    Returns:
        y_BTNH of q's dtype.

    Raises:
        ValueError: a device's part cannot be halved.
    """
    (B, T, N, H), M = q_BTNH.shape, k_BTMH.shape[2]
    if T % 2:
        raise ValueError(
            f"ring attention over {axis}={jax.lax.axis_size(axis)}: each device has {T} positions, and two chunks need "
            f"an even number; give sequences of a multiple of {2 * jax.lax.axis_size(axis)}"
        )
    q_BTNH, k_BTMH, v_BTMH, segments_BT = (to_zigzag(x, axis) for x in (q_BTNH, k_BTMH, v_BTMH, segments_BT))
    q_BMGTH = jnp.moveaxis(q_BTNH.reshape(B, T, M, N // M, H), 1, 3)
    y_BMGTH = _attend(axis, q_BMGTH, jnp.swapaxes(k_BTMH, 1, 2), jnp.swapaxes(v_BTMH, 1, 2), segments_BT)
    return from_zigzag(jnp.moveaxis(y_BMGTH, 3, 1).reshape(B, T, N, H), axis)


def to_zigzag(x_BT: jax.Array, axis: str) -> jax.Array:
    """Chunks 2p and 2p+1, which device p has, as chunks p and 2P-1-p. One of each pair is even."""
    even, odd = _routes(axis)
    from_even, from_odd = (
        jax.lax.ppermute(chunk, axis, route)
        for chunk, route in zip(jnp.split(x_BT, 2, axis=1), (even, odd), strict=True)
    )
    return jnp.concatenate(_swapped_on_odd_devices(from_even, from_odd, axis), axis=1)


def from_zigzag(x_BT: jax.Array, axis: str) -> jax.Array:
    """The inverse of `to_zigzag`."""
    even, odd = ([(there, here) for here, there in route] for route in _routes(axis))
    first, second = jnp.split(x_BT, 2, axis=1)
    chunks = _swapped_on_odd_devices(first, second, axis)
    return jnp.concatenate(
        [jax.lax.ppermute(chunk, axis, route) for chunk, route in zip(chunks, (even, odd), strict=True)], axis=1
    )


def _routes(axis: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """From which device to which the even chunks go, and the odd ones."""
    P = jax.lax.axis_size(axis)
    owner = [min(chunk, 2 * P - 1 - chunk) for chunk in range(2 * P)]
    return [(p, owner[2 * p]) for p in range(P)], [(p, owner[2 * p + 1]) for p in range(P)]


def _swapped_on_odd_devices(first: jax.Array, second: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    is_odd = jax.lax.axis_index(axis) % 2 == 1
    return jnp.where(is_odd, second, first), jnp.where(is_odd, first, second)


def _next(x, axis: str):
    """What the device before has."""
    P = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(p, (p + 1) % P) for p in range(P)])


def _starts(device: jax.Array, chunk: int, axis: str) -> jax.Array:
    """i32[2], the first positions of a device's two chunks."""
    return jnp.stack([device, 2 * jax.lax.axis_size(axis) - 1 - device]).astype(jnp.int32) * chunk


def _chunks(x: jax.Array, axis: int) -> jax.Array:
    """The two chunks along `axis`, stacked in front and padded to whole blocks."""
    return jnp.stack([whole_blocks(chunk, axis) for chunk in jnp.split(x, 2, axis)])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(axis: str, q_BMGTH: jax.Array, k_BMSH: jax.Array, v_BMSH: jax.Array, segments_BT: jax.Array) -> jax.Array:
    return _forward(axis, q_BMGTH, k_BMSH, v_BMSH, segments_BT)[0]


def _queries(axis: str, q_BMGTH: jax.Array, segments_BT: jax.Array):
    """Queries, their positions and documents, padded to whole blocks, and the number of positions of a chunk."""
    T = q_BMGTH.shape[3]
    starts = _starts(jax.lax.axis_index(axis), T // 2, axis)
    positions_BT = jnp.broadcast_to((starts[:, None] + jnp.arange(T // 2)).reshape(-1), segments_BT.shape)
    return whole_blocks(q_BMGTH, 3), whole_blocks(positions_BT, 1), whole_blocks(segments_BT, 1)


def _forward(axis: str, q_BMGTH: jax.Array, k_BMSH: jax.Array, v_BMSH: jax.Array, segments_BT: jax.Array):
    T = q_BMGTH.shape[3]
    q, positions_BT, documents_BT = _queries(axis, q_BMGTH, segments_BT)

    def meet_chunk(carry, chunk):
        y, log_total = carry
        k, v, segments_BS, start = chunk
        places = positions_BT - start, documents_BT, segments_BS
        y_here, (*_, log_total_here) = attend_forward(True, q, k, v, places)
        new = jnp.logaddexp(log_total, log_total_here)
        y = y * jnp.exp(log_total - new)[..., None] + y_here * jnp.exp(log_total_here - new)[..., None]
        return (y, new), None

    def meet_device(carry, step):
        found, keys = carry
        starts = _starts((jax.lax.axis_index(axis) - step) % jax.lax.axis_size(axis), T // 2, axis)
        found, _ = jax.lax.scan(meet_chunk, found, (*keys, starts))
        return (found, _next(keys, axis)), None

    nothing = jnp.zeros(q.shape), jnp.full(q.shape[:-1], jnp.finfo(jnp.float32).min)
    keys = _chunks(k_BMSH, 2), _chunks(v_BMSH, 2), _chunks(segments_BT, 1)
    ((y, log_total), _), _ = jax.lax.scan(meet_device, (nothing, keys), jnp.arange(jax.lax.axis_size(axis)))
    y = y.astype(q.dtype)
    return y[:, :, :, :T], (q_BMGTH, k_BMSH, v_BMSH, segments_BT, y, log_total)


def _backward(axis: str, saved, dy_BMGTH: jax.Array):
    """The gradients of keys and values travel with them, and are home after the whole round."""
    q_BMGTH, k_BMSH, v_BMSH, segments_BT, y, log_total = saved
    T = q_BMGTH.shape[3]
    q, positions_BT, documents_BT = _queries(axis, q_BMGTH, segments_BT)
    dy = whole_blocks(dy_BMGTH, 3)

    def meet_chunk(dq, chunk):
        (k, v, segments_BS), dk, dv, start = chunk
        places = positions_BT - start, documents_BT, segments_BS
        dq_here, dk_here, dv_here, _ = attend_backward(True, (q, k, v, places, y, log_total), dy)
        return dq + dq_here, (dk + dk_here, dv + dv_here)

    def meet_device(carry, step):
        dq, keys, gradients = carry
        starts = _starts((jax.lax.axis_index(axis) - step) % jax.lax.axis_size(axis), T // 2, axis)
        dq, gradients = jax.lax.scan(meet_chunk, dq, (keys, *gradients, starts))
        return (dq, *_next((keys, gradients), axis)), None

    keys = _chunks(k_BMSH, 2), _chunks(v_BMSH, 2), _chunks(segments_BT, 1)
    start = jnp.zeros(q.shape), keys, (jnp.zeros(keys[0].shape), jnp.zeros(keys[1].shape))
    (dq, _, gradients), _ = jax.lax.scan(meet_device, start, jnp.arange(jax.lax.axis_size(axis)))
    dk_BMSH, dv_BMSH = (jnp.concatenate(list(d[:, :, :, : T // 2]), axis=2) for d in gradients)
    return dq[:, :, :, :T].astype(q.dtype), dk_BMSH.astype(k_BMSH.dtype), dv_BMSH.astype(v_BMSH.dtype), None


_attend.defvjp(_forward, _backward)
