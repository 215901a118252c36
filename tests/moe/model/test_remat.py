import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.model.parameter import used
from moe.model.remat import rematerialise
from moe.ops.quantize import quantize
from parallel.layout import Layout
from parallel.mesh import MeshConfig, make_mesh

D = 16
R = np.random.default_rng(0)
X_BD, W_DD, V_DD = (jnp.asarray(R.normal(size=size), jnp.bfloat16) for size in ((8, D), (D, D), (D, D)))


def layers(x_BD, of_group):
    w_DD, v_DD, place = of_group
    hidden_BD = jnp.tanh(0.3 * x_BD @ w_DD) * (1 + place)
    return hidden_BD @ v_DD, hidden_BD.astype(jnp.float32).sum()


def gradient(policy):
    def loss(x_BD, w_DD, v_DD):
        y_BD, total = rematerialise(layers, policy, barrier=True)(x_BD, (w_DD, v_DD, jnp.int32(1)))
        return jnp.square(y_BD.astype(jnp.float32)).sum() + total

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(X_BD, W_DD, V_DD)


def test_kept_in_fp8_the_loss_is_exact_and_gradients_are_near():
    loss, expected = gradient("matmuls")
    rough_loss, found = gradient("matmuls_fp8")
    assert loss == rough_loss
    for wide, narrow in zip(expected, found, strict=True):
        error = jnp.linalg.norm((narrow - wide).astype(jnp.float32)) / jnp.linalg.norm(wide.astype(jnp.float32))
        # e4m3 has 3 bits of mantissa: a kept number is off by at most 1/16 of itself, and tanh' by less.
        assert error < 1 / 16
    assert any((narrow != wide).any() for wide, narrow in zip(expected, found, strict=True))


@pytest.mark.parametrize("value", [0.0, 1e-30, 3e38])
def test_scales_take_any_magnitude(value):
    kept = rematerialise(lambda x, w: x @ w, "matmuls_fp8", barrier=True)
    x_BD = jnp.full((4, D), value, jnp.bfloat16)
    gradients = jax.grad(lambda x, w: jnp.tanh(kept(x, w).astype(jnp.float32)).sum(), (0, 1))(
        x_BD, jnp.eye(D, dtype=x_BD.dtype)
    )
    assert all(jnp.isfinite(g.astype(jnp.float32)).all() for g in gradients)


def test_what_is_not_finite_stays_so():
    def loss(x_BD):
        return jnp.sin(
            rematerialise(lambda x, w: jnp.square(x @ w), "matmuls_fp8", barrier=True)(x_BD, W_DD).astype(jnp.float32)
        ).sum()

    assert not jnp.isfinite(jax.grad(loss)(X_BD.at[2, 3].set(jnp.inf))[2].astype(jnp.float32)).any()


@pytest.mark.parametrize("how", ["gathered", "gathered in fp8", "widened from int8"])
def test_weights_as_products_take_them_are_not_kept(how):
    L, D, F = 4, 32, 48
    layout = Layout(make_mesh(MeshConfig(data=8)))
    w_LDF = jax.device_put(jnp.ones((L, D, F)), layout.stored("LDF", (L, D, F)))
    x_BD = jax.device_put(jnp.ones((8, D)), layout.activation("BD"))
    weights = (quantize(w_LDF, "int8", (-2,)), None) if how == "widened from int8" else (None, w_LDF)

    def layer(x_BD, weights):
        frozen_DF, trained_DF = weights
        gathered = "fp8" if how == "gathered in fp8" else None
        weight_DF = trained_DF if frozen_DF is None else frozen_DF
        w_DF = used(nnx.Param(weight_DF, axes="DF", gathered=gathered), jnp.float32, layout)
        return jnp.tanh(x_BD @ w_DF) @ w_DF.T, jnp.zeros(())

    def compiled(layer):
        def loss(x_BD, frozen_LDF, trained_LDF):
            return jnp.square(jax.lax.scan(layer, x_BD, (frozen_LDF, trained_LDF))[0]).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 2))).lower(x_BD, *weights).compile().as_text()

    whole = f"f32[{L},{D},{F}]"
    assert whole not in compiled(rematerialise(layer, "none", barrier=False))
    assert whole in compiled(layer)
