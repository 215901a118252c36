"""One run of the quality study, and what is measured when it ends: python -m experiments.quality_run EXPERIMENT.

Takes the arguments of experiments.run, and writes measured.json into the run's folder beside what that writes.
"""

import json
import os
import sys
from typing import Any

import jax
from rich.console import Console

from experiments.run import FAILURES, MISTAKES, asked, parser, run
from experiments.summary import escaped
from moe.train.run_folder import write_atomically
from moe.train.state import TrainState
from parallel.distributed import detect, initialize


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = parser().parse_args(arguments)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        experiment, path = asked(options)
        path.parent.mkdir(parents=True, exist_ok=True)
        initialize(detect(os.environ), experiment.mesh.num_devices)
        outcome = run(experiment, path, Console(highlight=False, width=120))
        if not outcome.finished:
            return 128 + outcome.signal
        write_atomically(path / "measured.json", json.dumps(bytes_of(outcome.state), indent=1))
    except MISTAKES as error:
        errors.print(f"[bold red]error:[/] {escaped(error)}")
        return 2
    except FAILURES as error:
        errors.print(f"[bold red]failed:[/] {escaped(error)}")
        return 1
    return 0


def bytes_of(state: TrainState) -> dict[str, Any]:
    """Of the state's arrays, over all devices: a number that several hold counts once.

    Returns:
        count: parameters. parameters: bytes in which they are stored. optimizer: bytes of all its states.
    """
    parameters = jax.tree.leaves(state.params)
    return {
        "count": sum(x.size for x in parameters),
        "parameters": sum(x.nbytes for x in parameters),
        "optimizer": sum(x.nbytes for x in jax.tree.leaves(state.opt_state)),
    }


if __name__ == "__main__":
    sys.exit(main())
