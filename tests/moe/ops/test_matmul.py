import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.ops import matmul
from moe.ops.bits import as_bits
from moe.ops.matmul import einsum, row_product, transposed, weight_einsum, weight_gradient, wide_einsum
from parallel.platform import compiling_for
from tests.closeness import assert_trees_equal_to_scale

SIZES = {"B": 2, "T": 12, "D": 64, "F": 40, "N": 3, "H": 8, "V": 32}
SPECS = ("BTD,DF->BTF", "BTD,VD->BTV", "BTD,DNH->BTNH", "BTNH,NHD->BTD")


def arrays(spec: str, dtype=jnp.float32):
    """x, w and the gradient of the result."""
    random = np.random.default_rng(0)
    own, weight, out = re.split(",|->", spec)
    return (jnp.asarray(random.normal(size=[SIZES[a] for a in axes]), dtype) for axes in (own, weight, out))


def with_gradients(function, x, w, dy):
    y, pullback = jax.vjp(function, x, w)
    return y, *pullback(dy)


@pytest.fixture(params=[True, False], ids=["with products of bfloat16", "without"])
def processor(request, monkeypatch):
    """Whether it has products of bfloat16."""
    monkeypatch.setattr(matmul, "multiplies_bfloat16", lambda: request.param)
    return request.param


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("spec", SPECS)
def test_values_and_gradients_are_einsums(spec, local):
    x, w, dy = arrays(spec)
    own, weight, out = re.split(",|->", spec)
    x_wide, w_wide, dy_wide = (np.asarray(a, np.float64) for a in (x, w, dy))
    expected = (
        np.einsum(spec, x_wide, w_wide),
        np.einsum(f"{out},{weight}->{own}", dy_wide, w_wide),
        np.einsum(f"{own},{out}->{weight}", x_wide, dy_wide),
    )
    found = with_gradients(lambda x, w: weight_einsum(spec, x, w, local=local), x, w, dy)
    assert_trees_equal_to_scale(found, expected, tolerance=1e-6)
    assert_trees_equal_to_scale(weight_gradient(spec, x, dy, local=local), expected[2], tolerance=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_bfloat16_is_summed_in_float32_and_rounded_once(spec, processor):
    x, w, dy = arrays(spec, jnp.bfloat16)
    exact = np.einsum(spec, *(np.asarray(a, np.float64) for a in (x, w)))
    y, dx, dw = with_gradients(lambda x, w: weight_einsum(spec, x, w, local=True), x, w, dy)
    assert {a.dtype for a in (y, dx, dw)} == {jnp.dtype("bfloat16")}
    assert np.abs(np.asarray(y, np.float64) - exact).max() <= 2**-8 * np.abs(exact).max()


@pytest.mark.parametrize("shape", [(64, 96), (12, 10), (1, 7), (33, 1)])
def test_transposed(shape):
    x_RD = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    np.testing.assert_array_equal(transposed(x_RD), np.asarray(x_RD).T)


def multiplied(function, *given) -> list[set[str]]:
    """The formats of the operands of each of the compiled program's products."""
    text = jax.jit(function).lower(*given).compile().as_text()
    formats = dict(re.findall(r"%(\S+) = (\w+)\[", text)) | dict(re.findall(r"(\S+): (\w+)\[", text))
    return [{formats[a], formats[b]} for a, b in re.findall(r" dot\(%(\S+), %(\S+)\)", text)]


def test_products_of_bfloat16_are_widened_where_the_processor_has_none(processor, monkeypatch):
    monkeypatch.setattr(matmul, "_MANY_ROWS", 24)
    given = arrays("BTD,DF->BTF", jnp.bfloat16)
    step = partial(with_gradients, lambda x, w: weight_einsum("BTD,DF->BTF", x, w, local=True))
    assert multiplied(step, *given) == [{"bf16" if processor else "f32"}] * 3


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="XLA multiplies bfloat16 by itself")
def test_a_product_that_is_widened_would_be_found():
    step = partial(with_gradients, lambda x, w: jnp.einsum("BTD,DF->BTF", x, w))
    assert multiplied(step, *arrays("BTD,DF->BTF", jnp.bfloat16)) == [{"f32"}] * 3


