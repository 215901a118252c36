"""8-bit products compiled for H20 and A100: the tensor cores' instructions have 8-bit operands, and nothing is copied.

Where XLA makes the kernel, the operands of dots stand in the HLO; how its tiles are cut, and so which instruction they
come to, is found by autotuning on the GPU itself, and is set here. Pallas's kernels are read from their PTX.
"""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from moe.ops.grouped_matmul import grouped_matmul
from moe.ops.scaled import Recipe, new_history, scaled_einsum, scaled_grouped_matmul
from moe.planner.chips import A100, H20
from moe.planner.hlo import parse
from parallel.mesh import MeshConfig
from parallel.platform import compiling_for
from tests.gpu_compile.target import h20_mesh, needs_plugin

pytestmark = needs_plugin

SPEC = "BTD,DNH->BTNH"
B, T, N, H = 2, 2048, 16, 128
R, D, F, E = 4096, 1024, 2048, 16
TILES = {
    "xla_gpu_override_gemm_autotuner": "block_m: 128 block_n: 128 block_k: 128 split_k: 1 num_stages: 3 num_warps: 4 "
    "num_ctas: 1"
}


def dense(recipe):
    def product(x, w, history):
        return jnp.einsum(SPEC, x, w) if recipe is None else scaled_einsum(SPEC, x, w, recipe, history)

    return product, ((B, T, D), (D, N, H), (B, T, N, H))


