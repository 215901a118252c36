import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.ops.bits import as_bits, from_bits
from parallel.platform import compiling_for

R, D = 4096, 64


def test_bits_are_of_bfloat16_alone_and_come_back():
    x = jnp.array([0.0, -0.0, 1.5, jnp.inf, jnp.nan, 1e-40], jnp.bfloat16)
    assert as_bits(x).dtype == jnp.uint16
    np.testing.assert_array_equal(*(np.asarray(a, np.float32) for a in (from_bits(as_bits(x), x.dtype), x)))
    for other in (x.astype(jnp.float32), jnp.arange(3, dtype=jnp.uint16)):
        assert as_bits(other) is other
        assert from_bits(other, other.dtype) is other


def test_elsewhere_than_on_cpu_nothing_changes():
    x = jnp.ones(3, jnp.bfloat16)
    with compiling_for("gpu"):
        assert from_bits(as_bits(x), x.dtype) is x


def is_widened(*, bits: bool) -> bool:
    """Whether a program that fills an array row by row has all of it in float32."""

    def fill(row_D):
        empty = jnp.zeros((R, D), jnp.bfloat16)
        row_D, empty = (as_bits(row_D), as_bits(empty)) if bits else (row_D, empty)
        filled = jax.lax.fori_loop(0, R, lambda r, x: jax.lax.dynamic_update_slice(x, row_D[None], (r, 0)), empty)
        return from_bits(filled, jnp.bfloat16)

    compiled = jax.jit(fill).lower(jax.ShapeDtypeStruct((D,), jnp.bfloat16)).compile()
    return f"f32[{R},{D}]" in compiled.as_text()


def test_an_update_in_a_loop_stays_in_place():
    assert not is_widened(bits=True)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="XLA moves bfloat16 as it is")
def test_an_update_that_does_not_would_be_found():
    assert is_widened(bits=False)
