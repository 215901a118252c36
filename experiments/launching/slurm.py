"""The batch file of a run under Slurm: python -m experiments.launch slurm.

Slurm starts one `launch node` on each machine, which watches over that machine's process. `srun` does not kill the
others when one fails: they notice within `HEARTBEAT_SECONDS`, say so and end by themselves, so that the exit code tells
what to do: start again, give up (2, a mistake), or go back into the queue (143, stopped after saving).
"""

import shlex
from collections.abc import Mapping

from experiments.launching.job import Job

SECONDS_TO_SAVE = 300
"""Slurm sends SIGTERM so long before the time limit."""
_SECONDS_APART = 120
"""Once one process has ended, the others may take so long before Slurm kills them."""

_FILE = """#!/bin/bash
{directives}

# Written by: {command}
# To stop for good: scancel JOB. The time limit and preemption send SIGTERM, which saves; the job then queues again.
set -u
{exports}
for attempt in $(seq 0 {restarts}); do
    srun {srun} \\
        {run}
    code=$?
    case $code in
        0) exit 0 ;;
        2) echo "a mistake in the settings or the data: not started again"; exit 2 ;;
        130 | 143)
            echo "stopped after saving: back into the queue"
            scontrol requeue "$SLURM_JOB_ID"
            exit $code ;;
    esac
    echo "failed with exit code $code at attempt $attempt of {restarts}; the next goes on from the last checkpoint"
done
exit $code
"""


def job_file(job: Job, *, command: str, python: str, options: Mapping[str, str]) -> str:
    """The file's text, for `sbatch`.

    Args:
        command: that wrote it, for the record.
        python: the interpreter, at a path that all machines see.
        options: of sbatch beside those that follow from `job`, such as {"partition": "h20", "time": "24:00:00"}; they
            replace those.
    """
    settings = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.processes_per_node),
        "output": f"{job.name}-%j.log",
        "open-mode": "append",
        "signal": f"TERM@{SECONDS_TO_SAVE}",
        "requeue": "",
    }
    if job.gpus_per_node:
        settings["gpus-per-node"] = str(job.gpus_per_node)
    if job.gpus_per_node and job.processes_per_node > 1:
        settings["gpus-per-task"] = str(job.gpus_per_node // job.processes_per_node)
    settings |= options
    directives = [f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}" for name, value in settings.items()]
    run = shlex.join([python, "-m", "experiments.launch", "node", *job.run])
    return _FILE.format(
        directives="\n".join(directives),
        command=command,
        exports="".join(f"export {name}={shlex.quote(value)}\n" for name, value in job.variables.items()),
        restarts=job.restarts,
        srun=f"--kill-on-bad-exit=0 --wait={_SECONDS_APART}",
        run=run,
    )
