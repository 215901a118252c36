"""Bytes that kernels touch, against counts by hand."""

import pytest

from moe.planner.hlo import parse
from moe.planner.traffic import traffic


def moved(entry: str, computations: str = ""):
    module = parse(f"HloModule m\n\n{computations}\nENTRY %main () -> f32[] {{\n{entry}\n}}\n")
    return traffic(module, module.entry, module.entry.root)


TABLE = "  %x = f32[32,100]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"


def test_a_slice_of_a_stacked_weight_is_not_the_whole_stack():
    inside = """%f (p: f32[32,100], i: s32[]) -> bf16[1,100] {
  %i = s32[] parameter(1)
  %p = f32[32,100]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %slice = f32[1,100]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,100}
  ROOT %cast = bf16[1,100]{1,0} convert(%slice)
}
"""
    found = moved(TABLE + "  ROOT %y = bf16[1,100]{1,0} fusion(%x, %i), kind=kLoop, calls=%f", inside)
    assert found.read == (400.0, 4.0)
    assert found.written == 200.0
    assert found.bytes == 604.0


def test_what_is_computed_before_a_slice_is_computed_of_the_slice_alone():
    inside = """%f (p: f32[32,100], q: f32[100]) -> f32[2,100] {
  %p = f32[32,100]{1,0} parameter(0)
  %q = f32[100]{0} parameter(1)
  %many = f32[32,100]{1,0} broadcast(%q), dimensions={1}
  %sum = f32[32,100]{1,0} add(%p, %many)
  ROOT %slice = f32[2,100]{1,0} slice(%sum), slice={[0:2], [0:100]}
}
"""
    entry = "  %x = f32[32,100]{1,0} parameter(0)\n  %v = f32[100]{0} parameter(1)\n"
    found = moved(entry + "  ROOT %y = f32[2,100]{1,0} fusion(%x, %v), kind=kLoop, calls=%f", inside)
    assert found == ((800.0, 400.0), 800.0)


def test_an_update_in_place_touches_the_update():
    inside = """%f (p: f32[32,100], u: f32[100], i: s32[]) -> f32[32,100] {
  %p = f32[32,100]{1,0} parameter(0)
  %u = f32[100]{0} parameter(1)
  %i = s32[] parameter(2)
  %row = f32[1,100]{1,0} bitcast(%u)
  %zero = s32[] constant(0)
  ROOT %new = f32[32,100]{1,0} dynamic-update-slice(%p, %row, %i, %zero)
}
"""
    entry = TABLE + "  %u = f32[100]{0} parameter(2)\n"
    found = moved(entry + "  ROOT %y = f32[32,100]{1,0} fusion(%x, %u, %i), kind=kLoop, calls=%f", inside)
    assert found == ((0.0, 400.0, 4.0), 400.0)
    alone = moved(
        TABLE + "  %u = f32[1,100]{1,0} parameter(2)\n  ROOT %y = f32[32,100]{1,0} dynamic-update-slice(%x, %u, %i)"
    )
    assert alone == ((0.0, 400.0, 4.0), 400.0)


def test_an_update_of_something_new_writes_all_of_it():
    inside = """%f (u: f32[1,100], i: s32[]) -> f32[32,100] {
  %u = f32[1,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %none = f32[] constant(0)
  %zeros = f32[32,100]{1,0} broadcast(%none), dimensions={}
  ROOT %new = f32[32,100]{1,0} dynamic-update-slice(%zeros, %u, %i, %i)
}
"""
    entry = "  %u = f32[1,100]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
    found = moved(entry + "  ROOT %y = f32[32,100]{1,0} fusion(%u, %i), kind=kLoop, calls=%f", inside)
    assert found == ((400.0, 4.0), 12800.0)


def test_a_gather_reads_the_rows_it_gathers():
    entry = """  %x = f32[1000,64]{1,0} parameter(0)
  %i = s32[10,1]{1,0} parameter(1)
  ROOT %y = f32[10,64]{1,0} gather(%x, %i), offset_dims={1}, collapsed_slice_dims={0}, slice_sizes={1,64}"""
    assert moved(entry) == ((2560.0, 40.0), 2560.0)


def test_a_scatter_in_place_reads_and_writes_what_it_adds_to():
    entry = """  %x = f32[1000,64]{1,0} parameter(0)
  %i = s32[10,1]{1,0} parameter(1)
  %u = f32[10,64]{1,0} parameter(2)
  ROOT %y = f32[1000,64]{1,0} scatter(%x, %i, %u), to_apply=%add"""
    assert moved(entry) == ((2560.0, 40.0, 2560.0), 2560.0)


def test_a_reduction_reads_all_and_writes_little():
    entry = """  %x = bf16[8,100]{1,0} parameter(0)
  %zero = bf16[] constant(0)
  ROOT %y = bf16[8]{0} reduce(%x, %zero), dimensions={1}, to_apply=%add"""
    assert moved(entry).bytes == pytest.approx(1600 + 2 + 16)


def test_several_results_and_fusions_in_fusions():
    inside = """%inner (a: f32[64], b: f32[8]) -> f32[8] {
  %a = f32[64]{0} parameter(0)
  %b = f32[8]{0} parameter(1)
  %part = f32[8]{0} slice(%a), slice={[0:8]}
  ROOT %sum = f32[8]{0} add(%part, %b)
}

%f (p: f32[64], q: f32[8]) -> (f32[8], bf16[8]) {
  %p = f32[64]{0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %n = f32[8]{0} fusion(%p, %q), kind=kLoop, calls=%inner
  %c = bf16[8]{0} convert(%n)
  ROOT %t = (f32[8]{0}, bf16[8]{0}) tuple(%n, %c)
}
"""
    entry = "  %x = f32[64]{0} parameter(0)\n  %v = f32[8]{0} parameter(1)\n"
    found = moved(entry + "  ROOT %y = (f32[8]{0}, bf16[8]{0}) fusion(%x, %v), kind=kLoop, calls=%f", inside)
    assert found == ((32.0, 32.0), 48.0)


def test_a_product_reads_both_its_operands_whole():
    entry = """  %x = bf16[4,8]{1,0} parameter(0)
  %w = bf16[8,2]{1,0} parameter(1)
  ROOT %y = f32[4,2]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}"""
    assert moved(entry) == ((64.0, 32.0), 32.0)
