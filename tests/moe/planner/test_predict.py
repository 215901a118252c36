from dataclasses import replace

import pytest

from moe.planner.chips import H20, H100, V100
from moe.planner.efficiency import CALIBRATED
from moe.planner.predict import TERMS, predict
from moe.planner.work import Loop, Run, Start, Transfer, Wait, Work
from parallel.network.cluster import Cluster

# A chip and shares of peak with which every duration below is a round number of seconds.
CHIP = replace(H20, bandwidth=1.0, link_rate=1.0, pcie_rate=4.0)
PLAIN = replace(CALIBRATED, memory=1.0, inside=1.0, across=1.0, host=1.0, launch=0.0, error=0.1)
CLUSTER = Cluster(nodes=2, gpus_per_node=2, nics_per_node=2, nic_rate=4e-9)  # half a byte a second


def move(seconds, use="norm"):
    return Run("move", use, "elementwise", flops=0, bytes=seconds, format="bf16")


def send(name="send", inside=0.0, across=0.0, kind="all-to-all", use="exchange"):
    return Transfer(name, use, kind, ("expert",), devices=4, nodes=2, inside=inside, across=across)


def play(*events, **settings):
    settings = {"tokens": 8, "model_flops": 0.0, "efficiency": PLAIN} | settings
    return predict(Work(events, "estimated"), CHIP, CLUSTER, **settings)


def test_a_transfer_is_hidden_by_what_runs_beside_it():
    found = play(Start(send(inside=5)), move(3), Wait("send"), move(2))
    assert found.seconds == pytest.approx(7, abs=1e-3)
    (transfer,) = found.transfers
    assert (transfer.seconds, transfer.exposed, transfer.hidden) == pytest.approx((5, 2, 3), abs=1e-3)
    assert found.terms["memory_bound"] == pytest.approx(5)
    assert found.terms["exposed_inside"] == pytest.approx(2, abs=1e-3)
    assert found.uses == pytest.approx({"norm": 5, "exchange": 2}, abs=1e-3)


def test_a_hidden_transfer_costs_nothing():
    found = play(Start(send(inside=2)), move(3), Wait("send"))
    assert found.seconds == 3
    assert found.transfers[0].exposed == 0


def test_transfers_follow_each_other_and_the_host_has_a_stream_of_its_own():
    two = Start(send("a", inside=2)), Start(send("b", across=2))
    found = play(*two, Start(send("c", inside=4, kind="to-host")), Wait("c"), Wait("a"), Wait("b"))
    # c: 4 bytes at 4 a second; a: until 2; b: at half a byte a second, from 2 until 6.
    assert found.seconds == pytest.approx(6, abs=1e-3)
    assert found.terms["exposed_host"] == pytest.approx(1, abs=1e-3)
    assert found.terms["exposed_inside"] == pytest.approx(1, abs=1e-3)
    assert found.terms["exposed_across"] == pytest.approx(4, abs=1e-3)


def test_inside_and_across_go_on_at_once():
    assert play(Start(send(inside=3, across=2)), Wait("send")).seconds == pytest.approx(4, abs=1e-3)
    assert play(Start(send(inside=7, across=2)), Wait("send")).seconds == pytest.approx(7, abs=1e-3)


def unrolled(times, body):
    return [event for _ in range(times) for event in body]


@pytest.mark.parametrize("times", [0, 1, 2, 3, 10, 100])
def test_a_loop_is_its_body_again_and_again(times):
    # The transfer of one turn is waited for in the next.
    body = (Wait("send"), Start(send(inside=4)), move(3))
    end = Wait("send"), move(1)
    loop, flat = play(Loop(times, body), *end), play(*unrolled(times, body), *end)
    assert loop.seconds == pytest.approx(flat.seconds)
    assert loop.terms == pytest.approx(flat.terms)
    if times:
        (one,), (other,) = loop.transfers, flat.transfers
        assert (one.times, one.seconds, one.exposed) == pytest.approx((other.times, other.seconds, other.exposed))


def test_loops_in_loops():
    inner = Loop(5, (move(1), Start(send(inside=2)), move(1), Wait("send")))
    outer = Loop(6, (move(2), inner))
    assert play(outer).seconds == pytest.approx(play(*unrolled(6, [move(2), *unrolled(5, inner.body)])).seconds)


def test_terms_and_uses_sum_to_the_step():
    events = move(1), Start(send(across=1)), move(1, "optimizer"), Wait("send")
    found = play(Loop(7, events), idle=0.25, efficiency=replace(PLAIN, launch=0.125))
    assert set(found.terms) == set(TERMS)
    assert sum(found.terms.values()) == pytest.approx(found.seconds)
    assert sum(found.uses.values()) == pytest.approx(found.seconds)
    assert found.terms["launches"] == pytest.approx(7 * 0.125 * (1 + 0.75))
    # All but the optimizer idles for a quarter.
    assert found.terms["pipeline_idle"] == pytest.approx((found.seconds - 7 * 1.125) / 4)


def test_rates_of_the_step():
    found = play(move(4), tokens=800, model_flops=4 * 4 * CHIP.bf16 * 0.5)
    assert found.mfu == pytest.approx(0.5)
    assert (found.tokens_per_second, found.tokens_per_second_per_gpu) == (200, 50)
    assert (found.low, found.high) == pytest.approx((3.6, 4.4))


def test_an_uneven_router_slows_the_experts_and_ragged_exchanges_only():
    experts = move(4, "experts")
    ragged, padded = send("r", inside=2, kind="ragged-all-to-all"), send("p", inside=2)
    events = experts, move(1), Start(ragged), Wait("r"), Start(padded), Wait("p")
    assert play(*events).seconds == pytest.approx(9, abs=1e-3)
    assert play(*events, load=2.0).seconds == pytest.approx(8 + 1 + 4 + 2, abs=1e-3)


def test_products_are_nearer_to_the_peak_of_a_slow_chip():
    def mfu(chip):
        product = Run("dot", "attention", "matmul", 2.0 * 8192**3, 3 * 2 * 8192**2, "bf16", (1, 8192, 8192, 8192))
        work = Work((product,), "compiled")
        return predict(work, chip, Cluster(gpus_per_node=1), tokens=1, model_flops=product.flops).mfu

    assert 0.6 < mfu(H100) < 0.8 < mfu(H20) < 0.95
    # Volta computes bfloat16 in float32, at an eighth of what it does in float16.
    assert mfu(V100) < 0.126
