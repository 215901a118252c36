import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.ops.places import entry, slice_of, with_entry, with_slice

X = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)


@pytest.mark.parametrize("place", [(1,), (1, 2), (0, 1, 3), (1, 2, 3, 4)])
def test_entries_are_numpys(place):
    at = tuple(map(jnp.int32, place))
    np.testing.assert_array_equal(jax.jit(entry)(X, at), X[place])
    expected = X.copy()
    expected[place] = -1
    np.testing.assert_array_equal(jax.jit(with_entry)(X, -jnp.ones_like(X[place]), at), expected)


@pytest.mark.parametrize(("axis", "start", "size"), [(0, 1, 1), (1, 0, 2), (3, 2, 3)])
def test_slices_are_numpys(axis, start, size):
    where = (*[slice(None)] * axis, slice(start, start + size))
    np.testing.assert_array_equal(slice_of(X, jnp.int32(start), size, axis), X[where])
    expected = X.copy()
    expected[where] = -1
    np.testing.assert_array_equal(with_slice(X, -jnp.ones_like(X[where]), jnp.int32(start), axis), expected)


def test_no_place_is_asked_whether_it_is_negative():
    place = jnp.int32(1), jnp.int32(2)
    for function, given in ((entry, (X, place)), (with_entry, (X, X[1, 2], place))):
        assert " lt " not in str(jax.make_jaxpr(function)(*given))
    assert " lt " in str(jax.make_jaxpr(lambda x, i, j: jnp.asarray(x)[i, j])(X, *place))
