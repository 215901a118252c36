"""Whole programs: by hand, from XLA:CPU, and one that XLA compiled for four H20s."""

import gzip
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from moe.planner.count import count
from moe.planner.kernels import CountError
from moe.planner.work import Loop, Run, Start, Wait
from parallel.mesh import MeshConfig, make_mesh


def counted(entry: str, computations: str = "", mesh: MeshConfig | None = None, **given):
    text = f"HloModule m, is_scheduled=true\n\n{computations}\nENTRY %main () -> f32[] {{\n{entry}\n}}\n"
    return count(text, mesh or MeshConfig(data=4), 2, **given)


GATHER = """  %w = bf16[8,4]{1,0} parameter(0)
  %x = f32[8,4]{1,0} parameter(1)
  %gather-start = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%w), replica_groups=[1,4]<=[4], SYNC
  %beside = f32[8,4]{1,0} negate(%x)
  %gather-done = bf16[32,4]{1,0} all-gather-done(%gather-start)
  ROOT %after = bf16[32,4]{1,0} negate(%gather-done)"""


def test_what_runs_beside_a_transfer_stands_between_its_start_and_its_end():
    start, beside, wait, after = counted(GATHER.replace(", SYNC", "")).events
    assert isinstance(start, Start)
    assert (start.transfer.kind, start.transfer.axes, start.transfer.nodes) == ("all-gather", ("data",), 2)
    # 256 bytes in the end, of which 3/4 arrive; in a ring 2 of 4 parts enter a node, by its 2 cards.
    assert (start.transfer.inside, start.transfer.across) == (192.0, 64.0)
    assert isinstance(beside, Run)
    assert wait == Wait("gather-start")
    assert isinstance(after, Run)


def test_a_synchronous_transfer_has_nothing_beside_it():
    text = GATHER.replace("SYNC", 'backend_config={"collective_backend_config":{"is_sync":true}}')
    start, wait, *runs = counted(text).events
    assert isinstance(start, Start)
    assert wait == Wait("gather-start")
    assert len(runs) == 2
    start, wait = counted("  %x = f32[8]{0} parameter(0)\n  ROOT %y = f32[8]{0} all-reduce(%x), to_apply=%add").events
    assert (start.transfer.devices, wait) == (4, Wait("y"))


@pytest.mark.parametrize(
    ("line", "kind", "size"),
    [
        ("(f32[8]{0}, bf16[4]{0}) all-reduce(%x, %h), to_apply=%add", "all-reduce", 40),
        ("((f32[8]{0}, bf16[4]{0}), (f32[2]{0}, bf16[1]{0})) reduce-scatter-start(%x, %h)", "reduce-scatter", 40),
        ("((f32[8]{0}, bf16[4]{0}), (f32[32]{0}, bf16[16]{0})) all-gather-start(%x, %h)", "all-gather", 160),
        ("(f32[32]{0}, bf16[16]{0}) all-gather(%x, %h)", "all-gather", 160),
        ("((f32[8]{0}), f32[8]{0}) all-to-all-start(%x)", "all-to-all", 32),
    ],
)
def test_arrays_that_travel_together_add_up(line, kind, size):
    work = counted(f"  %x = f32[8]{{0}} parameter(0)\n  %h = bf16[4]{{0}} parameter(1)\n  ROOT %y = {line}")
    ((times, transfer),) = work.transfers()
    assert (times, transfer.kind) == (1.0, kind)
    # On 2 nodes of 2: a ring sends 3/4 inside, and 2/4 across by two cards; directly, 1/4 and 2/4.
    inside, across = {"all-to-all": (1 / 4, 2 / 4), "all-reduce": (6 / 4, 2 / 4)}.get(kind, (3 / 4, 1 / 4))
    assert (transfer.inside, transfer.across) == (size * inside, size * across)


@pytest.mark.parametrize(("routed_rows", "share"), [(None, 1.0), (25.0, 0.25), (400.0, 1.0)])
def test_a_ragged_exchange_sends_the_rows_that_are_there(routed_rows, share):
    text = """  %x = bf16[100,8]{1,0} parameter(0)
  %o = bf16[400,8]{1,0} parameter(1)
  %s = s32[4]{0} parameter(2)
  ROOT %y = bf16[400,8]{1,0} ragged-all-to-all(%x, %o, %s, %s, %s, %s), replica_groups={{0,1,2,3}}"""
    ((_, transfer),) = counted(text, routed_rows=routed_rows).transfers()
    assert transfer.kind == "ragged-all-to-all"
    assert (transfer.inside, transfer.across) == (1600 * share / 4, 1600 * share / 2)