def grouped(recipe):
    def product(x_RD, w_EDF, history):
        sizes_E = jnp.full(E, R // E, jnp.int32)
        if recipe is None:
            return grouped_matmul(x_RD, w_EDF, sizes_E, backend="triton")
        return scaled_grouped_matmul(x_RD, w_EDF, sizes_E, recipe, history)

    return product, ((R, D), (E, D, F), (R, F))


def compiled(chip, product, shapes, recipe, options):
    """Forward and both backward products for one `chip`."""
    # Without the version of the runtime, XLA takes cuBLASLt to be too old for fp8.
    config = chip.target_config + "runtime_version { major: 13 }"
    device = topologies.get_topology_desc("", "cuda", target_config=config, topology="1x1x1").devices[0]

    def run(x, w, dy, history):
        y, pull = jax.vjp(product, x, w, history)
        return y, pull(dy)

    def given(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    history = new_history() if recipe is not None and recipe.scaling == "delayed" else None
    past = None if history is None else given(history.shape, history.dtype)
    with compiling_for("gpu"):
        return jax.jit(run).lower(*map(given, shapes), past).compile(compiler_options=options)


def formats(program) -> list[tuple[str, ...]]:
    """The operands' formats of each dot in the HLO, of each call of cuBLASLt, and of each call of a Triton kernel."""
    found = []
    for computation in parse(program.as_text()).computations.values():
        for instruction in computation.instructions.values():
            operands = [computation.instructions[name].shape.dtype for name in instruction.operands]
            target = instruction.attributes.get("custom_call_target", "")
            if instruction.opcode == "dot" or "cublas" in target:
                found.append(tuple(operands[:2]))
            elif "triton" in target:
                found.append(tuple(dtype for dtype in operands if dtype not in ("s32", "f32")))
    return found


def instructions(folder) -> Counter[str]:
    """The tensor cores' instructions in the PTX of all kernels, as "f32.e4m3.e4m3": of the sum and the operands."""
    found: Counter[str] = Counter()
    for file in folder.rglob("*.ptx"):
        text = file.read_text()
        found.update(re.findall(r"wgmma\.mma_async\S*?\.m64n\d+k\d+\.(\S+)", text))
        found.update(re.findall(r"mma\.sync\S*?\.m\d+n\d+k\d+\.row\.col\.(\S+)", text))
    return found


FP8 = [("f8e4m3fn", "f8e4m3fn"), ("f8e4m3fn", "f8e5m2"), ("f8e5m2", "f8e4m3fn")]
"""Of y, dw and dx."""
CASES = [
    (chip, kind, Recipe(format, scaling))
    for chip, format in ((H20, "fp8"), (A100, "int8"))
    for kind in (dense, grouped)
    for scaling in ("tensor", "delayed", "row", "block")
]


@pytest.mark.parametrize(("chip", "kind", "recipe"), CASES, ids=lambda case: getattr(case, "name", None) or str(case))
def test_all_three_products_have_8_bit_operands(chip, kind, recipe, tmp_path):
    program = compiled(chip, *kind(recipe), recipe, TILES | {"xla_dump_to": str(tmp_path)})
    assert sorted(formats(program)) == (FP8 if recipe.format == "fp8" else [("s8", "s8")] * 3)
    units = set(instructions(tmp_path))
    if recipe.format == "fp8":
        assert units == {"f32.e4m3.e4m3", "f32.e4m3.e5m2", "f32.e5m2.e4m3"}
    else:
        assert units == {"satfinite.s32.s8.s8.s32"}


@pytest.mark.parametrize("kind", [dense, grouped])
def test_bfloat16_is_told_apart(kind, tmp_path):
    program = compiled(H20, *kind(None), None, TILES | {"xla_dump_to": str(tmp_path)})
    assert not {"f8e4m3fn", "f8e5m2", "s8"} & {dtype for operands in formats(program) for dtype in operands}
    assert not any("e4m3" in name or "e5m2" in name or "s8" in name for name in instructions(tmp_path))


@pytest.mark.parametrize("scaling", ["tensor", "delayed", "row"])
def test_cublas_takes_fp8(scaling):
    recipe = Recipe("fp8", scaling)
    program = compiled(H20, *dense(recipe), recipe, {"xla_gpu_enable_triton_gemm": False})
    assert program.as_text().count('custom_call_target="__cublas$lt$matmul$f8"') == 3
    assert sorted(formats(program)) == FP8


def test_a_chip_without_fp8_multiplies_in_float16():
    """The product is right and no faster: int8 is what an A100 has."""
    recipe = Recipe("fp8", "row")
    program = compiled(A100, *dense(recipe), recipe, {})
    assert set(formats(program)) == {("f16", "f16")}


LARGEST_TEMPORARIES = 2 * E * D * F
"""Bytes: the weights in 8 bits, as forward and backward have them. A row for each expert would be E · R · D values."""


@pytest.mark.parametrize("scaling", ["tensor", "delayed", "row", "block"])
@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_the_grouped_product_has_no_temporary_of_all_rows_times_experts(format, scaling):
    recipe = Recipe(format, scaling)
    program = compiled(H20, *grouped(recipe), recipe, {})
    assert program.memory_analysis().temp_size_in_bytes < LARGEST_TEMPORARIES


def test_ragged_dot_is_told_apart():
    _, shapes = grouped(None)
    sizes_E = jnp.full(E, R // E, jnp.int32)
    program = compiled(H20, lambda x, w, _: grouped_matmul(x, w, sizes_E, backend="ragged"), shapes, None, {})
    assert program.memory_analysis().temp_size_in_bytes > LARGEST_TEMPORARIES


def test_a_block_scaled_product_is_split_over_the_mesh_and_nothing_is_gathered():
    mesh = h20_mesh(MeshConfig(data=2, tensor=2))

    def given(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def loss(x, w):
        return jnp.sin(scaled_einsum(SPEC, x, w, Recipe("fp8", "block")).astype(jnp.float32)).sum()

    with compiling_for("gpu"):
        lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(
            given((B, T, D), "data"), given((D, N, H), None, "tensor")
        )
    program = lowered.compile().as_text()
    assert program.count('custom_call_target="__gpu$xla.gpu.triton"') == 3
    assert not re.search(r"(f8e4m3fn|f8e5m2|bf16)\S* all-gather", program)
