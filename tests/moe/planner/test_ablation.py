import json
from dataclasses import replace

import pytest
from rich.console import Console

from moe.planner.ablation import Row, ablation_report, ablation_values, draw_levers, exposed_of
from moe.planner.levers import Variant
from moe.planner.pictures import svg
from moe.planner.plan import planned
from moe.planner.report_html import html
from moe.planner.report_text import print_report
from tests.moe.planner.handmade import MEMORY, WORK
from tests.moe.planner.handmade_plan import FACTS, JOB, handmade_plan

FULL = handmade_plan()
TWICE = replace(WORK, events=WORK.events * 2)
LARGE = planned(JOB, FULL.chip, FULL.cluster, TWICE, replace(MEMORY, allocated=120 << 30), FACTS)
TABLES = {
    "h20": [
        Row(None, FULL, loss=1.25),
        Row(Variant("FSDP", "off", "copies"), LARGE),
        Row(Variant("pipeline", "on", "stage=2"), None, "3 layers do not divide over 2 stages"),
    ]
}


def test_the_table_has_a_row_a_lever():
    console = Console(width=220)
    with console.capture() as captured:
        print_report(ablation_report(TABLES, "by hand"), console)
    told = [" ".join(line.split()) for line in captured.get().splitlines()]
    full = next(line for line in told if line.startswith("full recipe"))
    assert full.startswith("full recipe 12.00 GiB yes 76.0 TFLOP")
    assert full.endswith("1.00 x 1.250")
    over = ((120 << 30) + LARGE.room.total - LARGE.chip.memory) / 2**30
    without = next(line for line in told if line.startswith("without FSDP"))
    assert f"120 GiB no, {over:.2f} GiB over 152 TFLOP" in without
    assert without.endswith("2.00 x –")
    assert any(line.startswith("with pipeline – no such program") for line in told)
    assert "with pipeline: 3 layers do not divide over 2 stages" in told
    assert "without FSDP a token costs 2.00 x; 1 of 1 levers are needed for it to fit" in " ".join(told[:3])


def test_the_json_has_the_same():
    values = json.loads(json.dumps(ablation_values(TABLES, "by hand")))
    full, fsdp, pipeline = values["chips"]["h20"]
    assert full["cost"] == 1
    assert full["loss"] == 1.25
    assert fsdp["cost"] == pytest.approx(2, rel=1e-6)
    assert fsdp["executed_flops"] == 2 * 76.001e12
    assert fsdp["step_seconds"] == LARGE.prediction.seconds
    assert not fsdp["fits"]
    assert (fsdp["lever"], fsdp["turned"], fsdp["instead"]) == ("FSDP", "off", "copies")
    assert pipeline["refusal"].startswith("3 layers")
    assert "step_seconds" not in pipeline


def test_exposed_bytes_are_those_that_are_waited_for():
    moved, seconds = exposed_of(FULL)
    assert moved == pytest.approx(4 * (60e6 + 20e6))  # the gather hides behind the attention
    assert seconds == pytest.approx(FULL.prediction.terms["exposed_inside"] + FULL.prediction.terms["exposed_across"])


def test_the_picture_says_what_does_not_fit():
    picture = svg(draw_levers(TABLES), "levers")
    assert "2.00 x, does not fit" in picture
    assert "without FSDP" in picture
    assert "pipeline" not in picture
    assert "<svg" in html(ablation_report(TABLES, "by hand"), {"levers": draw_levers(TABLES)})