def test_a_collective_in_a_computation_of_its_own():
    inside = """%wrapped (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  ROOT %rs = f32[2]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}
"""
    text = """  %x = f32[8]{0} parameter(0)
  %begun = ((f32[8]{0}), f32[2]{0}) async-start(%x), calls=%wrapped
  %z = f32[8]{0} negate(%x)
  ROOT %y = f32[2]{0} async-done(%begun)"""
    start, _, wait = counted(text, inside).events
    assert (start.transfer.kind, start.transfer.inside, wait) == ("reduce-scatter", 24.0, Wait("begun"))


HOST = """%put (h: f32[4,8], u: f32[1,8], i: s32[]) -> f32[4,8] {
  %h = f32[4,8]{1,0:S(5)} parameter(0)
  %u = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %new = f32[4,8]{1,0:S(5)} dynamic-update-slice(%h, %u, %i, %i)
}

%take (h: f32[4,8], i: s32[]) -> f32[1,8] {
  %h.1 = f32[4,8]{1,0:S(5)} parameter(0)
  %i.1 = s32[] parameter(1)
  ROOT %row = f32[1,8]{1,0} dynamic-slice(%h.1, %i.1, %i.1), dynamic_slice_sizes={1,8}
}
"""


@pytest.mark.parametrize(
    ("text", "kind", "size"),
    [
        (
            "  %s = (f32[8]{0:S(5)}, f32[8]{0}, u32[]) copy-start(%x)\n"
            "  ROOT %d = f32[8]{0:S(5)} copy-done(%s)",
            "to-host",
            32,
        ),
        (
            "  %s = (f32[4,8]{1,0}, f32[4,8]{1,0:S(5)}, u32[]) copy-start(%h)\n"
            "  ROOT %d = f32[4,8]{1,0} copy-done(%s)",
            "to-device",
            128,
        ),
        ("  ROOT %s = f32[8]{0:S(5)} copy(%x)", "to-host", 32),
        (
            "  %s = ((f32[4,8]{1,0:S(5)}, f32[1,8]{1,0}, s32[]), f32[4,8]{1,0:S(5)}, u32[]) fusion-start(%h, %u, %i), "
            "kind=kLoop, calls=%put\n  ROOT %d = f32[4,8]{1,0:S(5)} fusion-done(%s)",
            "to-host",
            32,
        ),
        (
            "  %s = ((f32[4,8]{1,0:S(5)}, s32[]), f32[1,8]{1,0}, u32[]) fusion-start(%h, %i), kind=kLoop, calls=%take\n"
            "  ROOT %d = f32[1,8]{1,0} fusion-done(%s)",
            "to-device",
            32,
        ),
    ],
)  # fmt: skip
def test_copies_to_the_host_and_back(text, kind, size):
    given = """  %x = f32[8]{0} parameter(0)
  %h = f32[4,8]{1,0:S(5)} parameter(1)
  %u = f32[1,8]{1,0} parameter(2)
  %i = s32[] parameter(3)
"""
    start, wait = counted(given + text, HOST).events
    assert (start.transfer.kind, start.transfer.axes, wait) == (kind, (), Wait("s"))
    assert (start.transfer.inside, start.transfer.across) == (size, 0.0)


LOOP = """%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %y = f32[8]{0} sqrt(%x)
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %y)
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}
"""
TURNS = "  %t = (s32[], f32[8]{0}) parameter(0)\n  ROOT %w = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body"


def test_a_loop_runs_as_often_as_xla_knows():
    work = counted(TURNS + ', backend_config={"known_trip_count":{"n":"15"}}', LOOP)
    (loop,) = work.events
    assert isinstance(loop, Loop)
    assert (loop.times, len(loop.body)) == (15, 1)
    assert (work.flops, work.bytes) == (15 * 8, 15 * 64)


def test_a_loop_runs_up_to_the_constant_of_its_condition():
    condition = """  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n = s32[] constant(7)
  ROOT %yes = pred[] compare(%i.1, %n), direction=LT"""
    (loop,) = counted(TURNS, LOOP.replace("  ROOT %yes = pred[] constant(true)", condition)).events
    assert isinstance(loop, Loop)
    assert loop.times == 7


def test_a_loop_runs_as_often_as_its_scope_says():
    (loop,) = counted(TURNS + ', metadata={op_name="jit(f)/turns_40/while/body/turns_6/while"}', LOOP).events
    assert isinstance(loop, Loop)
    assert loop.times == 6


def test_a_loop_of_unknown_length_is_refused_but_for_attention_in_chunks():
    with pytest.raises(CountError, match="w .*: how often this loop runs is not known"):
        counted(TURNS, LOOP, key_blocks=2.5)
    attending = TURNS + ', metadata={op_name="jit(f)/attention/while"}'
    with pytest.raises(CountError, match="key_blocks"):
        counted(attending, LOOP)
    assert counted(attending, LOOP, key_blocks=2.5).flops == 2.5 * 8


