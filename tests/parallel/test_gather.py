import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from parallel.layout import Layout
from parallel.mesh import MeshConfig, make_mesh
from tests.oracle.blocks import on_the_wire
from tests.parallel.exchange.collectives import bytes_of


@pytest.mark.parametrize("axes", ["DF", "EDF", "EFD", "VD"])
def test_a_gathered_weight_is_the_weight_and_its_gradient_goes_back_where_it_is_stored(axes):
    layout = Layout(make_mesh(MeshConfig(data=2, expert=2, tensor=2)))
    shape = tuple({"D": 8, "E": 4, "F": 6, "V": 10}[letter] for letter in axes)
    weight, factor = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    placed = jax.device_put(weight, layout.stored(axes, shape))

    def loss(weight):
        used = layout.gather(weight, axes)
        return (used**2 * factor).sum(), used

    gradient, used = jax.jit(jax.grad(loss, has_aux=True), out_shardings=(layout.stored(axes, shape), None))(placed)
    np.testing.assert_array_equal(used, weight)
    np.testing.assert_allclose(gradient, 2 * weight * factor, rtol=1e-6)
    assert used.sharding.is_equivalent_to(NamedSharding(layout.mesh, layout.used_spec(axes)), len(axes))


@pytest.mark.parametrize(
    ("axes", "format", "element"),
    [
        ("EFD", "fp8", "float8_e4m3fn"),
        ("DF", "int8", "int8"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("EDF", "int8", "int8"), ("DNH", "fp8", "float8_e4m3fn"))
        ),
    ],
)
def test_in_8_bits_a_weight_is_rounded_and_its_gradient_is_not(axes, format, element):
    """Experts are split over `data` alone, all else over `data` and `expert`; blocks fill a part and are no longer."""
    layout = Layout(make_mesh(MeshConfig(data=2, expert=2, tensor=2)))
    shape = tuple({"D": 80, "E": 4, "F": 6, "N": 2, "H": 3}[letter] for letter in axes)
    block = 40 if "E" in axes else 20
    weight, factor = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    placed = jax.device_put(weight, layout.stored(axes, shape))

    def loss(weight):
        used = layout.gather(weight, axes, format)
        return (used**2 * factor).sum(), used

    gradient, used = jax.jit(jax.grad(loss, has_aux=True), out_shardings=(layout.stored(axes, shape), None))(placed)
    lines = np.moveaxis(weight, axes.index("D"), -1)
    rounded = [on_the_wire(line_D, element, block) for line_D in lines.reshape(-1, 80)]
    expected = np.moveaxis(np.float32(rounded).reshape(lines.shape), -1, axes.index("D"))
    np.testing.assert_array_equal(used, expected)
    np.testing.assert_allclose(gradient, 2 * expected * factor, rtol=1e-6)
    assert used.sharding.is_equivalent_to(NamedSharding(layout.mesh, layout.used_spec(axes)), len(axes))


@pytest.mark.parametrize("axes", ["DF", "FD"])
def test_what_is_gathered_in_8_bits_is_bytes(axes):
    """One for each number, and one for each block of 32."""
    layout = Layout(make_mesh(MeshConfig(data=4, tensor=2)))
    shape = tuple({"D": 256, "F": 48}[letter] for letter in axes)
    weight = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout.stored(axes, shape))
    used = jax.jit(lambda weight: layout.gather(weight.astype(jnp.bfloat16), axes, "fp8"))
    gathers = re.findall(r"= (.+?) all-gather\(", used.lower(weight).compile().as_text())
    assert len(gathers) == 2
    assert sum(map(bytes_of, gathers)) == 256 * 48 // 2 * 33 / 32


def test_a_weight_that_no_device_shares_out_keeps_its_format():
    layout = Layout(make_mesh(MeshConfig(tensor=2)))
    weight = jax.random.normal(jax.random.key(0), (64, 8))
    np.testing.assert_array_equal(jax.jit(lambda w: layout.gather(w, "DF", "int8"))(weight), weight)
