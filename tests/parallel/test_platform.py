from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from moe.ops.grouped_matmul import grouped_matmul
from parallel.platform import SHARED_MEMORY, compiling_for, multiplies_bfloat16, platform, shared_memory


def test_the_described_platform_counts_inside_only():
    assert platform() == jax.default_backend()
    with compiling_for("gpu"):
        assert platform() == "gpu"
        with compiling_for("cpu"):
            assert platform() == "cpu"
        assert platform() == "gpu"
    assert platform() == jax.default_backend()


def test_shared_memory_is_that_of_the_described_gpu_and_least_where_it_is_not_known():
    with compiling_for("gpu", "9.0"):
        assert shared_memory() == SHARED_MEMORY["9.0"]
    for unknown in ("", "13.7"):
        with compiling_for("gpu", unknown):
            assert shared_memory() == min(SHARED_MEMORY[capability] for capability in ("8.0", "8.9", "9.0", "10.0"))


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


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("model name\t: bf16\nflags\t\t: fpu avx2 avx512f\n", False),
        (None, True),
    ],
)
def test_products_of_bfloat16_are_what_linux_tells(monkeypatch, told, expected):
    monkeypatch.setattr(Path, "exists", lambda _: told is not None)
    monkeypatch.setattr(Path, "read_text", lambda _: told)
    assert multiplies_bfloat16.__wrapped__() is expected
