"""What is told of turns that were written down by hand."""

import json

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console

from benchmarks.peers import TINY_SIZES
from benchmarks.rivals.comparison import Comparison, Entrant
from benchmarks.rivals.job import Job, Setting
from benchmarks.rivals.pairing import Pair
from benchmarks.rivals.protocol import Turn
from benchmarks.rivals.report import draw_rates, heats_table, tables, verdicts

MIB = 2**20
SLOW, FAST = Setting("Qwen2Moe", "eager", "eager"), Setting("Qwen3Moe", "grouped_mm", "grouped_mm")


def pair(ours: float, rival: float) -> Pair:
    return Pair(
        Turn({"step": ours}, 5.0, peak=100 * MIB, waited=2.0, idle=0.01),
        Turn({"step": rival}, 5.5, peak=200 * MIB, waited=1.0, idle=0.04),
    )


@pytest.fixture
def comparison():
    job = Job("train", "float32", 4, 25, 0, TINY_SIZES)
    about = {"software": "torch 0.0", "parameters": 1000}
    entrants = [
        Entrant(SLOW, about, [pair(1.0, 4.0), pair(2.0, 8.0), pair(1.0, 5.0)]),
        Entrant(FAST, about, [pair(4.0, 8.0), pair(4.0, 10.0), pair(4.0, 4.0)]),
    ]
    heats = {SLOW: {"step": 4.0}, FAST: {"step": 5.0}}
    return Comparison(job, {"software": "jax 0.0", "parameters": 2000}, heats, ["one: failed"], entrants)


def test_verdict(comparison):
    assert list(verdicts(comparison)) == [
        "train step, 0.24M, 4 x 25 tokens, float32, step: 2.00 (1.00 to 2.50) x the best rival's tokens/s "
        "(Qwen3Moe, grouped_mm); peak memory 0.50 x"
    ]


def test_tables(comparison):
    console = Console(width=160, highlight=False)
    with console.capture() as capture:
        for table in (heats_table(comparison), *tables(comparison)):
            console.print(table)
    lines = [" ".join(line.split()) for line in capture.get().splitlines()]
    assert "Qwen2Moe, eager 25.0" in lines
    assert "Leverage 37.5 (25.0 to 100.0) 100 2,000" in lines
    assert "Qwen2Moe, eager 20.0 (12.5 to 25.0) 4.00 (4.00 to 5.00) 200 1,000" in lines
    assert "Qwen3Moe, grouped_mm 12.5 (10.0 to 25.0) 2.00 (1.00 to 2.50) 200 1,000" in lines


def test_idleness_is_the_worst_process(comparison):
    assert comparison.idle() == pytest.approx(0.04)


def test_every_turn_is_kept(comparison):
    kept = json.loads(json.dumps(comparison.to_json()))
    assert [rival["ratios"]["step"] for rival in kept["rivals"]] == [[4.0, 4.0, 5.0], [2.0, 2.5, 1.0]]
    assert kept["rivals"][1]["pairs"][1]["rival"]["seconds"] == {"step": 10.0}
    assert kept["failures"] == ["one: failed"]
    assert kept["heats"][1]["seconds"] == {"step": 5.0}


def test_picture_has_a_bar_for_each_side(comparison):
    figure = draw_rates([comparison])
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [37.5, 20.0, 12.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "Leverage", "Qwen2Moe, eager", "Qwen3Moe, grouped_mm",
    ]  # fmt: skip


def test_without_rivals_that_is_said():
    job = Job("train", "float32", 4, 25, 0, TINY_SIZES)
    alone = Comparison(job, {}, {}, [], [])
    assert list(verdicts(alone)) == ["train step, 0.24M, 4 x 25 tokens, float32: no rival could be measured"]
    assert alone.to_json()["rivals"] == []
