"""The written file on a real Slurm of this machine, where its packages are installed."""

import os
import signal
import time

import pytest

from experiments.launch import main
from moe.train.metrics import read_metrics
from tests.experiments.launching.slurm_cluster import absent, ask, cluster
from tests.experiments.processes import ROOT, process_id, written

QUICK = {"mesh.data": 2, "mesh.expert": 2, "training.steps": 400, "model.num_layers": 1, "data.held_out": 0.0}


@pytest.fixture
def slurm(tmp_path):
    if reason := absent():
        pytest.skip(reason)
    (tmp_path / "slurm").mkdir()
    with cluster(tmp_path / "slurm") as environment:
        yield environment


def wait_until(what, seconds=300):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_job_trains_survives_a_kill_and_saves_when_it_is_stopped(slurm, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run, log = tmp_path / "run", tmp_path / "job.log"
    code = main([
        "slurm", "--nodes", "1", "--processes-per-node", "2", "--gpus-per-node", "0", "--cpu-devices", "2",
        "--restarts", "1", "--env", "JAX_DISABLE_MOST_OPTIMIZATIONS=1", "--sbatch", f"output={log}",
        "--output", str(tmp_path / "job.sbatch"), str(written(tmp_path, QUICK)), "--run-dir", str(run),
    ])  # fmt: skip
    assert code == 0
    job = ask(slurm, "sbatch", "--parsable", str(tmp_path / "job.sbatch")).strip()

    def trained(step):
        return any(record["step"] >= step for record in read_metrics(run / "metrics.jsonl"))

    wait_until(lambda: trained(6))
    os.kill(process_id(run, 1), signal.SIGKILL)
    wait_until(lambda: log.read_text().count("compiled the train step") == 2)
    told = log.read_text()
    assert "failed: process 1 of 2 was killed by SIGKILL. Kept: the checkpoint of step" in told
    # The other one, over which nobody watches from outside, notices and says so.
    assert "failed: process 0 of 2" in told
    assert "at attempt 0 of 1; the next goes on from the last checkpoint" in told
    resumed = int(told.split("resuming from the checkpoint of step ")[1].split()[0])
    wait_until(lambda: trained(resumed + 3))
    # As before the time limit: the steps get SIGTERM, and the batch shell does not.
    ask(slurm, "scancel", "--signal=TERM", job)
    wait_until(lambda: "stopped after saving: back into the queue" in log.read_text())
    assert "stopped by SIGTERM and saved after step" in log.read_text()
    assert job in ask(slurm, "squeue", "--noheader")
    ask(slurm, "scancel", job)
    wait_until(lambda: job not in ask(slurm, "squeue", "--noheader"))
