"""Attention a block of scores at a time, with an online softmax (FlashAttention, arXiv 2205.14135 and 2307.08691).

The backward pass is saved the output and each query's log-sum-exp, and computes the scores again. Key blocks that no
query of a block can see for causality are not computed.
"""

from functools import partial

import jax
import jax.numpy as jnp

from moe.ops.attention.view import View, visible
from moe.ops.matmul import wide_einsum
from moe.ops.places import slice_of, with_slice

BLOCK = 256
_HIDDEN = jnp.finfo(jnp.float32).min
_LEAST = _HIDDEN / 2
"""What is subtracted from scores, at least: of a query that sees no key all weights are then 0 and not 1."""


def chunked_attention(q_BTNH: jax.Array, k_BSMH: jax.Array, v_BSMH: jax.Array, view: View) -> jax.Array:
    """See `moe.ops.attention.attention`. Holds f32 scores of B·N·BLOCK·BLOCK."""
    (B, T, N, H), M = q_BTNH.shape, k_BSMH.shape[2]
    q_BMGTH = jnp.moveaxis(q_BTNH.reshape(B, T, M, N // M, H), 1, 3)
    q_BMGTH = whole_blocks(q_BMGTH, 3)
    k_BMSH, v_BMSH = (whole_blocks(jnp.swapaxes(x_BSMH, 1, 2), 2) for x_BSMH in (k_BSMH, v_BSMH))
    places = tuple(whole_blocks(x, 1) for x in (view.query_positions_BT, view.segments_BT, view.segments_BS))
    y_BMGTH = _attend(view.causal, q_BMGTH, k_BMSH, v_BMSH, places)[:, :, :, :T]
    return jnp.moveaxis(y_BMGTH, 3, 1).reshape(B, T, N, H)


def whole_blocks(x: jax.Array, axis: int) -> jax.Array:
    """Zeros up to whole blocks: segment 0 hides them."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % BLOCK)
    return jnp.pad(x, widths)


def _block(x: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    return slice_of(x, index * BLOCK, BLOCK, axis)


def _store(x: jax.Array, block: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    return with_slice(x, block, index * BLOCK, axis)


def _key_blocks(causal: bool, positions_BT: jax.Array, num_blocks: int) -> jax.Array:
    """How many key blocks, from the first, the queries of a block can see."""
    if not causal:
        return jnp.int32(num_blocks)
    return jnp.minimum(positions_BT.max() // BLOCK + 1, num_blocks).astype(jnp.int32)


def _scores(q_BMGTH, k_BMSH, places, causal, first_key):
    """f32 [B, M, G, T, S]: scores of one block of queries on one of keys, `_HIDDEN` where they do not count."""
    positions_BT, segments_BT, segments_BS = places
    keys = first_key + jnp.arange(BLOCK), segments_BS[:, None]
    allowed_BTS = visible(positions_BT[:, :, None], segments_BT[:, :, None], *keys, causal)
    scores_BMGTS = wide_einsum("BMGTH,BMSH->BMGTS", q_BMGTH, k_BMSH)
    return jnp.where(allowed_BTS[:, None, None], scores_BMGTS * q_BMGTH.shape[-1] ** -0.5, _HIDDEN)


def _scores_by_key(q_BMGTH, k_BMSH, places, causal, first_key):
    """`_scores` as [B, M, S, G, T]."""
    positions_BT, segments_BT, segments_BS = places
    keys = (first_key + jnp.arange(BLOCK))[:, None], segments_BS[:, :, None]
    allowed_BST = visible(positions_BT[:, None], segments_BT[:, None], *keys, causal)
    scores_BMSGT = wide_einsum("BMSH,BMGTH->BMSGT", k_BMSH, q_BMGTH)
    return jnp.where(allowed_BST[:, None, :, None], scores_BMSGT * q_BMGTH.shape[-1] ** -0.5, _HIDDEN)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(causal: bool, q_BMGTH: jax.Array, k_BMSH: jax.Array, v_BMSH: jax.Array, places) -> jax.Array:
    return attend_forward(causal, q_BMGTH, k_BMSH, v_BMSH, places)[0]


def attend_forward(causal: bool, q_BMGTH: jax.Array, k_BMSH: jax.Array, v_BMSH: jax.Array, places):
    """The output, and what `attend_backward` needs: last the log-sum-exp of each query's scores, f32.

    Args:
        q_BMGTH, k_BMSH, v_BMSH: of whole blocks.
        places: i32, positions_BT of the queries counted from the first key, segments_BT and segments_BS.
    """
    positions_BT, segments_BT, segments_BS = places

    def query_block(_, i):
        q, positions, segments = _block(q_BMGTH, i, 3), _block(positions_BT, i, 1), _block(segments_BT, i, 1)

        def key_block(j, carry):
            largest, total, y = carry
            here = positions, segments, _block(segments_BS, j, 1)
            scores = _scores(q, _block(k_BMSH, j, 2), here, causal, j * BLOCK)
            new_largest = jnp.maximum(largest, scores.max(-1))
            weights = jnp.exp(scores - jnp.maximum(new_largest, _LEAST)[..., None])
            shrink = jnp.exp(largest - new_largest)
            values = wide_einsum("BMGTS,BMSH->BMGTH", weights.astype(q.dtype), _block(v_BMSH, j, 2))
            return new_largest, total * shrink + weights.sum(-1), y * shrink[..., None] + values

        start = jnp.full(q.shape[:-1], _HIDDEN), jnp.zeros(q.shape[:-1]), jnp.zeros(q.shape)
        num_blocks = _key_blocks(causal, positions, k_BMSH.shape[2] // BLOCK)
        largest, total, y = jax.lax.fori_loop(0, num_blocks, key_block, start)
        total = jnp.where(total == 0, 1, total)
        return None, ((y / total[..., None]).astype(q.dtype), largest + jnp.log(total))

    _, (y, log_total) = jax.lax.scan(query_block, None, jnp.arange(q_BMGTH.shape[3] // BLOCK))
    y_BMGTH = jnp.moveaxis(y, 0, 3).reshape(q_BMGTH.shape)
    log_total_BMGT = jnp.moveaxis(log_total, 0, 3).reshape(q_BMGTH.shape[:-1])
    return y_BMGTH, (q_BMGTH, k_BMSH, v_BMSH, places, y_BMGTH, log_total_BMGT)


def attend_backward(causal: bool, saved, dy_BMGTH: jax.Array):
    """Gradients of q, k and v; summed over several sets of keys where y and the log-sum-exp are over all of them.

    Equations of FlashAttention-2 (arXiv 2307.08691, algorithm 2), queries in the outer loop. Scores stand by key: for
    two of the three products that they go into they would be transposed otherwise, which on CPU takes longer than the
    product.
    """
    q_BMGTH, k_BMSH, v_BMSH, (positions_BT, segments_BT, segments_BS), y_BMGTH, log_total_BMGT = saved
    scale = q_BMGTH.shape[-1] ** -0.5
    log_total_BMGT = jnp.maximum(log_total_BMGT, _LEAST)
    delta_BMGT = jnp.sum(dy_BMGTH.astype(jnp.float32) * y_BMGTH.astype(jnp.float32), -1)

    def query_block(dkv, i):
        q, dy, positions = _block(q_BMGTH, i, 3), _block(dy_BMGTH, i, 3), _block(positions_BT, i, 1)
        segments, log_total, delta = _block(segments_BT, i, 1), _block(log_total_BMGT, i, 3), _block(delta_BMGT, i, 3)

        def key_block(j, carry):
            dq, dk_BMSH, dv_BMSH = carry
            k, v = _block(k_BMSH, j, 2), _block(v_BMSH, j, 2)
            here = positions, segments, _block(segments_BS, j, 1)
            scores_BMSGT = _scores_by_key(q, k, here, causal, j * BLOCK)
            weights_BMSGT = jnp.exp(scores_BMSGT - log_total[:, :, None])
            dweights_BMSGT = wide_einsum("BMSH,BMGTH->BMSGT", v, dy)
            dscores_BMSGT = (weights_BMSGT * (dweights_BMSGT - delta[:, :, None]) * scale).astype(q.dtype)
            dq += _queries_gradient(dscores_BMSGT, k)
            dk = wide_einsum("BMSGT,BMGTH->BMSH", dscores_BMSGT, q)
            dv = wide_einsum("BMSGT,BMGTH->BMSH", weights_BMSGT.astype(q.dtype), dy)
            return dq, _add(dk_BMSH, dk, j), _add(dv_BMSH, dv, j)

        num_blocks = _key_blocks(causal, positions, k_BMSH.shape[2] // BLOCK)
        dq, *dkv = jax.lax.fori_loop(0, num_blocks, key_block, (jnp.zeros(q.shape), *dkv))
        return tuple(dkv), dq.astype(q.dtype)

    zeros = jnp.zeros(k_BMSH.shape), jnp.zeros(v_BMSH.shape)
    (dk_BMSH, dv_BMSH), dq = jax.lax.scan(query_block, zeros, jnp.arange(q_BMGTH.shape[3] // BLOCK))
    dq_BMGTH = jnp.moveaxis(dq, 0, 3).reshape(q_BMGTH.shape)
    return dq_BMGTH, dk_BMSH.astype(k_BMSH.dtype), dv_BMSH.astype(v_BMSH.dtype), None


def _queries_gradient(dscores_BMSGT: jax.Array, k_BMSH: jax.Array) -> jax.Array:
    """f32 [B, M, G, T, H]: the product over keys, of which in float32 keys, being fewer, are transposed and the result
    is; bfloat16 has to be laid out anew for the second operand in any case, and its scores are."""
    if dscores_BMSGT.dtype == jnp.float32:
        return jnp.moveaxis(wide_einsum("BMSH,BMSGT->BMHGT", k_BMSH, dscores_BMSGT), 2, -1)
    return wide_einsum("BMSGT,BMSH->BMGTH", dscores_BMSGT, k_BMSH)


def _add(x_BMSH: jax.Array, block: jax.Array, index: jax.Array) -> jax.Array:
    return _store(x_BMSH, _block(x_BMSH, index, 2) + block, index, 2)


_attend.defvjp(attend_forward, attend_backward)
