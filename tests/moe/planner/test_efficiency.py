from dataclasses import replace

import pytest

from moe.planner.chips import H20, H100, H200, V100
from moe.planner.efficiency import CALIBRATED, TILES, filling, peak, run_seconds
from moe.planner.work import Run


def test_whole_waves_fill_a_chip():
    def share(batch, m):
        return filling((batch, m, 128, 1000), 132, ((128, 128),))

    whole = 1000 / 1128
    assert share(132, 128) == share(132, 256) == pytest.approx(whole)
    # One tile more is a wave more, and a row more than a tile has is a tile more.
    assert share(133, 128) == pytest.approx(whole * 133 / 264)
    assert share(132, 129) == pytest.approx(whole * 129 / 256)


def test_a_few_tiles_are_cut_along_the_contracted_axis():
    few = (1, 128, 128, 1 << 20), 132, ((128, 128),)
    assert filling(*few) == pytest.approx(8 / 132, rel=1e-2)
    assert filling(*few, cuts=(1,)) == pytest.approx(1 / 132, rel=1e-2)


def test_large_products_lose_little_and_thin_ones_much():
    large, thin, short = ((1, 8192, 8192, 8192), (1, 16, 8192, 8192), (1, 8192, 8192, 64))
    assert filling(large, 132, TILES) > 0.9
    assert filling(thin, 132, TILES) < 0.3
    assert filling(short, 132, TILES) < 0.4


def test_peaks_of_formats_and_what_xla_converts_to():
    assert peak(H20, "bf16") == 148e12
    assert peak(H20, "f8e4m3fn") == peak(H20, "s8") == 296e12
    assert peak(H20, "f32") == 44e12
    assert peak(V100, "bf16") == 15.7e12
    assert peak(V100, "f16") == 125e12


def test_a_kernel_is_as_slow_as_the_slower_of_arithmetic_and_memory():
    run = Run("dot", "dense", "matmul", 2.0 * 8 * 4096**2, 2 * 4096**2, "bf16", (1, 8, 4096, 4096))
    assert run_seconds(run, H100, CALIBRATED) == run.bytes / (H100.bandwidth * CALIBRATED.memory)
    wide = replace(run, flops=2.0 * 8192 * 4096**2, shape=(1, 8192, 4096, 4096))
    assert run_seconds(wide, H100, CALIBRATED) > wide.flops / (H100.bf16 * CALIBRATED.matmul)


def grouped(rows, experts, n, k, format="bf16", **more):
    shape = (experts, rows, n, k)
    return Run("gmm", "experts", "grouped_matmul", 2.0 * rows * n * k, 1.0, format, shape, **more)


def scores(heads, length, width, *, backward=False):
    flops = (10 if backward else 4) * heads * width * length * (length + 1) / 2
    return Run("fmha", "attention", "attention", flops, 1.0, "bf16", (heads, length, length, width), backward=backward)


def matmul(m, n, k):
    return Run("dot", "dense", "matmul", 2.0 * m * n * k, 1.0, "bf16", (1, m, n, k))


@pytest.mark.parametrize(
    ("run", "masked", "milliseconds"),
    [
        (grouped(16_384, 2, 18_304, 6400), False, 6.97),
        (grouped(16_384, 2, 6400, 18_304), False, 6.53),
        (grouped(16_384, 2, 36_608, 6400), False, 13.1),
        (grouped(16_384, 2, 6400, 18_304, "f8e4m3fn"), False, 4.49),
        (grouped(16_384, 2, 6400, 18_304, "s8"), False, 3.08),
        (grouped(16_384, 2, 6400, 18_304, "f8e4m3fn", block_scaled=True), False, 13.1),
        (matmul(16_384, 4096, 2048), False, 0.400),
        (scores(4 * 16, 4096, 128), False, 0.591),
        (scores(4 * 16, 4096, 128), True, 1.157),
        (scores(4 * 16, 4096, 128, backward=True), False, 1.622),
        (scores(4 * 80, 4096, 80), True, 4.55),
        (scores(4 * 80, 4096, 80, backward=True), True, 14.45),
    ],
)
def test_kernels_take_as_long_as_on_an_h200(run, masked, milliseconds):
    """Medians on one H200, jax 0.11.2 (experiments/LOG.md)."""
    efficiency = replace(CALIBRATED, attention_scores=2.0 if masked else 1.0)
    assert 1e3 * run_seconds(run, H200, efficiency) == pytest.approx(milliseconds, rel=0.15)


def test_grouped_products_lose_clocks_which_count_for_less_where_products_are_slow():
    def share(run, chip):
        return run.flops / run_seconds(run, chip, CALIBRATED) / peak(chip, run.format)

    run = grouped(65_536, 8, 4096, 4096)
    assert share(run, H20) > 0.8 > share(run, H100) / 0.735
    assert share(replace(run, format="f8e4m3fn", block_scaled=True), H100) < share(replace(run, format="s8"), H100) / 2


def test_a_chip_of_a_capability_that_is_not_known_has_the_narrower_tiles():
    own = replace(H100, capability=(12, 0))
    run = grouped(16_384, 2, 6400, 18_304)
    assert run_seconds(run, own, CALIBRATED) == run_seconds(run, replace(H100, capability=(8, 9)), CALIBRATED)


def test_attention_pays_for_exponentials_where_products_are_fast():
    def share(chip, **change):
        run = replace(Run("fmha", "attention", "attention", 1e12, 1.0, "bf16"), **change)
        return run.flops / run_seconds(run, chip, CALIBRATED) / chip.bf16

    assert share(H100) < share(H20)
    assert share(H100, shape=(1, 1, 1, 64)) < share(H100, shape=(1, 1, 1, 128))
    assert share(H100, backward=True) != share(H100)
