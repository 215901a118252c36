"""The kernel for dense products with block scales, or of int8, interpreted: on one device, and split over four."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe.ops.scaled import Recipe
from moe.ops.scaled.einsum import product
from moe.ops.scaled.partitioned import kernel_einsum
from moe.ops.scaled.quantize import ALL, Scaled, quantize
from tests.closeness import assert_trees_equal_to_scale

RECIPES = [Recipe("fp8", "block"), Recipe("int8", "row")]
SIZES = {"B": 2, "T": 256, "D": 256, "N": 4, "H": 64}


def operands(spec, recipe, seed=0):
    (a, b), out = spec.split("->")[0].split(","), spec.split("->")[1]
    r = np.random.default_rng(seed)
    return tuple(
        quantize(
            jnp.asarray(r.normal(size=[SIZES[axis] for axis in own]), jnp.float32),
            recipe.forward_dtype,
            recipe.shared(own, out, weight="B" not in own),
        )
        for own in (a, b)
    )


SPECS = ["BTD,DNH->BTNH", "BTNH,DNH->BTD", "BTD,BTNH->DNH"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_on_one_device(spec, recipe):
    a, b = operands(spec, recipe)
    y = jax.jit(lambda a, b: kernel_einsum(spec, a, b, interpret=True))(a, b)
    assert_trees_equal_to_scale(y, product(spec, a, b, jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("layout", [{"B": "data", "N": "tensor"}, {"T": "data", "D": "tensor"}], ids=str)
def test_split_over_a_mesh(spec, layout, recipe):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    (left, right), out = spec.split("->")[0].split(","), spec.split("->")[1]

    def laid(own):
        return NamedSharding(mesh, PartitionSpec(*(layout.get(axis) for axis in own)))

    def place(x, own):
        return Scaled(jax.device_put(x.values, laid(own)), x.scales)

    a, b = operands(spec, recipe)
    run = jax.jit(lambda a, b: kernel_einsum(spec, a, b, interpret=True), out_shardings=laid(out))
    placed = place(a, left), place(b, right)
    assert_trees_equal_to_scale(run(*placed), product(spec, a, b, jnp.float32))
    # Nothing is gathered: what is summed over is summed where it lies.
    program = run.lower(*placed).compile().as_text()
    assert "all-gather" not in program


@pytest.mark.parametrize("width", [24, 200])
def test_int8_sums_that_tensor_cores_cannot_take_are_refused(width):
    x, w = (quantize(jnp.ones(shape), jnp.int8, (ALL, ALL)) for shape in ((20, width), (width, 16)))
    with pytest.raises(ValueError, match=f"int8 on a GPU sums over a multiple of 32 numbers, not {width}: take fp8"):
        kernel_einsum("TD,DF->TF", x, w, interpret=True)
