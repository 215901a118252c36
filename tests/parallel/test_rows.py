"""Tables of places, beside loops."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.rows import bucket_of_place


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.integers(1, 40))
def test_the_bucket_of_a_place_is_the_one_that_holds_it_or_the_last(sizes, num_places):
    expected = [bucket for bucket, size in enumerate(sizes) for _ in range(size)]
    expected = (expected + [len(sizes) - 1] * num_places)[:num_places]
    found = bucket_of_place(jnp.cumsum(jnp.array(sizes)), jnp.arange(num_places))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)
