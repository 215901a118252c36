import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.ops.swiglu import swiglu
from tests.closeness import assert_trees_equal_to_scale


def plain(gate, up, weights=None):
    hidden = gate / (1 + jnp.exp(-gate)) * up
    return hidden if weights is None else weights[:, None] * hidden


def arrays(weighted: bool):
    r = np.random.default_rng(0)
    sizes = ((6, 8), (6, 8), (6,))[: 3 if weighted else 2]
    return tuple(jnp.asarray(r.normal(size=size), jnp.float32) for size in sizes)


@pytest.mark.parametrize("weighted", [True, False])
def test_values_and_gradients_are_those_of_the_plain_formula(weighted):
    given = arrays(weighted)
    which = tuple(range(len(given)))

    def of(function):
        return function(*given), jax.grad(lambda *given: jnp.sin(function(*given)).sum(), which)(*given)

    assert_trees_equal_to_scale(of(swiglu), of(plain), tolerance=1e-6)


@pytest.mark.parametrize("weighted", [True, False])
def test_only_the_arguments_are_saved(weighted):
    gate, up, *weights = arrays(weighted)
    gate, up = (x.astype(jnp.bfloat16) for x in (gate, up))
    hidden, pullback = jax.vjp(swiglu, gate, up, *weights)
    assert hidden.dtype == jnp.bfloat16
    saved = sorted((str(x.dtype), x.shape) for x in jax.tree.leaves(pullback))
    assert saved == [("bfloat16", (6, 8))] * 2 + [("float32", (6,))] * weighted


def test_a_weight_is_rounded_together_with_what_it_weighs():
    gate, up, weights = arrays(True)
    narrow = [x.astype(jnp.bfloat16) for x in (gate, up)]
    exact = plain(*(x.astype(jnp.float32) for x in narrow), weights)
    np.testing.assert_array_equal(swiglu(*narrow, weights), exact.astype(jnp.bfloat16))
