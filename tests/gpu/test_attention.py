"""cuDNN's attention against the dense one in float32, of the same bfloat16 inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.ops.attention import attention
from tests import gpu
from tests.moe.ops.test_attention import arrays

pytestmark = pytest.mark.skipif(not gpu.HERE, reason="needs a GPU: make test-gpu")

B, T = 2, 256
THIRD = np.tile(np.arange(T) > T // 3, (B, 1))
DOCUMENTS = (1 + THIRD).astype(np.int32)
PADDED = np.where(np.arange(T) < T - T // 4, DOCUMENTS, 0).astype(np.int32)


def both(backend, inputs, **view):
    y, pull = jax.vjp(lambda *x: attention(*x, backend=backend, **view), *inputs)
    return y, pull(jnp.cos(y))


def check(**view):
    inputs = arrays(T=T, S=T, N=4, M=2, H=64, dtype=jnp.bfloat16)
    found = jax.tree.leaves(both("cudnn", inputs, **view))
    expected = jax.tree.leaves(both("dense", [x.astype(jnp.float32) for x in inputs], **view))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x.astype(jnp.float32), y, atol=0.02 * float(jnp.abs(y).max()))


@pytest.mark.parametrize("causal", [True, False])
def test_one_document(causal):
    check(causal=causal)


@pytest.mark.parametrize("segments", [DOCUMENTS, PADDED], ids=["documents", "padding"])
def test_documents(segments):
    check(segments_BT=segments, segments_BS=segments)


def test_a_step_of_decoding():
    q, k, v = arrays(T=1, S=T, N=4, M=2, H=64, dtype=jnp.bfloat16)
    places = np.array([[100], [7]], np.int32)
    view = {
        "query_positions_BT": places,
        "segments_BT": np.ones((B, 1), np.int32),
        "segments_BS": (np.arange(T) <= places).astype(np.int32),
    }
    found = attention(q, k, v, backend="cudnn", **view)
    expected = attention(*(x.astype(jnp.float32) for x in (q, k, v)), backend="dense", **view)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.02)
