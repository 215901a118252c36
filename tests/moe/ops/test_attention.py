import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.ops.attention import attention
from tests.closeness import assert_trees_equal_to_scale

BACKENDS = ["dense", "chunked"]


def oracle(q_BTNH, k_BSMH, v_BSMH, positions_BT, segments_BT, segments_BS, causal):
    B, T, N, H = q_BTNH.shape
    S, M = k_BSMH.shape[1:3]
    y_BTNH = np.zeros(q_BTNH.shape)
    for b in range(B):
        for t in range(T):
            seen = [
                s
                for s in range(S)
                if segments_BT[b, t] == segments_BS[b, s] != 0 and (not causal or s <= positions_BT[b, t])
            ]
            for n in range(N if seen else 0):
                m = n // (N // M)
                scores = np.array([q_BTNH[b, t, n] @ k_BSMH[b, s, m] for s in seen]) / np.sqrt(H)
                probs = np.exp(scores - scores.max())
                y_BTNH[b, t, n] = sum(p * v_BSMH[b, s, m] for p, s in zip(probs / probs.sum(), seen, strict=True))
    return y_BTNH


def arrays(T=20, S=20, N=4, M=2, H=8, B=2, dtype=jnp.float32):
    r = np.random.default_rng(0)
    return tuple(jnp.asarray(r.normal(size=s), dtype) for s in [(B, T, N, H), (B, S, M, H), (B, S, M, H)])


def plain(B, T):
    return np.tile(np.arange(T), (B, 1)), np.ones((B, T), int)


@pytest.mark.parametrize("backend", BACKENDS)
class TestContract:
    @pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
    @pytest.mark.parametrize("causal", [True, False])
    def test_values(self, backend, heads, causal):
        q, k, v = arrays(N=heads[0], M=heads[1])
        positions, ones = plain(2, 20)
        expected = oracle(*(np.asarray(x, np.float64) for x in (q, k, v)), positions, ones, ones, causal)
        assert_trees_equal_to_scale(attention(q, k, v, causal=causal, backend=backend), expected)

    def test_documents_and_padding(self, backend):
        q, k, v = arrays()
        segments = np.array([[1] * 5 + [2] * 15, [0] * 3 + [1] * 10 + [0] * 7], np.int32)
        y = attention(q, k, v, segments_BT=segments, segments_BS=segments, backend=backend)
        exact = [np.asarray(x, np.float64) for x in (q, k, v)]
        assert_trees_equal_to_scale(y, oracle(*exact, plain(2, 20)[0], segments, segments, True))
        assert (np.asarray(y)[segments == 0] == 0).all()

    def test_a_step_of_decoding(self, backend):
        q, k, v = arrays(T=2, S=30)
        positions = np.array([[10, 11], [4, 5]], np.int32)
        filled = (np.arange(30) <= positions.max(1)[:, None]).astype(np.int32)
        ones = np.ones((2, 2), np.int32)
        y = attention(
            q, k, v, query_positions_BT=positions, segments_BT=ones, segments_BS=filled, backend=backend
        )  # fmt: skip
        exact = [np.asarray(x, np.float64) for x in (q, k, v)]
        assert_trees_equal_to_scale(y, oracle(*exact, positions, ones, filled, True))

    @pytest.mark.parametrize("length", [7, 255, 256, 600])
    def test_lengths_and_gradients_agree_with_the_dense_one(self, backend, length):
        q, k, v = arrays(T=length, S=length, B=1)
        segments = (1 + (np.arange(length) > length // 3))[None].astype(np.int32)
        segments[:, length - length // 4 :] = 0

        def total(backend):
            return lambda *x: jnp.sin(attention(*x, segments_BT=segments, segments_BS=segments, backend=backend)).sum()

        found = jax.value_and_grad(total(backend), argnums=(0, 1, 2))(q, k, v)
        with jax.enable_x64(True):
            exact = jax.value_and_grad(total("dense"), argnums=(0, 1, 2))(*(x.astype(jnp.float64) for x in (q, k, v)))
        assert_trees_equal_to_scale(found[1], exact[1])

    def test_gradients_are_those_of_finite_differences(self, backend):
        q, k, v = arrays(T=6, S=6)
        direction = arrays(T=6, S=6)[1][::-1]

        def total(step):
            return jnp.sin(attention(q, k + step * direction, v, backend=backend)).sum()

        slope = (total(1e-2) - total(-1e-2)) / 2e-2
        np.testing.assert_allclose(jax.grad(total)(0.0), slope, rtol=1e-2)

    def test_large_scores_stay_finite(self, backend):
        q, k, v = arrays()
        y, pull = jax.vjp(lambda q: attention(q, k, v, backend=backend), 1e4 * q)
        assert bool(jnp.isfinite(y).all())
        assert bool(jnp.isfinite(pull(y)[0]).all())

    def test_bf16(self, backend):
        q, k, v = arrays(dtype=jnp.bfloat16)
        y = attention(q, k, v, backend=backend)
        assert y.dtype == jnp.bfloat16
        positions, ones = plain(2, 20)
        expected = oracle(*(np.asarray(x, np.float64) for x in (q, k, v)), positions, ones, ones, True)
        np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=0.03)


@pytest.mark.parametrize(
    ("shapes", "changes", "message"),
    [
        ({"M": 3}, {}, "4 query heads do not divide over 3 key-value heads"),
        ({"T": 3}, {}, "3 queries on 20 keys: give query_positions_BT"),
        ({}, {"segments_BT": np.ones((2, 20), np.int32)}, "only together: give both, or neither"),
        ({}, {"query_positions_BT": np.ones((2, 5), np.int32)}, r"query_positions_BT has shape \(2, 5\)"),
        ({}, {"backend": "cudnn"}, 'needs an NVIDIA GPU, this is cpu: use "dense"'),
        ({}, {"backend": "flash"}, "execution.attention='flash': give 'auto' or one of dense, chunked, cudnn"),
    ],
)
def test_what_does_not_fit_is_refused(shapes, changes, message):
    with pytest.raises(ValueError, match=message):
        attention(*arrays(**shapes), **changes)


def test_scores_can_be_held_in_bfloat16():
    q, k, v = arrays(T=64, S=64)
    exact = attention(q, k, v, backend="dense")
    rough = attention(q, k, v, softmax=jnp.bfloat16, backend="dense")
    error = jnp.linalg.norm(rough - exact) / jnp.linalg.norm(exact)
    assert 1e-4 < error < 1e-2


@pytest.mark.parametrize("backend", ["chunked", "auto"])
def test_scores_in_bfloat16_are_refused_where_they_are_not_held(backend):
    q, k, v = arrays(T=2048 if backend == "auto" else 20, S=2048 if backend == "auto" else 20, B=1, N=1, M=1)
    with pytest.raises(ValueError, match="only 'dense' has it"):
        attention(q, k, v, softmax=jnp.bfloat16, backend=backend)
