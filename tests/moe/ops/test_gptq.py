import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe.ops.gptq import DAMPING, gptq_int4, output_error
from moe.ops.quantize import dequantize, quantize


def inputs(tokens, width, seed=0):
    """Correlated, as activations are."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(tokens, width)) @ rng.normal(size=(width, width))).astype(np.float32)


def in_turn(w_IO, hessian_II, group):
    """Optimal brain quantization in the inputs' order (arXiv 2210.17323 §3, equations 2 and 3): the inverse of what is
    left of H is computed anew for every input."""
    w = w_IO.astype(np.float64).copy()
    mean = np.diag(hessian_II).mean()
    hessian = hessian_II + np.diag(DAMPING * mean + (np.diag(hessian_II) == 0) * mean)
    kept = np.zeros_like(w)
    for i in range(len(w)):
        if i % group == 0:
            scale = (np.abs(w[i : i + group]).max(0) / 7.5).astype(ml_dtypes.bfloat16).astype(np.float64)
        kept[i] = np.clip(np.round(w[i] / scale), -8, 7) * scale
        inverse = np.linalg.inv(hessian[i:, i:])
        w[i:] -= inverse[:, :1] * (w[i] - kept[i]) / inverse[0, 0]
    return kept


def test_it_is_optimal_brain_quantization_in_turn():
    w = np.random.default_rng(1).normal(size=(4, 8, 5)).astype(np.float32)
    x = inputs(200, 32)
    x[:, 3] = 0
    found = dequantize(gptq_int4(jnp.asarray(w), jnp.asarray(x.T @ x), (-3, -2)), jnp.float32)
    expected = in_turn(w.reshape(32, 5), (x.T @ x).astype(np.float64), 8).reshape(w.shape)
    # A value in the middle between two may fall to either side in float32.
    same = np.isclose(found, expected, rtol=1e-4, atol=1e-6)
    assert same.mean() > 0.95


@pytest.mark.parametrize("seed", range(2))
def test_outputs_lose_less_than_by_rounding_to_the_nearest(seed):
    w = jnp.asarray(np.random.default_rng(seed).normal(size=(256, 16)).astype(np.float32))
    x = inputs(1000, 256, seed)
    hessian = jnp.asarray(x.T @ x)
    errors = []
    for kept in (gptq_int4(w, hessian, (-2,)), quantize(w, "int4", (-2,))):
        assert kept.scales.shape == (2, 16)
        wide = dequantize(kept, jnp.float32)
        errors.append(float(output_error(w, wide, hessian)))
        assert errors[-1] == pytest.approx(((x @ np.asarray(w - wide)) ** 2).sum(), rel=1e-3)
    assert errors[0] < 0.5 * errors[1]


def test_inputs_that_were_not_finite_show_in_the_scales():
    found = gptq_int4(jnp.ones((16, 4)), jnp.full((16, 16), jnp.inf), (-2,))
    assert not jnp.isfinite(found.scales.astype(jnp.float32)).any()
