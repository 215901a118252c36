"""Grouped-query attention: one signature, three backends.

view.py says what a query may see; dense.py, chunked.py and cudnn.py compute with it.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from moe.ops.attention.chunked import BLOCK, chunked_attention
from moe.ops.attention.cudnn import FORMATS, cudnn_attention
from moe.ops.attention.dense import dense_attention
from moe.ops.attention.view import View
from parallel.platform import platform

Backend = Literal["auto", "dense", "chunked", "cudnn"]


def attention(
    q_BTNH: jax.Array,
    k_BSMH: jax.Array,
    v_BSMH: jax.Array,
    *,
    query_positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    segments_BS: jax.Array | None = None,
    causal: bool = True,
    softmax: DTypeLike = jnp.float32,
    backend: Backend = "auto",
) -> jax.Array:
    """softmax(q · k / sqrt(H)) · v over the keys a query may see; its sums in float32.

    Query head n uses key-value head n // (N/M) (grouped-query attention, arXiv 2305.13245). A query sees the keys of
    its own document, and with `causal` none behind its own place. One that sees no key, such as padding, gives zeros
    and has no gradient.

    Args:
        q_BTNH, k_BSMH, v_BSMH: of one dtype; N a multiple of M.
        query_positions_BT: i32, the key slot at which each query stands; None where query t stands at slot t. A step
            of decoding passes the slot it has just written.
        segments_BT, segments_BS: i32, the document of each query and key, 0 for padding and for a cache's empty
            slots. None where all belong to one document; both or neither.
        softmax: format of the scores where all are held, by "dense"; the others have only float32.
        backend: "dense" holds all scores; "chunked" holds a block of them, and computes them again in the backward
            pass; "cudnn" is the vendor's flash attention, on NVIDIA GPUs; "auto" takes the fastest for platform and
            dtype.

    Returns:
        y_BTNH of q's dtype.

    Raises:
        ValueError: shapes that do not fit, or a backend that this platform does not have.
    """
    _check(q_BTNH, k_BSMH, v_BSMH, query_positions_BT, segments_BT, segments_BS)
    view = _view(q_BTNH, k_BSMH, query_positions_BT, segments_BT, segments_BS, causal)
    if backend == "auto":
        backend = _fastest(q_BTNH.shape[1] * k_BSMH.shape[1], q_BTNH.dtype)
    if backend not in _BACKENDS:
        raise ValueError(f"execution.attention={backend!r}: give 'auto' or one of {', '.join(_BACKENDS)}")
    if backend == "dense":
        return dense_attention(q_BTNH, k_BSMH, v_BSMH, view, softmax)
    if jnp.dtype(softmax) != jnp.float32:
        raise ValueError(f"precision.softmax={softmax!r} with execution.attention={backend!r}: only 'dense' has it")
    return _IN_FLOAT32[backend](q_BTNH, k_BSMH, v_BSMH, view)


_IN_FLOAT32 = {"chunked": chunked_attention, "cudnn": cudnn_attention}
_BACKENDS = ("dense", *_IN_FLOAT32)


def _fastest(scores_per_head: int, dtype: DTypeLike) -> Backend:
    if platform() == "gpu" and dtype in FORMATS:
        return "cudnn"
    return "chunked" if scores_per_head >= BLOCK**2 else "dense"


def _view(
    q_BTNH: jax.Array,
    k_BSMH: jax.Array,
    query_positions_BT: jax.Array | None,
    segments_BT: jax.Array | None,
    segments_BS: jax.Array | None,
    causal: bool,
) -> View:
    (B, T), S = q_BTNH.shape[:2], k_BSMH.shape[1]
    in_place = query_positions_BT is None
    plain = in_place and segments_BT is None
    if query_positions_BT is None:
        query_positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    if segments_BT is None or segments_BS is None:
        segments_BT, segments_BS = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
    return View(query_positions_BT, segments_BT, segments_BS, causal, in_place, plain)


def _check(
    q_BTNH: jax.Array,
    k_BSMH: jax.Array,
    v_BSMH: jax.Array,
    query_positions_BT: jax.Array | None,
    segments_BT: jax.Array | None,
    segments_BS: jax.Array | None,
) -> None:
    if k_BSMH.shape != v_BSMH.shape:
        raise ValueError(f"k_BSMH has shape {k_BSMH.shape} and v_BSMH {v_BSMH.shape}: give both the same")
    (B, T, N, H), (S, M) = q_BTNH.shape, k_BSMH.shape[1:3]
    if k_BSMH.shape != (B, S, M, H):
        raise ValueError(f"k_BSMH has shape {k_BSMH.shape}, q_BTNH {q_BTNH.shape}: batch and head width must agree")
    if N % M:
        raise ValueError(f"{N} query heads do not divide over {M} key-value heads: give a multiple of {M}")
    if (segments_BT is None) != (segments_BS is None):
        raise ValueError("segments_BT and segments_BS tell documents apart only together: give both, or neither")
    shapes = {
        "query_positions_BT": (query_positions_BT, T),
        "segments_BT": (segments_BT, T),
        "segments_BS": (segments_BS, S),
    }
    for name, (given, length) in shapes.items():
        if given is not None and given.shape != (B, length):
            raise ValueError(f"{name} has shape {given.shape}: give one number for each token, ({B}, {length})")
    if query_positions_BT is None and T != S:
        raise ValueError(f"{T} queries on {S} keys: give query_positions_BT, the key slot of each query")
