"""HLO text, by hand and from XLA:CPU, read back."""

import jax
import jax.numpy as jnp
import pytest

from moe.planner.hlo import HOST_MEMORY, HloError, parse, parse_instruction, parse_shape

PROGRAM = r"""HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4,8]{1,0})->f32[4,8]{1,0}}

FileNames
1 "/somewhere/checkout/moe/model/block.py"
2 "/somewhere/lib/site-packages/moe/model/block.py"
3 "<frozen runpy>"

FunctionNames
1 "Block.__call__"

FileLocations
1 {file_name_id=3 function_name_id=1 line=88 end_line=88 column=4 end_column=4}
2 {file_name_id=1 function_name_id=1 line=60 end_line=60 column=4 end_column=4}
3 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=4 end_column=4}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}


%fused (param_0: f32[4,8], param_1: s32[]) -> f32[4,8] {
  %param_1 = s32[] parameter(1)
  %param_0 = f32[4,8]{1,0} parameter(0)
  ROOT %negate = f32[4,8]{1,0} negate(%param_0)
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  ROOT %p = (s32[], f32[4,8]{1,0}) parameter(0)
}

%cond (p: (s32[], f32[4,8])) -> pred[] {
  %p.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %fusion = f32[4,8]{1,0} fusion(%x, %zero), kind=kLoop, calls=%fused, metadata={NAME stack_frame_id=3}
  %tuple = (s32[], /*index=1*/f32[4,8]{1,0}) tuple(%zero, %fusion)
  %while = (s32[], f32[4,8]{1,0}) while(%tuple), condition=%cond, body=%body, backend_config={TRIPS}
  ROOT %out = f32[4,8]{1,0} get-tuple-element(%while), index=1
}
""".replace("TRIPS", '"known_trip_count":{"n":"15"}').replace("NAME", r'op_name="jit(step)/attention/[\'x\']"')


def test_a_module_is_read_in_order_with_its_computations():
    module = parse(PROGRAM)
    assert module.name == "jit_step"
    assert list(module.computations) == ["fused", "body", "cond", "main"]
    assert list(module.entry.instructions) == ["x", "zero", "fusion", "tuple", "while", "out"]
    assert module.entry.root.name == "out"
    fusion, loop = module.entry.instructions["fusion"], module.entry.instructions["while"]
    assert fusion.operands == ("x", "zero")
    assert fusion.attributes["kind"] == "kLoop"
    assert [each.name for each in module.called(fusion)] == ["fused"]
    assert [each.name for each in module.computations["fused"].parameters] == ["param_0", "param_1"]
    assert [each.name for each in module.called(loop)] == ["cond", "body"]
    assert loop.trip_count == 15
    assert fusion.trip_count is None
    assert [each.name for each in module.entry.users["fusion"]] == ["tuple"]
    assert module.entry.instructions["out"].numbers("index") == (1,)


def test_the_source_is_the_innermost_frame_of_the_repository():
    module = parse(PROGRAM)
    fusion = module.entry.instructions["fusion"]
    assert fusion.op_name == "jit(step)/attention/['x']"
    # Frame 3 is an installed package's, called from frame 2, called from frame 1, which nobody called.
    assert module.source(fusion) == "moe/model/block.py:60"
    assert module.source(module.entry.instructions["while"]) == ""


@pytest.mark.parametrize(
    ("text", "dims", "layout", "space", "size"),
    [
        ("f32[2,3]{1,0}", (2, 3), (1, 0), 0, 24),
        ("bf16[4096,80]{0,1:T(8,128)S(5)}", (4096, 80), (0, 1), HOST_MEMORY, 655360),
        ("pred[]", (), (), 0, 1),
        ("s4[7]{0:E(4)}", (7,), (0,), 0, 4),
        ("s4[7]{0}", (7,), (0,), 0, 7),
        ("f8e4m3fn[16]{0}", (16,), (0,), 0, 16),
        ("f32[<=8,2]{1,0}", (8, 2), (1, 0), 0, 64),
        ("u8[0]{0}", (0,), (0,), 0, 0),
        ("c64[2]{0}", (2,), (0,), 0, 16),
        ("token[]", (), (), 0, 0),
    ],
)
def test_shapes_and_their_bytes(text, dims, layout, space, size):
    shape = parse_shape(text)
    assert (shape.dims, shape.layout, shape.space, shape.bytes) == (dims, layout, space, size)


def test_tuples_of_tuples():
    shape = parse_shape("((f32[2]{0}, bf16[3]{0}), /*index=1*/(), (s32[], (pred[5]{0})))")
    assert [str(leaf) for leaf in shape.leaves] == ["f32[2]", "bf16[3]", "s32[]", "pred[5]"]
    assert shape.bytes == 8 + 6 + 4 + 5
    assert str(shape.parts[2]) == "(s32[], (pred[5]))"


def test_a_number_format_that_is_not_known_is_named():
    with pytest.raises(HloError, match="'quaternion'"):
        parse_shape("quaternion[2]")


def test_attributes_stand_apart_whatever_they_hold():
    each = parse_instruction(
        r'  ROOT %call.1 = bf16[8,4]{1,0} custom-call(%a, /*index=1*/%b), custom_call_target="__gpu$xla.gpu.triton", '
        r"operand_layout_constraints={bf16[8,2]{1,0}, s32[1]{0}}, replica_groups=[2,4]<=[4,2]T(1,0), "
        r'backend_config={grid_x = 2 : i32, ir = "ML\EFR\22,}{\0A(", name = "x"}, metadata={op_name="f(a,b=1)"}'
    )
    assert (each.name, each.root, each.operands) == ("call.1", True, ("a", "b"))
    assert each.target == "__gpu$xla.gpu.triton"
    assert each.attributes["operand_layout_constraints"] == "{bf16[8,2]{1,0}, s32[1]{0}}"
    assert each.attributes["replica_groups"] == "[2,4]<=[4,2]T(1,0)"
    assert each.attributes["backend_config"].endswith('name = "x"}')
    assert each.op_name == "f(a,b=1)"
    assert each.kernel == "x"


@pytest.mark.parametrize("text", ["", "module @x {}", "HloModule x\n\nnonsense here\n"])
def test_what_is_no_module_is_refused(text):
    with pytest.raises(HloError):
        parse(text)


def test_what_is_no_instruction_is_quoted():
    with pytest.raises(HloError, match="nothing of the sort"):
        parse_instruction("  nothing of the sort")


def test_a_program_of_xlas_is_read_whole():
    def step(x_BD, w_LDD):
        x_BD, _ = jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x_BD, w_LDD)
        return jnp.sort(x_BD), jnp.where(x_BD > 0, 1, 2)

    arrays = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)
    text = jax.jit(step).lower(*arrays).compile().as_text()
    module = parse(text)
    # Every line with an equals sign behind a name, and nothing else, is an instruction.
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    assert sum(len(each.instructions) for each in module.computations.values()) == len(lines)
    loops = [each for part in module.computations.values() for each in part.instructions.values()]
    assert [each.trip_count for each in loops if each.opcode == "while"] == [5]
    for part in module.computations.values():
        assert all(name in part.instructions for each in part.instructions.values() for name in each.operands)
        assert part.root in part.instructions.values()
