"""Tables of places, beside loops."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parallel import rows
from parallel.rows import bucket_of_place


@pytest.mark.parametrize("few", [0, 64], ids=["searched", "compared with all"])
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=9), num_places=st.integers(1, 40))
def test_the_bucket_of_a_place_is_the_one_that_holds_it_or_the_last(monkeypatch, few, sizes, num_places):
    monkeypatch.setattr(rows, "_FEW_BUCKETS", few)
    expected = [bucket for bucket, size in enumerate(sizes) for _ in range(size)]
    expected = (expected + [len(sizes) - 1] * num_places)[:num_places]
    found = bucket_of_place(jnp.cumsum(jnp.array(sizes)), jnp.arange(num_places))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)
