import os
import subprocess

import pytest

from experiments.launching.job import Job
from experiments.launching.slurm import job_file


def written(options=None, **changes):
    job = Job(**{"name": "big", "run": ["e.py", "--set", "data.paths=a b.txt"], "nodes": 64} | changes)
    return job_file(job, command="the command", python="/venv/python", options=options or {})


def directives(text):
    return {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}


def test_one_process_a_machine_takes_all_its_gpus():
    text = written()
    assert directives(text) == {
        "--job-name=big", "--nodes=64", "--ntasks-per-node=1", "--gpus-per-node=8", "--output=big-%j.log",
        "--open-mode=append", "--signal=TERM@300", "--requeue",
    }  # fmt: skip
    assert "/venv/python -m experiments.launch node e.py --set 'data.paths=a b.txt'" in text
    assert "# Written by: the command" in text


def test_processes_of_a_machine_share_its_gpus():
    assert {"--ntasks-per-node=4", "--gpus-per-node=8", "--gpus-per-task=2"} <= directives(
        written(processes_per_node=4)
    )


def test_options_of_sbatch_are_added_or_replace_ours():
    found = directives(written({"partition": "h20", "output": "x.log", "exclusive": ""}))
    assert {"--partition=h20", "--output=x.log", "--exclusive"} <= found
    assert "--output=big-%j.log" not in found


def test_on_cpu_the_devices_are_said():
    text = written(gpus_per_node=0, cpu_devices=2, environment={"A": "b c"})
    assert not any("gpus" in directive for directive in directives(text))
    assert "export JAX_PLATFORMS=cpu\nexport LEVERAGE_DEVICES=2\nexport A='b c'\n" in text


@pytest.mark.parametrize(
    ("codes", "starts", "code", "requeued"),
    [
        ([0], 1, 0, False),
        ([1, 0], 2, 0, False),
        ([3, 137, 1, 0], 3, 1, False),
        ([2], 1, 2, False),
        ([1, 143], 2, 143, True),
    ],
)
def test_what_the_job_does_after_each_exit_code(tmp_path, codes, starts, code, requeued):
    """The file itself, run by bash, with an srun that ends with one code after the other."""
    for number, ended in enumerate(codes):
        (tmp_path / f"code{number}").write_text(str(ended))
    count = (
        f"n=$(cat {tmp_path}/n 2>/dev/null || echo 0); echo $((n + 1)) > {tmp_path}/n; exit $(cat {tmp_path}/code$n)"
    )
    for name, body in (("srun", count), ("scontrol", f'echo "$@" > {tmp_path}/scontrol_said')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash"], input=written(restarts=2), text=True, capture_output=True, env=environ, check=False)
    assert done.returncode == code, done.stderr
    assert int((tmp_path / "n").read_text()) == starts
    assert (tmp_path / "scontrol_said").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol_said").read_text() == "requeue 7\n"