def test_the_branch_with_most_work_is_counted():
    branches = "".join(
        f"%branch{i} (p: f32[{n}]) -> f32[8] {{\n  %p{i} = f32[{n}]{{0}} parameter(0)\n"
        f"  ROOT %r{i} = f32[{n}]{{0}} sqrt(%p{i})\n}}\n\n"
        for i, n in enumerate((2, 64, 8))
    )
    text = """  %i = s32[] parameter(0)
  %x = f32[64]{0} parameter(1)
  ROOT %y = f32[8]{0} conditional(%i, %x, %x, %x), branch_computations={%branch0, %branch1, %branch2}"""
    assert counted(text, branches).flops == 64


def test_a_called_computation_runs_in_its_place():
    inside = "%f (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n  ROOT %r = f32[8]{0} sqrt(%p)\n}\n"
    work = counted("  %x = f32[8]{0} parameter(0)\n  ROOT %y = f32[8]{0} call(%x), to_apply=%f", inside)
    assert [run.name for _, run in work.runs()] == ["r"]


def test_a_program_of_xla_cpus():
    """Three turns of a product, whose weights are gathered in each, and a sum over the devices."""
    mesh, config = make_mesh(MeshConfig(data=2, expert=4)), MeshConfig(data=2, expert=4)

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec(None, "expert")),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )
    def step(x_BD, w_LDD):
        def layer(x_BD, w_DD):
            with jax.named_scope("experts"):
                return jnp.tanh(x_BD @ jax.lax.all_gather(w_DD, "expert", tiled=True)), None

        x_BD, _ = jax.lax.scan(layer, x_BD, w_LDD)
        return jax.lax.psum(x_BD, "data")

    shapes = jax.ShapeDtypeStruct((16, 32), jnp.float32), jax.ShapeDtypeStruct((3, 32, 32), jnp.float32)
    work = count(jax.jit(step).lower(*shapes).compile().as_text(), config, 4)
    products = [(times, run) for times, run in work.runs() if run.kind == "matmul"]
    assert sum(times * run.flops for times, run in products) == 3 * 2 * (16 // 2) * 32 * 32
    assert {run.use for _, run in products} == {"experts"}
    assert all(run.source.startswith("tests/moe/planner/test_count.py:") for _, run in products)
    gathers = [(times, each) for times, each in work.transfers() if each.kind == "all-gather"]
    assert sum(times * each.inside for times, each in gathers) == 3 * 32 * 32 * 4 * 3 / 4
    assert {(each.axes, each.nodes, each.across) for _, each in gathers} == {(("expert",), 1, 0.0)}
    ((times, total),) = [each for each in work.transfers() if each[1].kind == "all-reduce"]
    assert (times, total.axes, total.nodes, total.across) == (1.0, ("data",), 2, 2 * 8 * 32 * 4 / 2)


def test_prefilling_compiled_for_h20s():
    """prefill_h20.hlo.gz: 4 prompts of 512 tokens in two layers with one of 4 experts a token, for data=2 x expert=2;
    without the Triton kernels' byte code, and what only XLA reads. From it came, by hand:"""
    T, D, N, M, H, E, F, L = 512, 256, 4, 2, 64, 4, 512, 2
    with gzip.open(Path(__file__).parent / "prefill_h20.hlo.gz", "rt", encoding="utf-8") as stream:
        work = count(stream.read(), MeshConfig(data=2, expert=2), 2, routed_rows=T)
    products: dict[str, float] = {}
    for times, run in work.runs():
        if run.kind in ("matmul", "grouped_matmul", "attention"):
            products[run.use] = products.get(run.use, 0.0) + times * run.flops
    one_sequence = 1 * T
    assert products == {
        "attention": L * (one_sequence * 2 * D * (2 * N + 2 * M) * H + 4 * N * H * T * (T + 1) // 2),
        "shared_expert": L * one_sequence * 2 * 3 * D * F,
        "experts": L * one_sequence * 2 * 3 * D * F,
        "router": L * one_sequence * 2 * D * E,
    }
    rows = {each.inside for _, each in work.transfers() if each.use == "exchange" and each.kind == "all-to-all"}
    # Rows in bfloat16, half of a buffer of as many for each of two devices; and each expert's count.
    assert rows == {2 * T * D * 2 / 4 * 2, 2 * E * 4 / 4}
    gathered = sum(times * each.across for times, each in work.transfers() if each.axes == ("data",))
    # A device's two experts, as bfloat16; half of them come from the other node.
    assert gathered == L * 3 * 2 * D * F * 2 / 2
    assert {run.source for _, run in work.runs() if run.kind == "grouped_matmul"} == {
        "moe/ops/grouped_matmul/triton.py:104"
    }
