import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from experiments.run import main
from moe.train.loop import Outcome

ROOT = Path(__file__).parent.parent.parent
TINY = str(ROOT / "experiments/tiny.py")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["missing.py"], "missing.py: no such file; give an experiment file"),
        ([TINY, "--set", "optimizer.learning_rat=1"], "did you mean optimizer.learning_rate"),
        ([TINY, "--set", "optimizer.learning_rate=fast"], "optimizer.learning_rate='fast': give a number"),
        ([TINY, "--set", "optimizer.learning_rate"], "give PATH=VALUE"),
        ([TINY, "--steps", "5"], "warm up for fewer steps"),
        ([TINY, "--set", "mesh.data=16", "--set", "data.batch_size=64"], "needs 64 devices, and 8 cpu devices"),
        ([TINY, "--processes", "2"], "without --coordinator and --process: give all of --coordinator, --processes"),
        ([TINY, "--set", "data.paths=nowhere.txt"], "nowhere.txt: no such file or folder; check data.paths"),
    ],
)  # fmt: skip
def test_mistakes_are_sentences_and_exit_2(arguments, sentence, capsys, tmp_path):
    jax.devices()  # Before JAX has started, a mesh of 64 would have 64 virtual devices made.
    assert main([*arguments, "--run-dir", str(tmp_path / "run")]) == 2
    told = capsys.readouterr()
    assert sentence in told.err
    assert "Traceback" not in told.err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_changes_its_mesh_in_its_own_folder_only(capsys):
    assert main([TINY, "--remesh"]) == 2
    assert "--remesh without --run-dir: give the folder of the run that shall go on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("x = 1", "defines no `experiment = Experiment(...)`"),
        ("experiment = 3", "defines no `experiment = Experiment(...)`"),
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("experiment = (", "SyntaxError"),
    ],
)
def test_files_that_are_no_experiment(source, sentence, capsys, tmp_path):
    (tmp_path / "mine.py").write_text(source)
    assert main([str(tmp_path / "mine.py")]) == 2
    assert sentence in capsys.readouterr().err


def test_show_prints_every_setting(capsys):
    assert main([TINY, "--show", "--set", "model.router.top_k=2"]) == 0
    told = capsys.readouterr().out
    assert "model.router.top_k" in told
    assert "optimizer.learning_rate" in told


def test_help_says_all():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.run", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for word in ("--set", "--steps", "--run-dir", "--show", "--remesh", "exit codes", "examples"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("several", "kept"), [([], 1), (["--coordinator", "a:1", "--processes", "2", "--process", "0"], 0)]
)
def test_one_process_keeps_its_programs(several, kept, monkeypatch):
    calls = []
    monkeypatch.setattr("experiments.run.keep_programs", lambda: calls.append("keep"))
    monkeypatch.setattr("experiments.run.initialize", lambda *_: None)
    monkeypatch.setattr("experiments.run.run", lambda *_, **__: Outcome(True, 1, None, 0))
    assert main([TINY, *several]) == 0
    assert len(calls) == kept


@pytest.mark.slow
def test_a_run_folder_in_use_or_of_another_run_is_refused(tmp_path):
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "experiments.run", TINY, "--run-dir", str(run),
        "--set", "data.sequence_length=32", "--set", f"data.cache={tmp_path / 'cache'}",
    ]  # fmt: skip
    first = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert f"in use by process {first.pid} on " in second.stderr
    first.terminate()
    assert first.wait(timeout=120) == 143
    other = subprocess.run([*command, "--steps", "60"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert "another configuration (training.steps: 120 there, 60 now)" in other.stderr
