import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from parallel.layout import Layout
from parallel.mesh import MeshConfig, make_mesh


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
