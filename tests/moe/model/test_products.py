import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.model.products import product, recorded, spread
from moe.model.remat import rematerialise
from moe.ops.scaled import Recipe


def arrays():
    r = np.random.default_rng(0)
    return (jnp.asarray(r.normal(size=shape), jnp.bfloat16) for shape in ((2, 8, 16), (16, 24)))


def test_a_history_takes_the_largest_magnitudes_of_both_passes():
    x, w = arrays()
    x, w = x.at[0, 3, 4].set(-7), w.at[3, 5].set(4)
    before = jnp.arange(6, dtype=jnp.float32).reshape(3, 2)

    def loss(history):
        return (5 * product("BTD,DF->BTF", x, w, None, history)).sum()

    np.testing.assert_array_equal(jax.grad(loss)(before), [[7, 0], [4, 2], [5, 4]])


def test_rows_that_do_not_count_and_what_is_not_finite():
    x = jnp.array([[1.0, -2.0], [jnp.inf, 9.0]])
    history, owned = jnp.zeros((3, 1)), jnp.array([[True], [False]])

    def loss(history, owned):
        return (jnp.array([[3.0], [8.0]]) * recorded(x, x, x[:1], history, owned)).sum()

    assert jax.grad(loss)(history, owned)[:, 0].tolist() == [2, 2, 3]
    assert jax.grad(loss)(history, True)[:, 0].tolist() == [np.inf, 2, 8]


def test_parts_of_a_product_share_a_history():
    _, pull = jax.vjp(lambda history: spread(history, 3), jnp.zeros((3, 2)))
    (following,) = pull(jnp.stack([jnp.full((3, 2), value) for value in (1.0, 5.0, 2.0)]))
    assert following.tolist() == jnp.full((3, 2), 5.0).tolist()


@pytest.mark.parametrize(("policy", "kept"), [("matmuls", True), ("full", False)])
def test_rematerialisation_keeps_the_result_of_a_product_and_not_its_sum(policy, kept, capsys):
    def layer(x, w):
        y = product("BTD,DF->BTF", x * 2, w, Recipe("int8", "tensor"), None)
        return jnp.sin(y.astype(jnp.float32)).sum()

    jax.ad_checkpoint.print_saved_residuals(rematerialise(layer, policy, barrier=True), *arrays())
    told = capsys.readouterr().out
    # As bits (moe/ops/bits.py).
    assert ("u16[2,8,24]" in told) == kept
    assert "i32[" not in told
    assert "f32[2,8,24]" not in told.replace("bf16", "")
