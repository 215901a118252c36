"""What cannot run here is at least compiled: the ops' GPU backends, for a described H20.

Needs the CUDA plugin (requirements-plan.txt), JAX_PLATFORMS=cpu and JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1; skipped without.
"""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe.ops.attention.cudnn import cudnn_kernel
from moe.ops.attention.view import View
from moe.ops.grouped_matmul import grouped_matmul
from moe.ops.grouped_matmul.triton import triton_kernels
from parallel.mesh import MeshConfig
from tests.gpu_compile.target import h20_mesh, needs_plugin

pytestmark = needs_plugin


def compiled(function, *shapes):
    """The optimized program for one H20, and its memory."""
    sharding = NamedSharding(h20_mesh(MeshConfig()), PartitionSpec())
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    return jax.jit(function).lower(*given).compile()


@pytest.mark.parametrize("documents", [False, True])
def test_attention_compiles_to_cudnns_flash_attention(documents):
    B, T, N, M, H = 2, 1024, 8, 2, 128

    def loss(q_BTNH, k_BSMH, v_BSMH, positions_BT, segments_BT):
        view = View(positions_BT, segments_BT, segments_BT, causal=True, in_place=True, plain=not documents)
        return cudnn_kernel(q_BTNH, k_BSMH, v_BSMH, view).astype(jnp.float32).sum()

    bf16, i32 = jnp.bfloat16, jnp.int32
    program = compiled(
        jax.grad(loss, argnums=(0, 1, 2)),
        ((B, T, N, H), bf16), ((B, T, M, H), bf16), ((B, T, M, H), bf16), ((B, T), i32), ((B, T), i32),
    )  # fmt: skip
    text = program.as_text()
    assert "__cudnn$fmha" in text
    assert "Backward" in text
    # No scores of B·N·T·T in any format.
    assert program.memory_analysis().temp_size_in_bytes < B * N * T * T * 2


R, D, F, E = 4096, 1024, 2048, 16


def compiled_gradients(product):
    def loss(x_RD, w_EDF, sizes_E):
        return jnp.sin(product(x_RD, w_EDF, sizes_E).astype(jnp.float32)).sum()

    bf16 = jnp.bfloat16
    return compiled(jax.value_and_grad(loss, argnums=(0, 1)), ((R, D), bf16), ((E, D, F), bf16), ((E,), jnp.int32))


def test_the_grouped_product_compiles_to_triton_without_copies_of_the_rows():
    program = compiled_gradients(lambda *arrays: triton_kernels(*arrays, False))
    # Forward, dx and dw.
    assert program.as_text().count('custom_call_target="__gpu$xla.gpu.triton"') == 3
    # At most y and dy in bfloat16, and a few row tables.
    assert program.memory_analysis().temp_size_in_bytes < 2.1 * R * F * 2


def test_ragged_dot_compiles():
    assert "dot" in compiled_gradients(partial(grouped_matmul, backend="ragged")).as_text()
