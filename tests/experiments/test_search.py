import json
from pathlib import Path

import pytest

from experiments.overrides import parse_changes
from experiments.plan import job_of
from experiments.run import load_experiment
from experiments.search import main
from moe.planner.chips import H20
from moe.planner.plan import make_plan
from parallel.network.cluster import Cluster

TINY = Path(__file__).parent.parent.parent / "experiments/tiny.py"
ASKED = [str(TINY), "--chip", "h20", "--gpus", "4", "--estimate"]


def test_the_best_layout_of_all_is_found_and_the_others_say_why_they_lost(capsys, tmp_path):
    file = tmp_path / "search.json"
    assert main([*ASKED, "--json", str(file)]) == 0
    told = json.loads(file.read_text("utf-8"))
    assert told["compiled"] == 0
    assert told["fit_by_estimate"] + told["do_not_divide"] <= told["layouts"]
    experiment = load_experiment(TINY)
    cluster = Cluster(nodes=1, gpus_per_node=4)

    def seconds(settings: list[str]) -> float:
        job = job_of(experiment.vary(parse_changes(experiment, settings)), "train")
        return make_plan(job, H20, cluster, estimated=True).prediction.seconds

    best = seconds(told["best"]["settings"])
    times = [seconds(other["settings"]) for other in told["others"]]
    assert times == sorted(times)
    assert best <= times[0]
    assert all("slower: " in other["why_lost"] for other in told["others"])
    shown = capsys.readouterr().out
    assert f"--set {told['best']['settings'][0]}" in shown
    assert "all of it estimated, nothing compiled" in shown


def test_the_same_search_gives_the_same_answer(capsys):
    told = []
    for _ in range(2):
        assert main([*ASKED, "--gpus", "2"]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]


def test_what_fits_nowhere_says_how_much_lacks(capsys):
    too_much = ["--set", "model.d_model=65536", "--set", "model.num_layers=64", "--set", "model.d_expert=262144"]
    assert main([*ASKED, *too_much, "--gpus", "1"]) == 3
    shown = capsys.readouterr().out
    assert "nothing fits" in shown
    assert "lacks " in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpus", "12"], "--gpus 12: give whole nodes of 8"),
        (["--gpus", "0"], "--gpus 0: give whole nodes"),
        (["--chip", "h21"], "chip 'h21': give one of"),
    ],
)
def test_mistakes(arguments, sentence, capsys):
    assert main([*ASKED, *arguments]) == 2
    assert sentence in capsys.readouterr().err
