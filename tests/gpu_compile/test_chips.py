"""XLA accepts each chip's description, and what it does on chips that lack a format or a backend."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe.model.execution import Execution
from moe.ops.attention import attention
from moe.ops.grouped_matmul import grouped_matmul
from moe.planner.backends import backends
from moe.planner.chips import A100, B200, CHIPS, H20, RTX_4090, V100
from moe.planner.target import described_mesh
from parallel.mesh import MeshConfig
from parallel.platform import compiling_for
from tests.gpu_compile.target import needs_plugin

pytestmark = needs_plugin


def compiled(chip, function, *shapes):
    mesh = described_mesh(chip, MeshConfig(), 8)
    sharding = NamedSharding(mesh, PartitionSpec())
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    with compiling_for("gpu", mesh.devices.flat[0].compute_capability):
        return jax.jit(function).lower(*given).compile()


def product(chip, dtype):
    return compiled(chip, jnp.dot, ((512, 256), dtype), ((256, 1024), dtype)).as_text()


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_xla_compiles_for_the_chip(chip):
    assert re.search(r"bf16\[512,1024\]", product(chip, jnp.bfloat16))


def test_volta_multiplies_bfloat16_in_float32():
    text = product(V100, jnp.bfloat16)
    (call,) = (line for line in text.splitlines() if "__cublas$lt$matmul" in line)
    assert "(f32[512,1024]" in call
    # Copies of both operands in float32, and of the result in bfloat16.
    assert len(re.findall(r"convert\(", text)) >= 3
    # In float16 the tensor cores take the operands as they are.
    assert "convert(" not in product(V100, jnp.float16)


@pytest.mark.parametrize("chip", [V100, A100, RTX_4090, H20, B200], ids=lambda chip: chip.name)
def test_the_backends_chosen_for_a_chip_compile(chip):
    chosen = backends(chip, Execution())
    bf16, i32 = jnp.bfloat16, jnp.int32

    def attend(q, k, v, segments):
        y = attention(q, k, v, segments_BT=segments, segments_BS=segments, backend=chosen.attention)
        return y.astype(jnp.float32).sum()

    B, T, N, M, H = 2, 512, 4, 2, 128
    shapes = ((B, T, N, H), bf16), ((B, T, M, H), bf16), ((B, T, M, H), bf16), ((B, T), i32)
    text = compiled(chip, jax.grad(attend, argnums=(0, 1, 2)), *shapes).as_text()
    assert ("__cudnn$fmha" in text) == (chip is not V100)

    def multiply(x, w, sizes):
        return jnp.sin(grouped_matmul(x, w, sizes, backend=chosen.grouped_matmul).astype(jnp.float32)).sum()

    shapes = ((1024, 256), bf16), ((4, 256, 512), bf16), ((4,), i32)
    text = compiled(chip, jax.grad(multiply, argnums=(0, 1)), *shapes).as_text()
    assert ("__gpu$xla.gpu.triton" in text) == (chip is not V100)


def test_volta_has_no_triton():
    with pytest.raises(jax.errors.JaxRuntimeError, match="Ampere"):
        compiled(
            V100,
            partial(grouped_matmul, backend="triton"),
            ((1024, 256), jnp.bfloat16), ((4, 256, 512), jnp.bfloat16), ((4,), jnp.int32),
        )  # fmt: skip
