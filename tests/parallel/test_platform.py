import jax
import jax.numpy as jnp
import pytest

from moe.ops.grouped_matmul import grouped_matmul
from parallel.platform import compiling_for, platform


def test_the_described_platform_counts_inside_only():
    assert platform() == jax.default_backend()
    with compiling_for("gpu"):
        assert platform() == "gpu"
        with compiling_for("cpu"):
            assert platform() == "cpu"
        assert platform() == "gpu"
    assert platform() == jax.default_backend()


def test_a_failure_inside_gives_the_platform_back():
    with pytest.raises(KeyError), compiling_for("gpu"):
        raise KeyError
    assert platform() == jax.default_backend()


def test_automatic_backends_follow_it():
    shapes = [jax.ShapeDtypeStruct((64, 32), jnp.float32), jax.ShapeDtypeStruct((2, 32, 16), jnp.float32)]
    sizes_E = jax.ShapeDtypeStruct((2,), jnp.int32)

    def traced() -> str:
        return str(jax.make_jaxpr(lambda *arrays: grouped_matmul(*arrays))(*shapes, sizes_E))

    assert "pallas_call" not in traced()
    with compiling_for("gpu"):
        assert "pallas_call" in traced()
