"""Work of single kernels, against loops and counts by hand."""

import pytest

from moe.planner.hlo import parse
from moe.planner.kernels import CountError, Kernels, attention_flops


def run_of(entry: str, computations: str = "", routed_rows: float | None = None):
    module = parse(f"HloModule m\n\n{computations}\nENTRY %main () -> f32[] {{\n{entry}\n}}\n")
    return Kernels(module, routed_rows).run(module.entry, module.entry.root)


def test_a_product_in_a_fusion_in_a_fusion():
    inside = """%inner (a: bf16[3,4,8], b: bf16[3,8,2]) -> f32[3,4,2] {
  %a = bf16[3,4,8]{2,1,0} parameter(0)
  %b = bf16[3,8,2]{2,1,0} parameter(1)
  ROOT %dot = f32[3,4,2]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, D
}

%f (p: bf16[3,4,8], q: bf16[3,8,2]) -> f32[3,4,2] {
  %p = bf16[3,4,8]{2,1,0} parameter(0)
  %q = bf16[3,8,2]{2,1,0} parameter(1)
  ROOT %n = f32[3,4,2]{2,1,0} fusion(%p, %q), kind=kCustom, calls=%inner
}
""".replace("D\n", "rhs_contracting_dims={1}\n")
    entry = """  %x = bf16[3,4,8]{2,1,0} parameter(0)
  %w = bf16[3,8,2]{2,1,0} parameter(1)
  ROOT %y = f32[3,4,2]{2,1,0} fusion(%x, %w), kind=kCustom, calls=%f, metadata={op_name="jit(f)/attention/dot"}"""
    run = run_of(entry, inside)
    # Three times 4 x 8 by 8 x 2, a multiplication and an addition each.
    assert (run.kind, run.use, run.flops, run.shape, run.format) == ("matmul", "attention", 384.0, (3, 4, 2, 8), "bf16")
    assert run.bytes == 2 * 96 + 2 * 48 + 4 * 24


@pytest.mark.parametrize(
    ("dtype", "more", "expected"),
    [("f32", "", "tf32"), ("f32", ", operand_precision={highest,highest}", "f32"), ("f8e4m3fn", "", "f8e4m3fn")],
)
def test_the_format_of_a_product(dtype, more, expected):
    entry = f"""  %x = {dtype}[4,8]{{1,0}} parameter(0)
  %w = {dtype}[8,2]{{1,0}} parameter(1)
  ROOT %y = f32[4,2]{{1,0}} dot(%x, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}{more}"""
    assert run_of(entry).format == expected


def test_cublas():
    entry = """  %x = f8e4m3fn[64,32]{1,0} parameter(0)
  %w = f8e4m3fn[16,32]{1,0} parameter(1)
  %s = f32[] parameter(2)
  ROOT %y = (bf16[64,16]{1,0}, s8[128]{0}) custom-call(%x, %w, %s), CONFIG"""
    dims = '"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[]'
    config = f'backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":{{{dims}}}}}}}'
    config = f'custom_call_target="__cublas$lt$matmul$f8", {config}'
    run = run_of(entry.replace("CONFIG", config))
    assert (run.kind, run.flops, run.shape, run.format) == ("matmul", 2.0 * 64 * 16 * 32, (1, 64, 16, 32), "f8e4m3fn")


def described(scope: str, kernel: str) -> str:
    """Of a call of a Triton kernel."""
    config = f'{{ir = "ML\\22", name = "{kernel}", num_warps = 8 : i32}}'
    return f'metadata={{op_name="jit(f)/{scope}"}}, backend_config={config}'


ROWS = """  %a = s32[9]{0} parameter(0)
  %b = s32[9]{0} parameter(1)
  %c = s32[9]{0} parameter(2)
  %x = bf16[100,64]{1,0} parameter(3)
  %w = bf16[4,WEIGHT]{2,1,0} parameter(4)
  ROOT %y = bf16[100,32]{1,0} custom-call(%a, %b, %c, %x, %w), custom_call_target="__gpu$xla.gpu.triton", METADATA"""
