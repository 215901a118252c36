from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from moe.model.adapter import LoraConfig, Target
from moe.model.config import ConfigError, ModelConfig, RouterConfig
from moe.model.count import train_flops_per_token
from moe.model.execution import Execution
from moe.model.precision import FULL, Precision
from moe.model.presets import TINY
from moe.planner.chips import H20
from moe.planner.estimate import estimate_work, idle_share
from moe.planner.exchange_work import RowExchange
from moe.planner.implementation import OURS
from moe.planner.job import Job
from moe.planner.predict import predict
from moe.planner.sizes import Sizes
from moe.planner.work import Run
from moe.train.optimizer import OptimizerConfig
from moe.train.state import make_blueprint
from parallel.layout import SINGLE_DEVICE, LayoutConfig
from parallel.mesh import MeshConfig
from parallel.network.cluster import Cluster
from parallel.pipeline import Schedule

MODEL = ModelConfig(4096, 512, 8, 8, 4, 64, 16, 1024, num_shared_experts=1, router=RouterConfig(top_k=2))


def job(kind="train", **changes) -> Job:
    given = {"model": MODEL, "batch_size": 64, "sequence_length": 1024} | changes
    return Job(kind, **given)


def sent(work, use=None, kind=None):
    """(inside, across), bytes."""
    found = [(t, x) for t, x in work.transfers() if use in (None, x.use) and kind in (None, x.kind)]
    return sum(t * x.inside for t, x in found), sum(t * x.across for t, x in found)


@pytest.mark.parametrize("model", [TINY, MODEL, replace(TINY, num_dense_layers=2, d_dense=768, tie_embeddings=False)])
def test_one_device_executes_the_models_flops(model):
    """Against the count from the parameters themselves."""
    length = 1024
    one = job(model=model, batch_size=2, sequence_length=length)
    specs = make_blueprint(model, FULL, Execution(), OptimizerConfig(), SINGLE_DEVICE, steps=1000).specs
    model_flops = train_flops_per_token(model, specs, length)
    # The backward pass computes the scores again: 14 instead of 12 for each pair, of which there are T + 1 for a token.
    pairs = model.num_layers * model.num_heads * model.head_dim
    scores = pairs * (7 * (length + 1) - 6 * length)
    assert estimate_work(one, 8).flops / one.tokens == pytest.approx(model_flops + scores, rel=1e-9)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(data=8), MeshConfig(expert=8), MeshConfig(data=2, tensor=4), MeshConfig(expert=4, sequence=2)],
)
def test_devices_share_the_work(mesh):
    alone, shared = job(), job(mesh=mesh)
    assert estimate_work(shared, 8).flops == pytest.approx(estimate_work(alone, 8).flops / 8, rel=1e-6)


def test_full_recomputation_repeats_the_forward_pass():
    none, full = (estimate_work(job(execution=Execution(remat=remat)), 8) for remat in ("none", "full"))
    forward = sum(t * run.flops for t, run in none.runs() if not run.backward and run.use not in ("head", "embedding"))
    again = sum(t * run.flops for t, run in full.runs() if run.recomputed)
    # But for what makes only the last output of a group, which nothing needs.
    spared = 2 * 64 * 1024 * 512 * 1024 * MODEL.num_layers
    assert again == pytest.approx(forward - spared)
    assert full.flops == pytest.approx(none.flops + again)


def test_padded_blocks_cross_the_node_as_the_exchange_tells():
    # parallel/exchange: (P-1) blocks of min(A·K, limit · E/P) rows, there and back, forward and backward.
    mesh = MeshConfig(expert=16)
    found = estimate_work(job(mesh=mesh), 8)
    tokens, row = 4 * 1024, 512 * 2
    block = min(tokens * 2, tokens * 1)
    ways = 4 * MODEL.num_layers
    assert sent(found, "exchange") == pytest.approx((7 * block * row * ways, 8 * block * row * ways))


def test_chunks_travel_while_experts_compute():
    mesh, cluster = MeshConfig(expert=16), Cluster(nodes=2)
    whole, cut = (job(mesh=mesh, execution=Execution(exchange_chunks=chunks)) for chunks in (1, 4))
    one, four = (estimate_work(each, 8) for each in (whole, cut))
    assert sent(one, "exchange") == pytest.approx(sent(four, "exchange"))
    assert one.flops == four.flops
    waits = [predict(work, H20, cluster, tokens=1, model_flops=1).terms["exposed_across"] for work in (one, four)]
    assert waits[1] < waits[0]


