import json
from pathlib import Path

import pytest

from experiments.plan import asked_chip, asked_cluster, job_of, main, parser
from experiments.run import load_experiment
from moe.planner import compile as compiling
from moe.planner.chips import CHIPS, ChipError
from parallel.network.cluster import Cluster

ROOT = Path(__file__).parent.parent.parent
TINY = str(ROOT / "experiments/tiny.py")
LARGE = str(ROOT / "experiments/hunyuan_large.py")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["missing.py", "--chip", "h20"], "missing.py: no such file"),
        ([TINY], "no chip: give --chip, one of "),
        ([TINY, "--chip", "h21"], "chip 'h21': give one of "),
        ([TINY, "--chip", "h20", "--set", "model.num_heads=7"], "num_heads=7"),
        ([LARGE, "--chip", "h20", "--nodes", "32"], "has 512 devices, and --nodes 32 x --gpus-per-node 8 are 256 GPUs"),
        ([TINY, "--chip", "h20", "--fabric", "ethernet"], "gpudirect=True with fabric='ethernet'"),
        ([TINY, "--chip", "h20", "--nodes", "0"], "nodes=0: give a whole number"),
        ([TINY, "--chip", "h20", "--links", "nowhere.json"], "nowhere.json"),
    ],
)
def test_mistakes_are_sentences_and_exit_2(arguments, sentence, capsys):
    assert main([*arguments, "--estimate"]) == 2
    told = capsys.readouterr()
    assert sentence in told.err
    assert "Traceback" not in told.err
    assert told.out == ""


def test_an_estimate_is_marked_in_text_json_and_html(capsys, tmp_path):
    files = tmp_path / "plan.json", tmp_path / "plan.html"
    assert main([TINY, "--chip", "h20", "--estimate", "--json", str(files[0]), "--html", str(files[1])]) == 0
    told = capsys.readouterr()
    assert "Estimated, not compiled" in told.out
    assert told.out.startswith("tiny: one training step on 8 x NVIDIA H20\nfits: ")
    values = json.loads(files[0].read_text("utf-8"))
    assert (values["origin"], values["compiling"]) == ("estimated", None)
    assert values["arithmetic"]["executed_to_model"] == pytest.approx(1.0, abs=0.1)
    assert "Estimated, not compiled" in files[1].read_text("utf-8")


def test_without_the_compiler_it_says_what_installs_it_and_estimates(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "can_compile", lambda: False)
    monkeypatch.setattr(compiling, "ROOT", tmp_path)  # where no .venv-plan is
    monkeypatch.setattr(compiling, "_digest_of_sources", lambda: "")
    monkeypatch.chdir(tmp_path)
    assert main([TINY, "--chip", "h20"]) == 0
    told = capsys.readouterr()
    assert "`make plan-setup` installs it; what follows is estimated" in told.err
    assert "Estimated, not compiled" in told.out


def test_what_does_not_fit_exits_3(capsys):
    fewer = ["--set", "mesh.replica=1", "--set", "mesh.data=1", "--set", "data.batch_size=16"]
    assert main([LARGE, "--chip", "h20", "--estimate", *fewer]) == 3
    assert "does not fit" in capsys.readouterr().out


def test_a_file_may_have_its_own_chip_and_cluster(tmp_path, capsys):
    source = Path(TINY).read_text("utf-8") + (
        "\nfrom dataclasses import replace\n"
        "from moe.planner.chips import chip_named\n"
        "from parallel.network.cluster import Cluster\n"
        "chip = replace(chip_named('h20'), name='mine', device='My GPU')\n"
        "cluster = Cluster(nodes=2, gpus_per_node=4, nics_per_node=4, fabric='roce')\n"
    )
    (tmp_path / "mine.py").write_text(source, "utf-8")
    assert main([str(tmp_path / "mine.py"), "--estimate"]) == 0
    told = capsys.readouterr().out
    assert "8 x My GPU" in told
    assert "2 x 4 My GPU" in told
    assert "4 x 400 Gb/s roce a node, GPUDirect RDMA" in told


def test_chips_by_name_and_of_the_file():
    assert asked_chip("h20", {}) is CHIPS["h20"]
    with pytest.raises(ChipError, match="give a Chip"):
        asked_chip(None, {"chip": "h20"})


def test_nodes_are_as_many_as_the_mesh_fills():
    def cluster(path: str, *arguments: str) -> Cluster:
        options = parser().parse_args([path, *arguments])
        return asked_cluster(options, {}, load_experiment(Path(path)), CHIPS["l20"])

    assert cluster(LARGE) == Cluster(nodes=64, gpu_link="pcie")
    assert cluster(TINY, "--gpus-per-node", "4", "--nics", "2").nodes == 2
    assert cluster(str(ROOT / "experiments/speed_158m.py")).gpus_per_node == 1
    assert not cluster(LARGE, "--no-gpudirect").gpudirect
    assert cluster(LARGE, "--nic-rate", "200").nic_rate == 200


def test_the_job_is_the_experiments_step():
    experiment = load_experiment(Path(LARGE)).vary({"training.microbatches": 2, "training.steps": 5000})
    job = job_of(experiment, "train")
    assert (job.microbatches, job.steps, job.batch_size, job.sequence_length) == (2, 5000, 1024, 4096)
    assert (job.model, job.mesh, job.execution) == (experiment.model, experiment.mesh, experiment.execution)
    assert job_of(experiment, "decode").microbatches == 1


def test_help_says_all(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    told = capsys.readouterr().out
    for word in ("--chip", "--nodes", "--kind", "--json", "--html", "--links", "--estimate", "examples", "exit codes"):
        assert word in told