WEIGHTS = """  %a = s32[4]{0} parameter(0)
  %b = s32[4]{0} parameter(1)
  %x = bf16[100,64]{1,0} parameter(2)
  %dy = bf16[100,32]{1,0} parameter(3)
  ROOT %y = bf16[4,64,32]{2,1,0} custom-call(%a, %b, %x, %dy), custom_call_target="__gpu$xla.gpu.triton", METADATA"""


@pytest.mark.parametrize("text", [ROWS.replace("WEIGHT", "64,32"), ROWS.replace("WEIGHT", "32,64"), WEIGHTS])
@pytest.mark.parametrize(("routed_rows", "rows"), [(None, 100), (60.0, 60), (400.0, 100)])
def test_the_grouped_product_works_on_rows_that_are_there(text, routed_rows, rows):
    over = "weights" if text == WEIGHTS else "rows"
    name = described("experts", f"grouped_matmul_{over}")
    run = run_of(text.replace("METADATA", name), routed_rows=routed_rows)
    assert (run.kind, run.use, run.format) == ("grouped_matmul", "experts", "bf16")
    assert run.flops == sum(2 * 64 * 32 for _ in range(rows))
    assert run.shape == (4, rows, 32, 64)
    assert run.bytes == 2 * (rows * 64 + rows * 32 + 4 * 64 * 32)


SCALED_ROWS = """  %a = s32[9]{0} parameter(0)
  %b = s32[9]{0} parameter(1)
  %c = s32[9]{0} parameter(2)
  %x = f8e5m2[100,64]{1,0} parameter(3)
  %sx = f32[100,2]{1,0} parameter(4)
  %w = f8e4m3fn[4,32,64]{2,1,0} parameter(5)
  %sw = f32[4,2,32]{2,1,0} parameter(6)
  ROOT %y = bf16[100,32]{1,0} custom-call(%a, %b, %c, %x, %sx, %w, %sw), custom_call_target="TRITON", META"""
SCALED_WEIGHTS = """  %a = s32[4]{0} parameter(0)
  %b = s32[4]{0} parameter(1)
  %x = s8[64,100]{1,0} parameter(2)
  %sx = f32[1,64]{1,0} parameter(3)
  %dy = s8[32,100]{1,0} parameter(4)
  %sy = f32[1,32]{1,0} parameter(5)
  ROOT %y = bf16[4,64,32]{2,1,0} custom-call(%a, %b, %x, %sx, %dy, %sy), custom_call_target="TRITON", META"""


@pytest.mark.parametrize(
    ("text", "over", "format", "size"),
    [
        # x in 8 bits, y in bfloat16, w, and both scales.
        (SCALED_ROWS, "rows", "f8e5m2", 60 * (64 + 2 * 32) + 4 * 64 * 32 + 4 * (100 * 2 + 4 * 2 * 32)),
        # x and dy in 8 bits, dw in bfloat16, and both scales.
        (SCALED_WEIGHTS, "weights", "s8", 60 * (64 + 32) + 2 * 4 * 64 * 32 + 4 * (64 + 32)),
    ],
)
def test_the_grouped_product_in_8_bits(text, over, format, size):
    name = described("experts", f"scaled_grouped_matmul_{over}")
    run = run_of(text.replace("META", name).replace("TRITON", "__gpu$xla.gpu.triton"), routed_rows=60.0)
    assert (run.kind, run.use, run.format, run.shape) == ("grouped_matmul", "experts", format, (4, 60, 32, 64))
    assert run.flops == 2 * 60 * 64 * 32
    assert run.bytes == size
    assert run.block_scaled == (text == SCALED_ROWS)


def test_a_dense_product_by_the_grouped_kernel_has_all_its_rows():
    name = described("attention/custom_partitioning", "scaled_grouped_matmul_rows")
    text = SCALED_ROWS.replace("META", name).replace("TRITON", "__gpu$xla.gpu.triton")
    assert run_of(text, routed_rows=60.0).flops == 2 * 100 * 64 * 32


