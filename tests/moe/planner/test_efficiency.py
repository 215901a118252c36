from dataclasses import replace

import pytest

from moe.planner.chips import H20, H100, V100
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


def test_small_tiles_starve_a_fast_chip_and_not_a_slow_one():
    run = Run("gmm", "experts", "grouped_matmul", 2.0 * 65536 * 4096**2, 1.0, "bf16", (8, 65536, 4096, 4096))
    own, library = CALIBRATED, replace(CALIBRATED, grouped_tile=None)

    def ratio(chip):
        return run_seconds(run, chip, own) / run_seconds(run, chip, library)

    assert ratio(H100) > 1.5
    assert ratio(H20) < 1.2


def test_attention_pays_for_exponentials_where_products_are_fast():
    def share(chip, **change):
        run = replace(Run("fmha", "attention", "attention", 1e12, 1.0, "bf16"), **change)
        return run.flops / run_seconds(run, chip, CALIBRATED) / chip.bf16

    assert share(H100) < share(H20)
    assert share(H100, shape=(1, 1, 1, 64)) < share(H100, shape=(1, 1, 1, 128))
    assert share(H100, backward=True) != share(H100)
