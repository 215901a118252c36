"""Training over real processes of this machine: the same numbers as one process, whatever happens to them."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from rich.console import Console

from experiments.launching.supervise import GRACE_SECONDS
from experiments.run import load_experiment, run
from moe.train.run_folder import RunFolderError
from tests.experiments.processes import CLOSE, Launched, assert_close, assert_same, losses, process_id, untimed, written

QUICK = {"model.num_layers": 1, "training.steps": 3, "data.held_out": 0.0, "mesh.data": 2, "mesh.expert": 2}
FOUR = {"mesh.data": 4, "mesh.expert": 2, "data.batch_size": 8}


def alone(file, path, changes=None, **arguments):
    """Trains in this process."""
    return run(load_experiment(file).vary(changes or {}), path, Console(quiet=True), **arguments)


def test_two_processes_train_as_one(tmp_path):
    file = written(tmp_path, QUICK)
    told = Launched(file, tmp_path / "two", 2).end(0)
    alone(file, tmp_path / "one")
    assert_close(tmp_path / "two", tmp_path / "one")
    # Process 0 tells, the other one's part is in its log.
    assert "[0] sample" in told
    assert "[1]" not in told
    assert (tmp_path / "two/logs/process-1.log").stat().st_size
    assert json.loads((tmp_path / "two/environment.json").read_text())[0]["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"mesh.data": 1, "mesh.expert": 1, "mesh.sequence": 4, "layout.sequence": "ring"},
        {"model.num_kv_heads": 2, "mesh.data": 1, "mesh.expert": 2, "mesh.tensor": 2},
    ],
    ids=["ring across processes", "experts across processes"],
)
def test_what_processes_share_besides_the_batch(tmp_path, changes):
    file = written(tmp_path, QUICK | changes)
    Launched(file, tmp_path / "two", 2).end(0)
    alone(file, tmp_path / "one", {"mesh.data": 1, "mesh.expert": 1, "mesh.sequence": 1, "mesh.tensor": 1})
    assert_close(tmp_path / "two", tmp_path / "one")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("four")


@pytest.fixture(scope="module")
def undisturbed(folder):
    """The file and the run folder of four processes that nothing disturbs."""
    file = written(folder, FOUR)
    Launched(file, folder / "undisturbed", 4).end(0)
    return file, folder / "undisturbed"


@pytest.mark.slow
def test_four_processes_train_as_one(undisturbed, folder):
    file, path = undisturbed
    alone(file, folder / "one")
    assert_close(path, folder / "one")


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 2])
def test_a_killed_process_ends_all_and_the_restart_goes_on_in_the_same_bits(undisturbed, folder, killed):
    file, path = undisturbed[0], folder / f"killed{killed}"
    launched = Launched(file, path, 4)
    launched.wait_for_step(6)
    os.kill(process_id(path, killed), signal.SIGKILL)
    told = launched.end(1)
    assert f"failed: process {killed} of 4 was killed by SIGKILL; the others were ended within" in told
    assert float(told.split("were ended within ")[1].split(" s")[0]) < GRACE_SECONDS + 2
    assert "Kept: the checkpoint of step 4" in told
    assert f"to go on: python -m experiments.launch local --processes 4 --devices 2 --restarts 0 {file}" in told
    Launched(file, path, 4).end(0)
    assert_same(path, undisturbed[1])


@pytest.mark.slow
def test_the_launcher_restarts_by_itself(undisturbed, folder):
    file, path = undisturbed[0], folder / "restarted"
    launched = Launched(file, path, 4, restarts=1)
    launched.wait_for_step(9)
    os.kill(process_id(path, 3), signal.SIGKILL)
    told = launched.end(0)
    assert "restart 1 of 1" in told
    assert "resuming from the checkpoint of step 8" in told
    assert_same(path, undisturbed[1])


@pytest.mark.slow
def test_a_signal_stops_all_after_the_same_step_and_saves(undisturbed, folder):
    file, path = undisturbed[0], folder / "stopped"
    launched = Launched(file, path, 4)
    launched.wait_for_step(5)
    launched.popen.send_signal(signal.SIGTERM)
    told = launched.end(143)
    step = int(told.split("stopped by SIGTERM and saved after step ")[1].split()[0])
    assert step >= 5
    assert (path / f"checkpoints/{step:08d}/manifest.json").exists()
    Launched(file, path, 4).end(0)
    # The step after which it stopped has no validation of its own.
    assert [r for r in untimed(path) if "loss" in r] == [r for r in untimed(undisturbed[1]) if "loss" in r]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"mesh.data": 1, "mesh.expert": 4}, {"mesh.data": 1, "mesh.expert": 1}])
def test_another_number_of_processes_goes_on_on_another_mesh(undisturbed, folder, mesh):
    file, path = undisturbed[0], folder / "-".join(["remeshed", *map(str, mesh.values())])
    shutil.copytree(undisturbed[1], path)
    shutil.rmtree(path / "checkpoints/00000012")
    with pytest.raises(RunFolderError, match="mesh.data: 4 there, 1 now.*or --remesh to go on with it on this mesh"):
        alone(file, path, mesh)
    alone(file, path, mesh, remesh=True)
    assert len(losses(path)) == 12
    np.testing.assert_allclose(losses(path), losses(undisturbed[1]), rtol=CLOSE)
    assert losses(path)[8] != losses(path)[7]
    # From now on that is its mesh.
    alone(file, path, mesh)


@pytest.mark.slow
def test_two_processes_take_up_what_one_began(folder):
    file, path = written(folder / "one", FOUR), folder / "one/run"
    alone(file, path, {"training.checkpoint_every": 4})
    whole = losses(path)
    shutil.rmtree(path / "checkpoints/00000012")
    Launched(file, path, 2, "--set", "mesh.data=2", "--remesh").end(0)
    np.testing.assert_allclose(losses(path), whole, rtol=CLOSE)
