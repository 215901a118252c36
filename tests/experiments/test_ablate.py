import json
from pathlib import Path

import pytest
from rich.console import Console

from experiments.ablate import losses_of, main, parser
from experiments.run import load_experiment
from moe.planner.ablation import Row
from moe.planner.levers import Variant

ROOT = Path(__file__).parent.parent.parent
TINY = str(ROOT / "experiments/tiny.py")


def test_one_row_a_lever_and_chip(capsys, tmp_path):
    files = [tmp_path / name for name in ("levers.json", "levers.html", "levers.png")]
    arguments = [f"--{file.suffix[1:].replace('png', 'picture')}={file}" for file in files]
    assert main([TINY, "--chip", "h20,h100", "--estimate", *arguments]) == 0
    told = capsys.readouterr()
    assert "Estimated, not compiled" in told.out
    assert "h20: 1 of 15, mixture of experts off" in told.err
    values = json.loads(files[0].read_text("utf-8"))
    assert list(values["chips"]) == ["h20", "h100"]
    rows = {row["lever"]: row for row in values["chips"]["h20"]}
    assert len(rows) == 16
    assert rows[""]["cost"] == 1
    assert "is not estimated" in rows["8-bit products"]["refusal"]
    assert all(row["refusal"] == "" for lever, row in rows.items() if lever != "8-bit products")
    assert rows["bfloat16"]["cost"] > 1
    assert rows["recomputation"]["executed_flops"] > rows[""]["executed_flops"]
    assert rows["GQA"]["parameters"] > rows[""]["parameters"]
    assert rows["mixture of experts"]["parameters"] < rows[""]["parameters"]
    assert "levers.html" not in files[1].read_text("utf-8")
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_a_lever_that_the_rest_forbids_says_why(capsys):
    assert main([TINY, "--chip", "h20", "--estimate", "--set", "data.batch_size=8"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "with pipeline – no such program" in told
    assert "with pipeline: data.batch_size=8 does not divide over" in told


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([TINY, "--chip", "h20,h21", "--estimate"], "chip 'h21': give one of "),
        (["missing.py", "--chip", "h20"], "missing.py: no such file"),
    ],
)
def test_mistakes_are_sentences_and_exit_2(arguments, sentence, capsys):
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_each_variant_is_trained_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {
        "mesh.data": 1, "mesh.expert": 2, "data.batch_size": 4, "data.sequence_length": 32, "optimizer.warmup_steps": 1,
        "model.num_layers": 2,
    }  # fmt: skip
    experiment = load_experiment(Path(TINY)).vary(small)
    rows = [
        Row(None, None),
        Row(Variant("GQA", "off", "", {"model.num_kv_heads": 8}), None),
        Row(Variant("GPUDirect RDMA", "off", "", {}, {"gpudirect": False}), None),
        Row(Variant("offload", "on", "", {"model.num_kv_heads": 3}), None),
    ]
    losses = losses_of(experiment, rows, 3, Console(quiet=True))
    assert set(losses) == {"full recipe", "without GQA"}
    assert all(7 < loss < 10 for loss in losses.values())
    assert len(list((tmp_path / "runs/tiny-ablate").iterdir())) == 2


def test_help_says_all(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    told = capsys.readouterr().out
    for word in ("--chip", "--train", "--json", "--html", "--picture", "--estimate", "examples", "exit codes"):
        assert word in told
