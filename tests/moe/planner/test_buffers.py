"""The reading of XLA's buffer assignment, on a program written by hand; tests/gpu_compile/test_buffers.py holds it to
XLA's own figures."""

import gzip

import pytest

from moe.planner.buffers import memory_of
from moe.planner.compile import Compiled, Facts

PROGRAM = """HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/moe/model/feed_forward.py"
2 "/somewhere/moe/train/loss.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=24 end_line=24 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=58 end_line=58 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

ENTRY %main (w: f32[8,4], m: f32[8,4], x: s32[16]) -> f32[8,4] {
  %w = f32[8,4]{1,0} parameter(0), metadata={op_name="state.params[\\'w\\']"}
  %m = f32[8,4]{1,0} parameter(1), metadata={op_name="state.opt_state[0].mu[\\'w\\']"}
  %x = s32[16]{0} parameter(2), metadata={op_name="batch.tokens_BT"}
  %turned = f32[4,8]{1,0} copy(%w)
  %hidden = f32[100]{0} broadcast(%x), metadata={op_name="jit(step)/jvp()/dot" stack_frame_id=1}
  %loss = f32[2]{0} negate(%hidden), metadata={op_name="jit(step)/jvp()/sum" stack_frame_id=2}
  %gradient = f32[8,4]{1,0} add(%hidden, %loss), metadata={op_name="jit(step)/transpose(jvp())/dot" stack_frame_id=1}
  %in_place = f32[8,4]{1,0} negate(%gradient), metadata={op_name="jit(step)/transpose(jvp())/neg" stack_frame_id=1}
  ROOT %new = f32[8,4]{1,0} subtract(%w, %in_place)
}
"""
BUFFERS = """BufferAssignment:
allocation 0: size 128, parameter 0, shape |f32[8,4]| at ShapeIndex {}, maybe-live-out:
 value: <1 w @0> (size=128,offset=0): f32[8,4]{1,0}
 value: <2 new @0> (size=128,offset=0): f32[8,4]{1,0}
allocation 1: size 128, parameter 1, shape |f32[8,4]| at ShapeIndex {}:
 value: <3 m @0> (size=128,offset=0): f32[8,4]{1,0}
allocation 2: size 64, parameter 2, shape |s32[16]| at ShapeIndex {}:
 value: <4 x @0> (size=64,offset=0): s32[16]{0}
allocation 3: size 4, constant:
allocation 4: size 1, thread-local:
allocation 5: size 256, color 5:
allocation 6: size 1024, preallocated-temp:
 value: <5 turned @0> (size=128,offset=0): f32[4,8]{1,0}
 value: <6 hidden @0> (size=400,offset=128): f32[100]{0}
 value: <7 loss @0> (size=8,offset=600): f32[2]{0}
 value: <8 gradient @0> (size=128,offset=700): f32[8,4]{1,0}
 value: <9 in_place @0> (size=128,offset=700): f32[8,4]{1,0}
 value: <10 pointers{} @0> (size=16,offset=900): (f32[8,4]{1,0}, f32[2]{0})
"""
LIFETIMES = """HloLiveRange (max 9):
  InstructionSequence:
    0:w
    1:m
    2:x
    3:turned
    4:hidden
    5:loss
    6:gradient
    7:in_place
    8:new
  BufferLiveRange:
    turned{}:3-8
    hidden{}:4-6
    loss{}:5-6
    gradient{}:6-7
    in_place{}:7-8
    pointers{}:0-8
  Live ranges at 6 (peak):
    hidden{}: 400 bytes (cumulative: 400 bytes)
"""


@pytest.fixture
def memory(tmp_path):
    for name, text in (("program.hlo", PROGRAM), ("buffers.txt", BUFFERS), ("lifetimes.txt", LIFETIMES)):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    return memory_of(Compiled(tmp_path, Facts(0, 0, 0, 0, 0, 0, 0.0, 0, "")))


def test_the_peak_is_the_fullest_moment(memory):
    """Arguments and constants always; at place 6 the copy, the activation, the loss and the gradient."""
    assert memory.peak == 128 + 128 + 64 + 4 + (128 + 400 + 8 + 128)


def test_values_in_one_place_count_once(memory):
    """At place 7 the gradient is negated in place."""
    assert dict(memory.over_program)[7 / 8] == 128 + 128 + 64 + 4 + 128 + 128


def test_allocated_has_the_whole_block_and_no_constants(memory):
    assert memory.allocated == 128 + 128 + 64 + 1024
    assert memory.host == 256


def test_parts(memory):
    assert memory.parts == {
        "parameters": 128,
        "optimizer_states": 128,
        "batch": 64,
        "activations": 400,
        "gradients": 128,
        "temporaries": 4 + 128 + 8,
    }


def test_buffers_say_what_they_are_and_where_they_began(memory):
    by_name = {each.name: each for each in memory.largest}
    assert [each.bytes for each in memory.largest] == sorted((each.bytes for each in memory.largest), reverse=True)
    assert by_name["hidden"].source == "moe/model/feed_forward.py:24"
    assert by_name["hidden"].part == "activations"
    assert by_name["state.params['w']"].part == "parameters"
    assert "turned of state.params['w']" in by_name