def test_factors_are_multiplied_as_they_stand():
    spec = "BTNH,NHD->BTD"
    x, w, _ = arrays(spec)

    def transposes(function) -> bool:
        return " transpose(" in jax.jit(partial(function, spec)).lower(x, w).compile().as_text()

    assert not transposes(wide_einsum)
    # It sums over H before N.
    assert transposes(jnp.einsum)


def test_elsewhere_than_on_cpu_xla_is_left_alone():
    x, w, _ = arrays("BTD,DF->BTF", jnp.bfloat16)
    with compiling_for("gpu"):
        for function in (einsum, lambda *given: weight_einsum(*given, local=True)):
            traced = str(jax.make_jaxpr(lambda x, w, f=function: f("BTD,DF->BTF", x, w))(x, w))
            assert "preferred_element_type=bfloat16" in traced
            assert "custom_vjp" not in traced


@pytest.mark.parametrize("spec", [*SPECS, "BMGTH,BMSH->BMGTS"])
def test_one_row_of_bfloat16_is_multiplied_as_several_are(spec):
    random = np.random.default_rng(0)
    own, other, _ = re.split(",|->", spec)
    sizes = SIZES | dict.fromkeys("BTG", 1) | {"M": 2, "S": 20}
    x, w = (jnp.asarray(random.normal(size=[sizes[a] for a in axes]), jnp.bfloat16) for axes in (own, other))
    found = wide_einsum(spec, x, w)
    exact = np.einsum(spec, *(np.asarray(a, np.float64) for a in (x, w)))
    assert (found.dtype, found.shape) == (jnp.float32, exact.shape)
    np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max())
    assert multiplied(partial(wide_einsum, spec), x, w) == [{"bf16"}]


@pytest.mark.parametrize("spec", ["BTD,DF->BTF", "BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,VD->BTV"])
def test_one_row_by_a_weight_is_no_product_where_the_processor_has_none_of_bfloat16(spec, processor):
    own, other, _ = re.split(",|->", spec)
    random, sizes = np.random.default_rng(0), SIZES | {"B": 1, "T": 1}
    x, w = (jnp.asarray(random.normal(size=[sizes[a] for a in axes]), jnp.bfloat16) for axes in (own, other))
    found = weight_einsum(spec, x, w, local=True)
    exact = np.einsum(spec, *(np.asarray(a, np.float64) for a in (x, w)))
    assert (found.dtype, found.shape) == (jnp.bfloat16, exact.shape)
    np.testing.assert_allclose(found, exact, atol=2**-8 * np.abs(exact).max())
    products = multiplied(lambda x, w: weight_einsum(spec, x, w, local=True), x, w)
    # A weight whose last axis is summed over is left to XLA.
    assert products == ([{"bf16"}] if processor or spec.endswith("V") else [])


@pytest.mark.parametrize("depth", [1, 7, 64])
@pytest.mark.parametrize("given", ["float32", "bfloat16", "bits"])
def test_a_row_by_a_matrix_where_it_stands(depth, given):
    random, dtype = np.random.default_rng(0), "float32" if given == "float32" else "bfloat16"
    x_D = jnp.asarray(random.normal(size=depth), dtype)
    w_LEDF = jnp.asarray(random.normal(size=(2, 3, depth, 5)), dtype)
    exact = np.asarray(x_D, np.float64) @ np.asarray(w_LEDF[1, 2], np.float64)
    stack = as_bits(w_LEDF) if given == "bits" else w_LEDF
    found = jax.jit(row_product)(x_D, stack, (jnp.int32(1), jnp.int32(2)))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max())
