import json
import re
import subprocess
from pathlib import Path

import pytest

from experiments.launch import main

ROOT = Path(__file__).parent.parent.parent
TINY = str(ROOT / "experiments/tiny.py")
HUNYUAN = str(ROOT / "experiments/hunyuan_large.py")
LOCAL = ["local", "--processes", "2", "--devices", "4"]
PODS = ["kubernetes", "--image", "image", "--claim", "claim", "--output", "job.json", "--nodes"]
BATCH = ["slurm", "--output", "job.sbatch", "--nodes"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([*LOCAL, "missing.py"], "missing.py: no such file; give an experiment file"),
        ([*LOCAL, TINY, "--set", "mesh.data=1"], "--processes 2 x --devices 4 are 8 devices, and the mesh expert=4"),
        ([*LOCAL, TINY, "--set", "mesh.dat=1"], "there is no setting 'mesh.dat': did you mean data or mesh.data"),
        ([*LOCAL[:-1], "0", TINY], "--processes 2 --devices 0: give at least 1 of each"),
        ([*BATCH, "4", TINY], "--nodes 4 x --gpus-per-node 8 are 32 devices, and the mesh "),
        ([*PODS, "2", "--gpus-per-node", "0", "--cpu-devices", "2", TINY], "x --cpu-devices 2 are 4 devices, and the"),
        ([*PODS, "64", "--resource", "=8", HUNYUAN], "--resource '=8': give NAME=VALUE"),
        ([*PODS, "64", "--name", "A", HUNYUAN], "--name 'A': Kubernetes takes"),
    ],
)  # fmt: skip
def test_mistakes_are_sentences_and_exit_2(arguments, sentence, capsys, tmp_path):
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_gets_no_logs(capsys, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").write_text("precious")
    assert main([*LOCAL, TINY, "--run-dir", "thesis"]) == 2
    assert "thesis: holds files of something else than a run" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]


def test_a_mistake_that_a_process_finds_is_told_once_and_not_started_again(capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    arguments = ["local", "--processes", "1", "--devices", "8", "--restarts", "3", TINY]
    assert main([*arguments, "--set", "data.paths=nowhere.txt", "--run-dir", "run"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: nowhere.txt: no such file or folder; check data.paths")
    assert told.count("\n") == 1


def test_writes_a_batch_file(capsys, tmp_path):
    arguments = [*BATCH, "64", "--sbatch", "partition=h20", "--env", "NCCL_IB_HCA=mlx5", HUNYUAN, "--steps", "5000"]
    assert main(arguments) == 0
    text = (tmp_path / "job.sbatch").read_text()
    assert "start it with: sbatch job.sbatch" in capsys.readouterr().out
    for part in ("#SBATCH --nodes=64\n", "#SBATCH --partition=h20\n", "#SBATCH --job-name=hunyuan-large\n"):
        assert part in text
    assert "export NCCL_IB_HCA=mlx5\n" in text
    assert f"-m experiments.launch node {HUNYUAN} --steps 5000\n" in text
    assert re.search(r"# Written by: python -m experiments.launch slurm .* --steps 5000\n", text)
    subprocess.run(["bash", "-n", "job.sbatch"], check=True)


def test_writes_the_objects_of_kubernetes(capsys, tmp_path):
    assert main([*PODS, "64", "--resource", "rdma/hca=8", HUNYUAN]) == 0
    assert "start it with: kubectl apply -f job.json" in capsys.readouterr().out
    service, job = json.loads((tmp_path / "job.json").read_text())["items"]
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert job["metadata"]["name"] == "hunyuan-large"
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "rdma/hca": "8"}
    assert container["command"][:5] == ["python3", "-m", "experiments.launch", "node", HUNYUAN]


@pytest.mark.parametrize("way", ["", "local", "slurm", "kubernetes", "node"])
def test_help_says_what_each_way_does(way, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*filter(None, [way]), "--help"])
    assert ended.value.code == 0
    assert "experiment" in capsys.readouterr().out
