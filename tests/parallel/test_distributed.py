import re

import pytest

from parallel.distributed import DistributedError, Processes, detect, node_names

LAUNCHED = {"LEVERAGE_COORDINATOR": "a:1", "LEVERAGE_PROCESSES": "4", "LEVERAGE_PROCESS": "2", "LEVERAGE_DEVICES": "2"}
INDEXED_JOB = {"LEVERAGE_COORDINATOR": "run-0.run:8476", "LEVERAGE_PROCESSES": "4", "JOB_COMPLETION_INDEX": "0"}
SLURM = {
    "SLURM_JOB_ID": "12345", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08],big", "SLURM_JOB_NODELIST": "gpu[01-08],big",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, Processes()),
        ({"LEVERAGE_DEVICES": "3"}, Processes(devices=3)),
        (LAUNCHED, Processes("a:1", 4, 2, 2)),
        (INDEXED_JOB, Processes("run-0.run:8476", 4, 0)),
        # An indexed Job whose pods know nothing of each other.
        ({"JOB_COMPLETION_INDEX": "3"}, Processes()),
        ({"LEVERAGE_PROCESSES": "1", "JOB_COMPLETION_INDEX": "0"}, Processes()),
        (SLURM, Processes("gpu07:22345", 3, 1)),
        (SLURM | {"SLURM_STEP_ID": "2"}, Processes("gpu07:22547", 3, 1)),
        (SLURM | {"LEVERAGE_COORDINATOR": "10.0.0.7:99"}, Processes("10.0.0.7:99", 3, 1)),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, Processes("gpu01:22345", 3, 1)),
        # Within a batch file, before srun; and one task.
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, Processes()),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, Processes()),
        # What experiments.launch says goes before Slurm.
        (SLURM | LAUNCHED, Processes("a:1", 4, 2, 2)),
    ],
)
def test_processes_find_each_other_in_the_environment(environ, found):
    assert detect(environ) == found


def test_flags_go_before_the_environment():
    assert detect(LAUNCHED, coordinator="b:2", count=8, index=7) == Processes("b:2", 8, 7, 2)


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"LEVERAGE_PROCESSES": "4"}, "LEVERAGE_PROCESSES=4 without LEVERAGE_PROCESS: set it to this"),
        ({"LEVERAGE_PROCESSES": "four"}, "LEVERAGE_PROCESSES='four': give a whole number"),
        (LAUNCHED | {"LEVERAGE_COORDINATOR": ""}, "LEVERAGE_PROCESSES=4 without LEVERAGE_COORDINATOR: set it"),
        (LAUNCHED | {"LEVERAGE_COORDINATOR": "a"}, "coordinator 'a': give the machine of process 0 and a free port"),
        (LAUNCHED | {"LEVERAGE_PROCESS": "4"}, "process 4 of 4 processes: counted from 0, so give 0 to 3"),
        (LAUNCHED | {"LEVERAGE_PROCESS": "-1"}, "LEVERAGE_PROCESS='-1': give a whole number"),
        (LAUNCHED | {"LEVERAGE_DEVICES": "0"}, "LEVERAGE_DEVICES=0: give each process at least 1 device"),
        (SLURM | {"SLURM_PROCID": ""}, "SLURM_PROCID='': give a whole number"),
        (
            SLURM | {"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""},
            "SLURM_STEP_NUM_TASKS=3 without SLURM_STEP_NODELIST: start the processes with srun, or set LEVERAGE_COORD",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_or_wrong_is_named(environ, sentence):
    with pytest.raises(DistributedError, match=re.escape(sentence)):
        detect(environ)


def test_flags_come_together():
    with pytest.raises(
        DistributedError, match="without --coordinator and --process: give all of --coordinator, --proc"
    ):
        detect({}, count=4)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a", ["a"]),
        ("a,b2", ["a", "b2"]),
        ("a[01-03,07],b2", ["a01", "a02", "a03", "a07", "b2"]),
        ("gpu[9-11]", ["gpu9", "gpu10", "gpu11"]),
        ("rack[1-2]node[01-02]", ["rack1node01", "rack1node02", "rack2node01", "rack2node02"]),
        ("n[1]-ib", ["n1-ib"]),
        ("c-3,d[098-101]", ["c-3", "d098", "d099", "d100", "d101"]),
    ],
)
def test_node_lists(text, names):
    assert node_names(text) == names


@pytest.mark.parametrize("text", ["", "a[1-3", "a]", "a[3-1]", "a[1-2-3]", "a[]", "a,,b", "a[x-y]", "a[1,]"])
def test_node_lists_that_cannot_be_read(text):
    with pytest.raises(DistributedError, match="node list .* cannot read .*; expected a form such as"):
        node_names(text)