def test_capacity_bounds_the_blocks():
    router = RouterConfig(top_k=1, capacity_factor=1.25)
    sizes = Sizes(job(model=replace(MODEL, router=router), mesh=MeshConfig(expert=16)), 8)
    assert sizes.block == 4 * 80  # 4 sequences, ceil(1.25 · 1024 / 16)
    assert sizes.buffer == 1.25 * sizes.rows


def test_ragged_rows_are_those_that_go_elsewhere():
    found = estimate_work(job(mesh=MeshConfig(expert=16), execution=Execution(exchange="ragged")), 8)
    rows, row = 2 * 4 * 1024, 512 * 2
    inside, across = sent(found, kind="ragged-all-to-all")
    assert (inside, across) == pytest.approx((rows * row * 7 / 16 * 32, rows * row * 8 / 16 * 32))


@pytest.mark.parametrize("consecutive", [False, True])
def test_devices_that_a_token_reaches(consecutive):
    model = replace(MODEL, num_experts=32, router=RouterConfig(top_k=6))
    exchange = RowExchange(Sizes(job(model=model), 8), replace(OURS, consecutive=consecutive), "")
    draw = np.random.default_rng(0)
    tokens = np.arange(3200)[:, None]
    chosen = (6 * tokens + np.arange(6)) % 32 if consecutive else draw.integers(0, 32, (20_000, 6))
    for parts in (2, 8, 32):
        reached = np.mean([len(set(row)) for row in (chosen // (32 // parts)).tolist()])
        assert exchange.reached(parts) == pytest.approx(reached, rel=0.02)


def test_weights_are_gathered_for_each_use_and_their_gradients_summed():
    mesh = MeshConfig(data=8, expert=2)
    work = estimate_work(job(mesh=mesh, execution=Execution(remat="full")), 8)
    gate = [(t, x) for t, x in work.transfers() if x.use == "experts" and ".gate." in x.name]
    numbers = MODEL.num_experts // 2 * 512 * 1024
    (forward,) = (x for _, x in gate if not x.backward)
    (again,) = (x for _, x in gate if x.recomputed)
    (summed,) = (x for _, x in gate if x.backward and not x.recomputed)
    assert forward.axes == again.axes == summed.axes == ("data",)
    # 8 devices, 4 on each of 2 nodes: a ring's share leaves over 4 cards.
    assert (forward.inside, forward.across) == pytest.approx((numbers * 2 * 7 / 8, numbers * 2 * 4 / 8 / 4))
    assert again.across == forward.across
    assert (summed.kind, summed.across) == ("reduce-scatter", forward.across)
    assert all(times == MODEL.num_layers for times, _ in gate)
    queries = next(x for _, x in work.transfers() if "sum.attention.w_q" in x.name)
    assert queries.kind == "reduce-scatter"


def test_with_copies_gradients_are_summed_whole():
    work = estimate_work(job(mesh=MeshConfig(replica=2, data=4, expert=2)), 8)
    transfers = [x for _, x in work.transfers() if x.backward and x.use == "attention"]
    assert {x.kind for x in transfers if not x.recomputed} == {"all-reduce"}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_weights_are_gathered_for_each_pass(remat):
    work = estimate_work(job(mesh=MeshConfig(data=4, expert=2), execution=Execution(remat=remat)), 8)
    for use in ("attention", "experts", "shared_expert", "router"):
        gathers = [x for _, x in work.transfers() if x.use == use and x.kind == "all-gather"]
        forward, again = ([x.inside for x in gathers if x.backward == backward] for backward in (False, True))
        assert forward == again != [], use


def test_zero_1_gathers_parameters_once():
    mesh = MeshConfig(data=2, expert=4)
    work = estimate_work(job(mesh=mesh, layout=LayoutConfig(zero=1), microbatches=4), 8)
    gathers = {x.axes: (t, x.inside) for t, x in work.transfers() if x.kind == "all-gather"}
    experts = 8 * 3 * 4 * 512 * 1024
    others = 8 * (2 * 512 * 8 * 64 + 2 * 512 * 4 * 64 + 512 * 16 + 3 * 512 * 1024) + 4096 * 512
    assert gathers == {("data",): (1, experts * 4 / 2), ("data", "expert"): (1, others * 4 * 7 / 8)}


def test_a_pipeline_computes_in_every_tick():
    schedule = Schedule(4, 2, 8)
    piped = job(mesh=MeshConfig(stage=4), microbatches=8, virtual_stages=2, batch_size=8)
    layers = [(t, run) for t, run in estimate_work(piped, 8).runs() if run.use == "experts"]
    alone = [(t, run) for t, run in estimate_work(job(batch_size=8), 8).runs() if run.use == "experts"]
    forward, whole = (sum(t * r.flops for t, r in runs if not r.backward) for runs in (layers, alone))
    assert forward == pytest.approx(whole / 4 * (1 + schedule.bubble))
    assert idle_share(piped) == pytest.approx(1 - 16 / schedule.forward_ticks)
    # The backward pass begins with the forward one.
    again = sum(t * r.flops for t, r in layers if r.recomputed)
    assert again == pytest.approx(forward)


def test_what_waits_on_the_host_travels_there_and_back():
    states = estimate_work(job(mesh=MeshConfig(data=8), layout=LayoutConfig(optimizer_states="host")), 8)
    D, H, E, F = 512, 64, 16, 1024
    layer = 2 * D * 8 * H + 2 * D * 4 * H + D * E + 3 * E * D * F + 3 * D * F
    both_moments = 2 * 4 * (8 * layer + 4096 * D) / 8
    for kind in ("to-host", "to-device"):
        assert sent(states, kind=kind) == (pytest.approx(both_moments), 0)

    outputs = estimate_work(job(execution=Execution(remat="matmuls_on_host")), 8)
    a_token = 8 * H + 2 * 4 * H + D + E + 2 * F + D  # q, k, v; o; router; gate, up, down of the shared expert
    for kind in ("to-host", "to-device"):
        assert sent(outputs, kind=kind) == (pytest.approx(64 * 1024 * 8 * a_token * 2), 0)


@pytest.mark.parametrize(("frozen", "bytes_each"), [(None, 4), ("bfloat16", 2), ("int8", 1), ("int4", 0.5 + 2 / 128)])
def test_serving_reads_weights_as_they_are_kept(frozen, bytes_each):
    precision = Precision(frozen=frozen)
    work = estimate_work(job("decode", batch_size=1, precision=precision), 8)
    widened = sum(t * run.bytes for t, run in work.runs() if run.name.startswith("widen"))
    matrices = 8 * (2 * 512 * 8 * 64 + 2 * 512 * 4 * 64 + 512 * 16 + 3 * 17 * 512 * 1024)
    assert widened == pytest.approx(0 if bytes_each == 2 else matrices * (bytes_each + 2))


def test_adapters_spare_the_gradients_of_what_is_frozen():
    whole = estimate_work(job(), 8)
    lora = estimate_work(job(lora=LoraConfig(rank=16), precision=Precision(frozen="bfloat16")), 8)

    def products(work, backward):
        kinds = ("matmul", "grouped_matmul")
        return sum(t * r.flops for t, r in work.runs() if r.kind in kinds and r.backward == backward)

    tokens, D, heads, kv = 64 * 1024, 512, 512, 256
    adapters = 2 * tokens * 8 * 16 * (2 * (D + heads) + 2 * (D + kv))
    assert products(lora, False) == pytest.approx(products(whole, False) + adapters)
    # One product backward instead of two for all that is frozen, and two for an adapter's.
    assert products(lora, True) == pytest.approx(products(whole, True) / 2 + 2 * adapters)
    update = sum(run.bytes for _, run in lora.runs() if run.name == "adamw")
    assert update == pytest.approx(32 * 8 * 16 * (2 * (D + heads) + 2 * (D + kv)))


def test_adapters_on_experts_are_products_of_their_rows():
    few, all_targets = (
        estimate_work(job(lora=LoraConfig(rank=16, targets=targets)), 8)
        for targets in (("q", "k", "v", "o"), get_args(Target))
    )
    found = all_targets.flops - few.flops
    # Of each token's two routed experts and the shared one three adapters, forward and twice that backward.
    assert found == pytest.approx(3 * 2 * 64 * 1024 * 8 * 3 * 3 * 16 * (512 + 1024))
    grouped = [t * run.flops for t, run in all_targets.runs() if run.name == "down.a" and run.kind == "grouped_matmul"]
    assert sum(grouped) == pytest.approx(2 * 64 * 1024 * 2 * 8 * 1024 * 16)


@pytest.mark.parametrize(("format", "number"), [(None, 2), ("fp8", (1 + 2 / 64) + 2 * 2)])
def test_decoding_reads_the_cache_and_every_expert(format, number):
    precision = Precision(cache=format)
    work = estimate_work(job("decode", batch_size=32, sequence_length=4096, precision=precision), 8)
    runs = [(t, run) for t, run in work.runs()]
    cache = sum(t * run.bytes for t, run in runs if run.kind == "attention")
    # 8 layers, keys and values, 4 heads of 64; in 8 bits read, widened and read again.
    assert cache == pytest.approx(number * 8 * 2 * 32 * 4096 * 4 * 64, rel=0.01)
    experts = sum(t * run.bytes for t, run in runs if run.kind == "grouped_matmul")
    assert experts == pytest.approx(8 * 3 * 16 * 512 * 1024 * 2, rel=0.05)
    assert not list(work.transfers())


def test_a_kernel_says_where_it_belongs():
    runs = [run for _, run in estimate_work(job(execution=Execution(remat="full")), 8).runs()]
    assert {run.use for run in runs} >= {
        "attention",
        "experts",
        "shared_expert",
        "router",
        "exchange",
        "head",
        "optimizer",
    }
    assert all(isinstance(run, Run) and run.bytes > 0 for run in runs)


@pytest.mark.parametrize("exchange", ["padded", "gathered", "ragged", "hierarchical", "ragged_hierarchical"])
def test_rows_in_8_bits_take_a_byte_a_number_and_one_for_every_32(exchange):
    wide, short = (
        estimate_work(
            job(
                mesh=MeshConfig(expert=16), execution=Execution(exchange=exchange), precision=Precision(exchange=format)
            ),
            8,
        )
        for format in ("bfloat16", "int8")
    )
    expected = tuple(33 / 64 * size for size in sent(wide, "exchange"))
    assert sent(short, "exchange") == pytest.approx(expected)


def test_matrices_gathered_in_8_bits_take_a_byte_a_number_and_one_for_every_block():
    # A device has 512 / 8 of an attention weight's D, in blocks of 32, and 512 / 4 of an expert's.
    wide, short = (
        estimate_work(job(mesh=MeshConfig(data=4, expert=2), precision=Precision(gathered=format)), 8)
        for format in (None, "fp8")
    )
    for use in ("attention", "experts", "shared_expert"):
        inside, across = sent(wide, use, "all-gather")
        assert sent(short, use, "all-gather") == pytest.approx((33 / 64 * inside, across)), use
    assert sent(short, "router") == sent(wide, "router")
    # Both read each share once and write it, in 8 bits; then the whole of it is widened; in each of two passes.
    layer = 512 * (8 + 4 + 4 + 8) * 64 + 3 * 512 * 1024
    experts = 8 * 3 * 512 * 1024
    router = 512 * 16
    moved = 2 * MODEL.num_layers * (layer * (5 / 8 + 3) + experts * (5 / 4 + 3) + router / 8 * 6)
    widened = sum(t * run.bytes for t, run in short.runs() if run.name.startswith("widen"))
    assert widened == pytest.approx(moved)


def test_nothing_is_gathered_below_zero_3():
    with pytest.raises(ConfigError, match=r"layout\.zero=3"):
        job(mesh=MeshConfig(data=8), layout=LayoutConfig(zero=2), precision=Precision(gathered="fp8"))


def test_products_in_8_bits_are_not_estimated():
    with pytest.raises(ConfigError, match="precision.matmuls='fp8': what products in 8 bits take is not estimated"):
        estimate_work(job(precision=Precision(matmuls="fp8")), 8)
    # Serving computes in the wide format.
    estimate_work(job("decode", precision=Precision(matmuls="fp8")), 8)
