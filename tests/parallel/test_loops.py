"""Loops whose length XLA is not told."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel.loops import steady_scan


def body(carry, x):
    summed, _ = carry
    return (summed + x["a"].sum() * x["b"], x["b"]), (summed, {"none": None, "twice": 2 * x["a"]})


XS = {"a": jnp.arange(12.0).reshape(4, 3), "b": jnp.array([1.0, -2.0, 0.5, 3.0])}
BEGIN = (jnp.float32(7), jnp.float32(0))


def test_it_gives_what_a_scan_gives():
    expected = jax.lax.scan(body, BEGIN, XS)
    found = jax.jit(lambda begin, xs: steady_scan(body, begin, xs))(BEGIN, XS)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_the_compiled_program_keeps_the_loop_and_tells_its_length_in_its_name_alone(length):
    def function(x):
        return steady_scan(lambda carry, y: (carry * y, carry), x, jnp.arange(float(length)))

    text = jax.jit(function).lower(jnp.float32(1)).compile().as_text()
    (loop,) = re.findall(r"^.* while\(.*$", text, re.MULTILINE)
    assert "known_trip_count" not in loop
    assert f'turns_{length}/while"' in loop


def test_arrays_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="unpack"):
        steady_scan(lambda carry, x: (carry, x), 0.0, (jnp.zeros(3), jnp.zeros(4)))
