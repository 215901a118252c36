"""Delayed scaling: what a history holds, and how the next one comes back, from layers and from eight devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from moe.ops.scaled import HISTORY_LENGTH, Recipe, new_history, scaled_einsum, scaled_grouped_matmul
from tests.closeness import assert_trees_equal_to_scale
from tests.oracle import scaled as oracle

FP8, INT8 = Recipe("fp8", "delayed"), Recipe("int8", "delayed")


def arrays(*shapes, seed=0):
    r = np.random.default_rng(seed)
    return [jnp.asarray(r.normal(size=shape), jnp.float32) for shape in shapes]


@partial(jax.jit, static_argnums=0)
def step(recipe, x_BD, w_DF, dy_BF, history):
    """y, dx, dw and the next history."""

    def product(x, w, history):
        return scaled_einsum("BD,DF->BF", x, w, recipe, history)

    y, pull = jax.vjp(product, x_BD, w_DF, history)
    return y, *pull(dy_BF)


def test_the_newest_magnitudes_stand_in_front_and_the_oldest_go():
    history, (x, w, dy) = new_history(), arrays((4, 8), (8, 3), (4, 3))
    for i in range(HISTORY_LENGTH + 2):
        history = step(FP8, x * (i + 1), w, -dy, history)[3]
    largest = float(jnp.abs(x).max())
    newest_first = [largest * (i + 1) for i in range(HISTORY_LENGTH + 1, 1, -1)]
    np.testing.assert_allclose(history[0], newest_first, rtol=1e-6)
    np.testing.assert_allclose(history[1], [float(jnp.abs(w).max())] * HISTORY_LENGTH, rtol=1e-6)
    np.testing.assert_allclose(history[2], [float(jnp.abs(dy).max())] * HISTORY_LENGTH, rtol=1e-6)


@pytest.mark.parametrize("recipe", [FP8, INT8], ids=str)
def test_scales_are_those_of_the_past(recipe):
    x, w, dy = arrays((40, 16), (16, 24), (40, 24))
    history = new_history().at[:, 3].set([float(jnp.abs(a).max()) for a in (x, w, dy)])
    expected = oracle.einsum("BD,DF->BF", *map(np.asarray, (x, w, dy)), recipe.format, "tensor")
    assert_trees_equal_to_scale(step(recipe, x, w, dy, history)[:3], expected)


@pytest.mark.parametrize("recipe", [FP8, INT8], ids=str)
def test_what_outgrows_the_past_is_cut_off_for_one_step(recipe):
    x, w, dy = jnp.full((1, 1), 8.0), jnp.ones((1, 1)), jnp.ones((1, 1))
    history = new_history().at[:, 0].set(1.0)
    y, _, _, history = step(recipe, x, w, dy, history)
    # fp8's scale is a power of two, rounded up: 448 · 2^-8.
    assert float(y[0, 0]) == pytest.approx(1.75 if recipe == FP8 else 1.0)
    assert float(step(recipe, x, w, dy, history)[0][0, 0]) == pytest.approx(8.0)


@pytest.mark.parametrize("recipe", [FP8, INT8], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_seen_and_not_cut_off(recipe, bad):
    x, w, dy = arrays((4, 8), (8, 3), (4, 3))
    history = new_history().at[:, 0].set(1.0)
    y, _, dw, after = step(recipe, x.at[1, 2].set(bad), w, dy, history)
    assert np.isnan(y).all()
    assert np.isnan(dw).all()
    assert not np.isfinite(after[0, 0])


def test_the_first_step_is_no_worse_than_the_presumed_magnitudes():
    x, w, dy = arrays((40, 16), (16, 24), (40, 24))
    w, dy = w / 4, dy * 1e-7
    y, dx, dw, _ = step(FP8, x, w, dy, new_history())
    for actual, exact in ((y, x @ w), (dx, dy @ w.T), (dw, x.T @ dy)):
        assert np.linalg.norm(actual - exact) < 0.1 * np.linalg.norm(exact)


def test_scanned_and_rematerialised_layers_each_get_their_own():
    L, B, D = 3, 8, 16
    x_BD, w_LDD = arrays((B, D), (L, D, D))

    def loss(w_LDD, histories):
        @jax.checkpoint
        def layer(x_BD, part):
            return jnp.sin(scaled_einsum("BD,DF->BF", x_BD, part[0], FP8, part[1])), None

        return (jax.lax.scan(layer, x_BD, (w_LDD, histories))[0] ** 2).sum()

    after = jax.jit(jax.grad(loss, 1))(w_LDD, jnp.stack([new_history()] * L))
    assert after.shape == (L, 3, HISTORY_LENGTH)
    np.testing.assert_allclose(after[:, 1, 0], np.abs(w_LDD).max((1, 2)), rtol=1e-6)
    assert (np.asarray(after[:, :, 0]) > 0).all()
    assert (np.asarray(after[:, :, 1:]) == 0).all()


def test_eight_devices_return_the_largest_of_all_and_no_sum():
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    R, E, D, F = 64, 2, 16, 8
    x_RD, w_EDF, dy_RF = arrays((8 * R, D), (E, D, F), (8 * R, F))
    everywhere, whole = PartitionSpec(("data", "expert")), PartitionSpec()

    @partial(
        jax.shard_map, mesh=mesh, in_specs=(everywhere, whole, whole), out_specs=everywhere, check_vma=False
    )  # fmt: skip
    def on_each(x_RD, w_EDF, history):
        sizes_E = jnp.array([R // 2, R // 4], jnp.int32)
        return scaled_grouped_matmul(x_RD, w_EDF, sizes_E, FP8, history)

    @jax.jit
    def run(x_RD, w_EDF, dy_RF, history):
        return jax.vjp(on_each, x_RD, w_EDF, history)[1](dy_RF)

    past = new_history().at[:, 0].set([4.0, 4.0, 4.0])
    _, dw_EDF, after = run(x_RD, w_EDF, dy_RF, past)
    mine = (np.arange(8 * R) % R < R * 3 // 4)[:, None]
    largest = [np.abs(x_RD * mine).max(), np.abs(w_EDF).max(), np.abs(dy_RF * mine).max()]
    np.testing.assert_allclose(after[:, 0], largest, rtol=1e-6)
    np.testing.assert_array_equal(after[:, 1], past[:, 0])
    # Gradients of weights are summed as ever.
    held = {name: oracle.nearest(np.asarray(v, np.float64) / s, f) * s for name, v, s, f in (
        ("x", x_RD * mine, oracle.scale(4, "e4m3"), "e4m3"), ("dy", dy_RF * mine, oracle.scale(4, "e5m2"), "e5m2")
    )}  # fmt: skip
    first = (np.arange(8 * R) % R < R // 2)[:, None]
    expected = np.stack([(held["x"] * m).T @ held["dy"] for m in (first, ~first)])
    assert_trees_equal_to_scale(dw_EDF, expected)


def test_stages_of_a_pipeline_have_layers_and_histories_of_their_own():
    mesh = jax.make_mesh((2, 4), ("stage", "data"), axis_types=(AxisType.Auto,) * 2)
    x_BD, w_LDF = arrays((16, 8), (2, 8, 4))
    layers, rows = PartitionSpec("stage"), PartitionSpec("data")

    @partial(jax.shard_map, mesh=mesh, in_specs=(rows, layers, layers), out_specs=PartitionSpec("stage", "data"),
             check_vma=False)  # fmt: skip
    def on_each(x_BD, w_1DF, history_1):
        return scaled_einsum("BD,DF->BF", x_BD, w_1DF[0], FP8, history_1[0])[None]

    run = jax.jit(jax.grad(lambda w_LDF, histories: jnp.sin(on_each(x_BD, w_LDF, histories)).sum(), 1))
    after = run(w_LDF.at[1].multiply(5), jnp.stack([new_history()] * 2))
    np.testing.assert_allclose(after[:, 0, 0], np.abs(x_BD).max(), rtol=1e-6)
    np.testing.assert_allclose(after[:, 1, 0], np.abs(w_LDF).max((1, 2)) * [1, 5], rtol=1e-6)
