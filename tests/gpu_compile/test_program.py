"""The checks of compiled programs, on programs written by hand."""

import pytest

from moe.planner.hlo import parse
from moe.planner.work import Loop, Run, Start, Transfer, Wait
from tests.gpu_compile.program import copies, synchronous, unhidden

LOOPED = """HloModule step, is_scheduled=true

%narrow (given: f32[1,8,4]) -> bf16[1,8,4] {
  %given = f32[1,8,4]{2,1,0} parameter(0)
  ROOT %narrowed = bf16[1,8,4]{2,1,0} convert(%given)
}

%body (state: (s32[], f32[6,8,4], bf16[6,8,4])) -> (s32[], f32[6,8,4], bf16[6,8,4]) {
  %state = (s32[], f32[6,8,4]{2,1,0}, bf16[6,8,4]{2,1,0}) parameter(0)
  %turn = s32[] get-tuple-element(%state), index=0
  %weights = f32[6,8,4]{2,1,0} get-tuple-element(%state), index=1
  %kept = bf16[6,8,4]{2,1,0} get-tuple-element(%state), index=2
  %zero = s32[] constant(0)
  %layer = f32[1,8,4]{2,1,0} dynamic-slice(%weights, %turn, %zero, %zero), dynamic_slice_sizes={1,8,4}
  %small = bf16[1,8,4]{2,1,0} fusion(%layer), kind=kLoop, calls=%narrow
  %twice = bf16[1,8,4]{2,1,0} add(%small, %small)
  KEEP
  ROOT %next = (s32[], f32[6,8,4]{2,1,0}, bf16[6,8,4]{2,1,0}) tuple(%turn, %weights, %stack)
}

%more (state.1: (s32[], f32[6,8,4], bf16[6,8,4])) -> pred[] {
  %state.1 = (s32[], f32[6,8,4]{2,1,0}, bf16[6,8,4]{2,1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (w: f32[6,8,4], x: bf16[6,8,4]) -> bf16[24,8,4] {
  %w = f32[6,8,4]{2,1,0} parameter(0), metadata={op_name="w"}
  %x = bf16[6,8,4]{2,1,0} parameter(1), metadata={op_name="x"}
  %first = s32[] constant(0)
  %begin = (s32[], f32[6,8,4]{2,1,0}, bf16[6,8,4]{2,1,0}) tuple(%first, %w, %x)
  %loop = (s32[], f32[6,8,4]{2,1,0}, bf16[6,8,4]{2,1,0}) while(%begin), condition=%more, body=%body
  %last = bf16[6,8,4]{2,1,0} get-tuple-element(%loop), index=2
  %gather-start = (bf16[6,8,4]{2,1,0}, bf16[12,8,4]{2,1,0}) all-gather-start(%last), dimensions={0}
  %gather = bf16[12,8,4]{2,1,0} all-gather-done(%gather-start)
  ROOT %again = bf16[24,8,4]{2,1,0} all-gather(%gather), dimensions={0}
}
"""
OF_WEIGHTS = "%stack = bf16[6,8,4]{2,1,0} dynamic-update-slice(%kept, %small, %turn, %zero, %zero)"
OF_A_SUM = "%stack = bf16[6,8,4]{2,1,0} dynamic-update-slice(%kept, %twice, %turn, %zero, %zero)"


def looped(keep: str):
    return parse(LOOPED.replace("KEEP", keep))


@pytest.mark.parametrize(
    ("keep", "further"), [(OF_WEIGHTS, ["stack", "gather-start", "gather", "again"]), (OF_A_SUM, [])]
)
def test_copies_are_followed_through_loops_and_fusions_but_not_through_sums(keep, further):
    found = [(each.instruction.name, str(shape)) for each, shape in copies(looped(keep), lambda name: name == "w")]
    assert [name for name, _ in found] == ["layer", "small", *further]
    assert found[:2] == [("layer", "f32[1,8,4]"), ("small", "bf16[1,8,4]")]
    assert not further or found[3] == ("gather-start", "bf16[12,8,4]")


def test_a_collective_of_one_instruction_is_synchronous():
    bytes_sent = 12 * 8 * 4 * 2
    assert synchronous(looped(OF_A_SUM), bytes_sent) == ["again"]
    assert synchronous(looped(OF_A_SUM), bytes_sent + 1) == []


def test_a_transfer_is_hidden_by_a_product_between_its_start_and_its_end():
    def transfer(name):
        return Transfer(name, "experts", "all-gather", ("data",), 8, 1, 1e9, 0.0)

    product, move = (Run("", "experts", kind, 1e12, 1e9, "bf16") for kind in ("matmul", "data_movement"))
    events = (
        Start(transfer("hidden")), Start(transfer("also")), move, product, Wait("hidden"), Wait("also"),
        Loop(4, (Start(transfer("bare")), move, Wait("bare"))),
        Start(transfer("beside products")), Loop(4, (product,)), Wait("beside products"),
        Start(transfer("beside moves")), Loop(4, (move,)), Wait("beside moves"),
    )  # fmt: skip
    assert [each.name for each in unhidden(events)] == ["bare", "beside moves"]
