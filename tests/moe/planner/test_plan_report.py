import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from moe.planner.plan import Plan, planned
from moe.planner.plan_json import plan_values
from moe.planner.plan_report import ESTIMATED, pictures_of, report_of
from moe.planner.report_html import html
from moe.planner.report_text import print_report
from moe.planner.work import Buffer
from tests.moe.planner.handmade import MEMORY, WORK
from tests.moe.planner.handmade_plan import FACTS, JOB, handmade_plan


@pytest.fixture(scope="module")
def plan() -> Plan:
    return handmade_plan()


@pytest.fixture(scope="module")
def page(plan) -> str:
    return html(report_of(plan, "by hand"), pictures_of(plan))


def text_of(plan: Plan) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        print_report(report_of(plan, "by hand"), console)
    return captured.get()


def estimated(plan: Plan) -> Plan:
    work, memory = replace(WORK, origin="estimated"), replace(MEMORY, origin="estimated")
    return planned(JOB, plan.chip, plan.cluster, work, memory, None)


def test_the_verdict_comes_first(plan):
    lines = text_of(plan).splitlines()
    assert lines[0] == "by hand: one training step on 8 x NVIDIA H20"
    assert lines[1].startswith("fits: 12.00 GiB of 95.00 GiB per GPU, ")
    assert f"MFU {plan.prediction.mfu:.1%}" in lines[1]


def test_buffers_of_a_kind_are_one_row(plan):
    weights = tuple(
        Buffer(1 << 28, "parameters", "f32[8,8]", f"state.params['blocks'][{i}]['experts']['w_up_EDF']", "")
        for i in range(3)
    )
    many = planned(JOB, plan.chip, plan.cluster, WORK, replace(MEMORY, largest=weights), FACTS)
    told = " ".join(text_of(many).split())
    assert "parameters f32[8,8] – params.blocks.0.experts.w_up_EDF 3 256.0 MiB" in told
    assert "params.blocks.1" not in told


def test_what_does_not_fit_says_by_how_much(plan):
    full = planned(JOB, plan.chip, plan.cluster, WORK, replace(MEMORY, allocated=120 << 30), FACTS)
    over = (120 << 30) + full.room.total - full.chip.memory
    assert f"{over / 2**30:.2f} GiB over a GPU's 95.00 GiB" in text_of(full).splitlines()[1]


@pytest.mark.parametrize(
    "words",
    [
        "30 s, 1.75 GiB of host memory, jax 0.10.2",
        "optimizer states 4.00 GiB",
        "peak: alive at once 11.00 GiB",
        "activations bf16[64,4096,2048] moe/model/block.py:41 fusion.7 1 1.00 GiB",
        "experts 32.0 TFLOP – 32.0 TFLOP 64.0 TFLOP 84.2%",
        "all-gather data dense 16 on 16 4 0 B 114.4 MiB",
        "Executed to model FLOPs:",
        "4.00 x 4.00 x none",
        "Modelled: times. Nothing ran.",
    ],
)
def test_the_text_has_the_figures(plan, words):
    assert words in " ".join(text_of(plan).split())


def test_estimates_are_marked_everywhere(plan):
    guess = estimated(plan)
    assert ESTIMATED in " ".join(text_of(guess).split())
    assert ESTIMATED in html(report_of(guess, "by hand"), pictures_of(guess))
    assert plan_values(guess, "by hand")["origin"] == "estimated"
    assert plan_values(guess, "by hand")["compiling"] is None
    assert ESTIMATED not in text_of(plan)


class Page(HTMLParser):
    """Tags that are open and were not closed, and addresses that lead outside."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.pictures = 0

    def handle_starttag(self, tag, attributes):
        self.pictures += tag == "svg"
        for name, value in attributes:
            if name in ("href", "src", "xlink:href") and not (value or "").startswith("#"):
                self.outside.append(value)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "br"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(page):
    parsed = Page()
    parsed.feed(page)
    assert parsed.open == []
    assert parsed.outside == []
    assert parsed.pictures == 3
    assert "<script" not in page
    assert "url(http" not in page
    assert "@import" not in page


def test_the_pictures_have_the_pages_ink(page):
    assert "currentColor" in page
    assert "#010203" not in page


def test_ids_of_pictures_do_not_clash(page):
    ids = [part.split('"')[0] for part in page.split('<clipPath id="')[1:]]
    assert len(ids) == len(set(ids)) > 0


def test_the_json_has_all_figures(plan):
    values = json.loads(json.dumps(plan_values(plan, "by hand")))
    assert set(values) == {
        "version", "experiment", "kind", "origin", "fits", "devices", "tokens", "parameters", "active_parameters",
        "memory", "router", "arithmetic", "exchanges", "prediction", "compiling", "assumptions", "job", "chip",
        "cluster",
    }  # fmt: skip
    assert values["memory"]["parts_bytes"]["optimizer_states"] == 4 << 30
    assert values["memory"]["largest"][0]["source"] == "moe/model/block.py:41"
    assert values["memory"]["spare_bytes"] == plan.spare
    assert values["arithmetic"]["executed_flops"] == 76.001e12
    assert values["arithmetic"]["by_use"]["experts"]["recomputed_flops"] == 32e12
    assert values["compiling"] == {"seconds": 30.2, "host_bytes": FACTS.resident, "jax": "0.10.2"}
    assert [each["load"] for each in values["router"]] == [1.0, 1.5, 2.0, 4.0]
    prediction = values["prediction"]
    assert sum(prediction["terms_seconds"].values()) == pytest.approx(prediction["step_seconds"])
    assert sum(prediction["uses_seconds"].values()) == pytest.approx(prediction["step_seconds"])
    assert prediction["low_seconds"] < prediction["step_seconds"] < prediction["high_seconds"]
    assert sum(each["across_bytes"] for each in values["exchanges"]) == 120e6
    assert values["chip"]["name"] == "h20"