@pytest.mark.parametrize(("T", "S"), [(1, 7), (5, 5), (3, 8)])
@pytest.mark.parametrize(
    ("target", "config", "products", "causal"),
    [
        ("__cudnn$fmhaSoftmax", '{"mask_type":"NO_MASK"}', 2, False),
        ("__cudnn$fmhaSoftmax", '{"mask_type":"CAUSAL"}', 2, True),
        ("__cudnn$fmhaScaleBiasSoftmax", '{"mask_type":"NO_MASK"}', 2, True),
        ("__cudnn$fmhaScaleBiasSoftmaxBackward", '{"mask_type":"NO_MASK"}', 5, True),
    ],
)
def test_flash_attention_counts_the_pairs_that_see_each_other(T, S, target, config, products, causal):
    B, N, M, H = 2, 6, 2, 16
    pairs = sum(not causal or key <= S - T + query for query in range(T) for key in range(S))
    entry = f"""  %q = bf16[{B},{T},{N},{H}]{{3,2,1,0}} parameter(0)
  %k = bf16[{B},{S},{M},{H}]{{3,2,1,0}} parameter(1)
  ROOT %y = (bf16[{B},{N},{T},{H}]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %k, %k), custom_call_target="{target}", """
    shapes = f"bf16[{B},{T},{N},{H}]{{3,2,1,0}}, bf16[{B},{S},{M},{H}]{{3,2,1,0}}, bf16[{B},{S},{M},{H}]{{3,2,1,0}}"
    run = run_of(entry + f"operand_layout_constraints={{{shapes}}}, backend_config={config}")
    assert run.kind == "attention"
    assert run.flops == products * 2 * B * N * H * pairs


def test_what_only_moves_and_what_computes():
    x = "  %x = f32[8,4]{1,0} parameter(0)\n"
    assert run_of(x + "  ROOT %y = f32[4,8]{1,0} transpose(%x), dimensions={1,0}").kind == "data_movement"
    assert run_of(x + "  ROOT %y = f32[8,4]{0,1} copy(%x)").bytes == 256
    cast = run_of(x + "  ROOT %y = bf16[8,4]{1,0} convert(%x)")
    assert (cast.kind, cast.flops, cast.format) == ("elementwise", 0.0, "f32")
    total = run_of(x + "  %z = f32[] constant(0)\n  ROOT %y = f32[8]{0} reduce(%x, %z), dimensions={1}, to_apply=%add")
    assert (total.kind, total.flops) == ("elementwise", 32.0)
    inside = """%f (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %e = f32[8,4]{1,0} exponential(%p)
  ROOT %m = f32[8,4]{1,0} multiply(%e, %p)
}
"""
    assert run_of(x + "  ROOT %y = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%f", inside).flops == 64.0
    keys = "  %x = s32[64]{0} parameter(0)\n"
    assert run_of(keys + "  ROOT %y = s32[64]{0} sort(%x), dimensions={0}, to_apply=%less").kind == "sort"


def test_a_buffer_that_is_only_given_is_no_work():
    assert run_of('  ROOT %y = f32[8]{0:S(5)} custom-call(), custom_call_target="AllocateBuffer"') is None


@pytest.mark.parametrize(
    "last",
    [
        '  ROOT %y = f32[8]{0} custom-call(%x), custom_call_target="mystery"',
        '  ROOT %y = f32[8]{0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="other"}',
        "  ROOT %y = f32[8]{0} convolution(%x, %x), dim_labels=b0f_0io->b0f",
    ],
)
def test_work_that_is_not_known_is_refused_by_name(last):
    with pytest.raises(CountError, match="y: how much work"):
        run_of("  %x = f32[8]{0} parameter(0)\n" + last)


def test_attention_flops_are_those_of_the_released_model():
    text = """  %q = bf16[1] parameter(0)
  ROOT %y = bf16[1] custom-call(%q), custom_call_target="__cudnn$fmhaScaleBiasSoftmax", SHAPES"""
    shapes = "operand_layout_constraints={bf16[2,4096,80,128]{3,2,1,0}, bf16[2,4096,8,128]{3,2,1,0}}"
    module = parse(f"HloModule m\n\nENTRY %main () -> f32[] {{\n{text.replace('SHAPES', shapes)}\n}}\n")
    # PaLM's 2 · 2 · N · H · T for each token, halved (arXiv 2204.02311, appendix B), to one part in T.
    assert attention_flops(module.entry.root) == pytest.approx(2 * 4096 * 4 * 80 * 128 * 4096 / 2, rel=1e-3)
