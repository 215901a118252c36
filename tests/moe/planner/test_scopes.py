"""What work is for, from names as JAX and XLA write them."""

import pytest

from moe.planner.hlo import parse
from moe.planner.scopes import purpose, use_of

BODY = "jit(step)/transpose(jvp())/while/body/closed_call/checkpoint"


@pytest.mark.parametrize(
    ("name", "use"),
    [
        (f"{BODY}/attention/BTD,DNH->BTNH/dot_general", "attention"),
        (f"{BODY}/attention/norm/mul", "norm"),
        (f"{BODY}/feed_forward/shard_map/experts/grouped_matmul_rows/pallas_call", "experts"),
        (f"{BODY}/feed_forward/shard_map/dispatch/jit(argsort)/sort", "exchange"),
        (f"{BODY}/feed_forward/shared_expert/BTD,DF->BTF/dot_general", "shared_expert"),
        ("jit(step)/jvp(embedding)/sharding_constraint", "embedding"),
        ("jit(step)/transpose(jvp(final_norm))/mul", "norm"),
        ("jit(step)/jvp(head)/shard_map/while/body/closed_call/backward/BTV,VD->BTD/dot_general", "head"),
        ("state.params['stacks'][0]['blocks'][0]['attention']['w_q_DNH']", "attention"),
        (f"{BODY}/feed_forward/add", None),
        ("jit(step)/attentions/normal/mul", None),
        ("", None),
    ],
)
def test_the_innermost_scope_says_the_use(name, use):
    assert use_of(name) == use


def found_in(entry: str, name: str, computations: str = ""):
    module = parse(f"HloModule m\n\n{computations}\nENTRY %main (a: f32[8]) -> f32[8] {{\n{entry}\n}}\n")
    return purpose(module, module.entry, module.entry.instructions[name])


@pytest.mark.parametrize(
    ("name", "recomputed", "backward"),
    [
        ("jit(step)/jvp()/while/body/closed_call/attention/mul", False, False),
        (f"{BODY}/attention/mul", False, True),
        (f"{BODY}/rematted_computation/attention/mul", True, True),
        # A stage of a pipeline runs its layers again by itself (parallel/pipeline.py).
        ("jit(step)/shard_map/while/body/jvp(recomputed)/while/body/attention/mul", True, True),
        ("jit(step)/shard_map/while/body/transpose(jvp(recomputed))/while/body/attention/mul", False, True),
        ("jit(step)/jvp(head)/while/body/closed_call/backward/mul", False, True),
        ("jit(step)/attention/transpose", False, False),
    ],
)
def test_forward_backward_and_again(name, recomputed, backward):
    found = found_in(f'  ROOT %a = f32[8]{{0}} negate(), metadata={{op_name="{name}"}}', "a")
    assert (found.recomputed, found.backward) == (recomputed, backward)


def test_what_xla_rematerialises_is_recomputed():
    assert found_in(
        '  ROOT %a.remat2 = f32[8]{0} negate(), metadata={op_name="jit(f)/norm/neg"}', "a.remat2"
    ).recomputed


NAMELESS = """  %w = f32[8]{0} parameter(0)
  %gather = f32[64]{0} all-gather(%w), dimensions={0}
  %bitcast = f32[8,8]{1,0} bitcast(%gather)
  %product = f32[8,8]{1,0} negate(%bitcast), metadata={op_name="jit(f)/experts/dot_general"}
  %sum = f32[8,8]{1,0} all-reduce(%product), to_apply=%add
  %after = f32[8,8]{1,0} negate(%sum), metadata={op_name="jit(f)/optimizer/mul"}
  %other = f32[8]{0} copy(%w)
  %both = (f32[8]{0}, f32[8,8]{1,0}) tuple(%other, %after)
  %part = f32[8]{0} get-tuple-element(%both), index=0
  %routed = f32[8]{0} negate(%part), metadata={op_name="jit(f)/router/neg"}
  %copy = f32[8,8]{1,0} get-tuple-element(%both), index=1
  ROOT %root = f32[8,8]{1,0} copy(%copy)"""


@pytest.mark.parametrize(
    ("name", "use"), [("gather", "experts"), ("sum", "experts"), ("root", "optimizer"), ("other", "router")]
)
def test_what_has_lost_its_name_takes_its_neighbours(name, use):
    assert found_in(NAMELESS, name).use == use


def test_a_fusion_without_a_name_is_for_what_most_of_it_is_for():
    inside = """%f (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %one = f32[8]{0} negate(%p), metadata={op_name="jit(f)/norm/neg"}
  %two = f32[8]{0} negate(%one), metadata={op_name="jit(f)/router/neg"}
  ROOT %three = f32[8]{0} negate(%two), metadata={op_name="jit(f)/router/neg"}
}
"""
    entry = "  %a = f32[8]{0} parameter(0)\n  ROOT %b = f32[8]{0} fusion(%a), kind=kLoop, calls=%f"
    assert found_in(entry, "b", inside).use == "router"
