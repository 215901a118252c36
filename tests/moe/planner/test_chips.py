from dataclasses import replace

import pytest

from moe.planner.chips import A100, A800, B200, CHIPS, H20, H100, H200, H800, L20, RTX_4090, V100, ChipError, chip_named


def test_the_h20_keeps_below_the_export_rule_by_little():
    assert H20.tpp == 148 * 16 == 2368
    assert round(H20.performance_density, 2) == 2.91
    assert H20.export == "free"


@pytest.mark.parametrize("chip", [H100, H800, H200, A100, A800, B200, RTX_4090])
def test_what_the_rule_of_2023_restricts(chip):
    assert chip.export == "restricted"


def test_what_it_leaves_free():
    assert round(L20.tpp) == 1912
    assert round(L20.performance_density, 1) == 3.1
    assert [chip.export for chip in (L20, V100)] == ["free", "free"]


@pytest.mark.parametrize(
    ("bf16", "die", "export"),
    [
        (299e12, 10000, "free"),  # TPP 4784, density 0.48
        (301e12, 10000, "restricted"),  # TPP 4816
        (99e12, 100, "free"),  # TPP 1584
        (101e12, 270, "restricted"),  # TPP 1616, density 5.99
        (101e12, 280, "notified"),  # density 5.77
        (101e12, 520, "free"),  # density 3.11
        (151e12, 1500, "notified"),  # TPP 2416, density 1.61
        (151e12, 1520, "free"),  # density 1.59
    ],
)
def test_each_limit_of_the_rule(bf16, die, export):
    assert replace(H20, bf16=bf16, fp16=bf16, fp8=0, int8=0, die=die).export == export


def test_a_chip_of_ones_own():
    mine = replace(H100, name="h100-half", bandwidth=H100.bandwidth / 2)
    assert f"memory_bandwidth: {int(H100.bandwidth / 2)}" in mine.target_config


def test_every_chip_says_where_its_figures_stand():
    for chip in CHIPS.values():
        assert chip.sources, chip.name
        assert chip.device in chip.target_config
        # 8-bit products are at most twice as many as 16-bit ones, but for float16 summed in float16.
        assert chip.int8 <= 4 * chip.fp16


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ChipError, match="h20, h100"):
        chip_named("h21")
