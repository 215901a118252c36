import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.serve.sampling import Sampling, choose_tokens, sampling_rows


def allowed(logits_V, temperature, top_k, top_p):
    """The tokens that may be drawn, found one by one."""
    scaled = np.asarray(logits_V, np.float64) / temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    found, total = set(), 0.0
    for rank, token in enumerate(np.argsort(-scaled, kind="stable")):
        if rank and (total >= top_p or (top_k and rank >= top_k)):
            break
        found.add(int(token))
        total += probs[token]
    return found


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31 - 1), st.floats(0.2, 3.0), st.integers(0, 9), st.sampled_from([0.1, 0.5, 0.93, 1.0])
)  # fmt: skip
def test_draws_stay_within_what_is_allowed(seed, temperature, top_k, top_p):
    logits_V = np.random.default_rng(seed).standard_normal(8).astype(np.float32)
    each = [Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=s) for s in range(40)]
    drawn = choose_tokens(jnp.tile(logits_V, (40, 1)), sampling_rows(each, [0] * 40))
    assert set(np.asarray(drawn).tolist()) <= allowed(logits_V, temperature, top_k, top_p)


def test_draws_have_the_softmaxs_frequencies():
    logits_V = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    each = [Sampling(temperature=1.0, seed=s) for s in range(4000)]
    drawn = np.asarray(choose_tokens(jnp.tile(logits_V, (4000, 1)), sampling_rows(each, [3] * 4000)))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_a_row_draws_the_same_in_any_company():
    logits_BV = jax.random.normal(jax.random.key(0), (5, 50))
    each = [Sampling(temperature=t, seed=7, top_k=k) for t, k in ((1.0, 0), (0.0, 0), (2.0, 5), (1.0, 1), (0.5, 0))]
    together = choose_tokens(logits_BV, sampling_rows(each, [0, 1, 2, 3, 4]))
    alone = [choose_tokens(logits_BV[i : i + 1], sampling_rows(each[i : i + 1], [i]))[0] for i in range(5)]
    np.testing.assert_array_equal(together, alone)
    assert together[1] == logits_BV[1].argmax()
    assert together[3] == logits_BV[3].argmax()


def test_each_count_draws_anew():
    logits_BV = jnp.zeros((30, 1000))
    drawn = choose_tokens(logits_BV, sampling_rows([Sampling(temperature=1.0)] * 30, list(range(30))))
    assert len(set(np.asarray(drawn).tolist())) > 20


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_choosing_can_be_jitted(temperature):
    rows = sampling_rows([Sampling(temperature=temperature)] * 2, [0, 0])
    logits_BV = jax.random.normal(jax.random.key(0), (2, 10))
    np.testing.assert_array_equal(jax.jit(choose_tokens)(logits_BV, rows), choose_tokens(logits_BV, rows))
