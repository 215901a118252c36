"""The kernel for dense products with block scales, interpreted: on one device, and split over eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe.ops.scaled import Recipe
from moe.ops.scaled.einsum import product
from moe.ops.scaled.partitioned import block_scaled_einsum
from moe.ops.scaled.quantize import Scaled, quantize
from tests.closeness import assert_trees_equal_to_scale

RECIPE = Recipe("fp8", "block")
SIZES = {"B": 2, "T": 256, "D": 256, "N": 4, "H": 64}


def operands(spec, seed=0):
    (a, b), out = spec.split("->")[0].split(","), spec.split("->")[1]
    r = np.random.default_rng(seed)
    return tuple(
        quantize(
            jnp.asarray(r.normal(size=[SIZES[axis] for axis in own]), jnp.float32),
            jnp.float8_e4m3fn,
            RECIPE.shared(own, out, weight="B" not in own),
        )
        for own in (a, b)
    )


SPECS = ["BTD,DNH->BTNH", "BTNH,DNH->BTD", "BTD,BTNH->DNH"]


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_on_one_device(spec):
    a, b = operands(spec)
    y = jax.jit(lambda a, b: block_scaled_einsum(spec, a, b, interpret=True))(a, b)
    assert_trees_equal_to_scale(y, product(spec, a, b, jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("layout", [{"B": "data", "N": "tensor"}, {"T": "data", "D": "tensor"}], ids=str)
def test_split_over_a_mesh(spec, layout):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    (left, right), out = spec.split("->")[0].split(","), spec.split("->")[1]

    def laid(own):
        return NamedSharding(mesh, PartitionSpec(*(layout.get(axis) for axis in own)))

    def place(x, own):
        return Scaled(jax.device_put(x.values, laid(own)), x.scales)

    a, b = operands(spec)
    run = jax.jit(lambda a, b: block_scaled_einsum(spec, a, b, interpret=True), out_shardings=laid(out))
    placed = place(a, left), place(b, right)
    assert_trees_equal_to_scale(run(*placed), product(spec, a, b, jnp.float32))
    # Nothing is gathered: what is summed over is summed where it lies.
    program = run.lower(*placed).compile().as_text()
    assert "all-gather" not in program
