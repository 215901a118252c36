import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from moe.train.loss import cross_entropy_sum
from parallel.layout import SINGLE_DEVICE, Layout, LayoutConfig
from parallel.mesh import MeshConfig, make_mesh
from tests.closeness import assert_trees_equal_to_scale

B, T, D, V = 8, 10, 16, 36


def inputs(dtype=jnp.float32):
    r = np.random.default_rng(0)
    hidden_BTD = jnp.asarray(r.normal(size=(B, T, D)), dtype)
    head_VD = jnp.asarray(r.normal(size=(V, D)), jnp.float32)
    targets_BT = r.integers(0, V, (B, T)).astype(np.int32)
    weights_BT = r.integers(0, 2, (B, T)).astype(np.float32)
    return hidden_BTD, head_VD, targets_BT, weights_BT


def oracle(hidden_BTD, head_VD, targets_BT, weights_BT) -> float:
    total = 0.0
    for b in range(B):
        for t in range(T):
            logits_V = np.asarray(head_VD, np.float64) @ np.asarray(hidden_BTD[b, t], np.float64)
            total += weights_BT[b, t] * (np.log(np.exp(logits_V).sum()) - logits_V[targets_BT[b, t]])
    return total


def plain(hidden_BTD, head_VD, targets_BT, weights_BT):
    log_probs_BTV = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD))
    return -(weights_BT * jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], -1)[..., 0]).sum()


@pytest.mark.parametrize("chunk", [1, 3, 10, 64])
def test_loss_and_gradients(chunk):
    arrays = inputs()
    loss, gradients = jax.value_and_grad(cross_entropy_sum, argnums=(0, 1))(*arrays, chunk, SINGLE_DEVICE)
    np.testing.assert_allclose(loss, oracle(*arrays), rtol=1e-5)
    np.testing.assert_allclose(cross_entropy_sum(*arrays, chunk, SINGLE_DEVICE), loss, rtol=1e-6)
    assert_trees_equal_to_scale(gradients, jax.grad(plain, argnums=(0, 1))(*arrays))


def test_gradient_follows_the_factor_before_it():
    arrays = inputs()
    single = jax.grad(lambda h: cross_entropy_sum(h, *arrays[1:], 4, SINGLE_DEVICE))(arrays[0])
    halved = jax.grad(lambda h: cross_entropy_sum(h, *arrays[1:], 4, SINGLE_DEVICE) / 2)(arrays[0])
    np.testing.assert_allclose(2 * halved, single, rtol=1e-6)


@pytest.mark.parametrize(
    ("mesh", "zero"),
    [
        (MeshConfig(data=8), 3),
        (MeshConfig(replica=2, data=2, expert=2), 2),
        (MeshConfig(replica=2, data=2, tensor=2), 1),
        # Four parts of a sequence of ten there are not: it stays whole.
        (MeshConfig(data=2, tensor=4), 3),
    ],
)
def test_every_mesh_gives_the_single_devices_numbers(mesh, zero):
    arrays, layout = inputs(), Layout(make_mesh(mesh), LayoutConfig(zero=zero))
    take = jax.jit(jax.value_and_grad(cross_entropy_sum, argnums=(0, 1)), static_argnums=(4, 5))
    assert_trees_equal_to_scale(take(*arrays, 4, layout), take(*arrays, 4, SINGLE_DEVICE))


def test_formats():
    arrays = inputs(jnp.bfloat16)
    loss, (dhidden, dhead) = jax.value_and_grad(cross_entropy_sum, argnums=(0, 1))(*arrays, 4, SINGLE_DEVICE)
    assert (loss.dtype, dhidden.dtype, dhead.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(loss, oracle(*arrays), rtol=0.02)


def test_nothing_to_predict_is_zero_with_zero_gradients():
    hidden_BTD, head_VD, targets_BT, weights_BT = inputs()
    take = jax.value_and_grad(cross_entropy_sum, argnums=(0, 1))
    loss, gradients = take(hidden_BTD, head_VD, targets_BT, 0 * weights_BT, 4, SINGLE_DEVICE)
    assert float(loss) == 0
    assert all(float(jnp.abs(g).max()) == 0 for g in gradients)


def test_float32_logits_exist_for_one_chunk_only():
    def largest(jaxpr) -> int:
        sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars if v.aval.dtype == jnp.float32]
        inner = [largest(j) for eqn in jaxpr.eqns for j in jax.extend.core.jaxprs_in_params(eqn.params)]
        return max(sizes + inner, default=0)

    shapes = (
        jax.ShapeDtypeStruct((4, 1024, 8), jnp.bfloat16),
        jax.ShapeDtypeStruct((512, 8), jnp.float32),
        jax.ShapeDtypeStruct((4, 1024), jnp.int32),
        jax.ShapeDtypeStruct((4, 1024), jnp.float32),
    )
    take = jax.value_and_grad(lambda *x: cross_entropy_sum(*x, 32, SINGLE_DEVICE), argnums=(0, 1))
    assert largest(jax.make_jaxpr(take)(*shapes).jaxpr) == 4 * 32 * 512
