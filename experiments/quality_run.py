"""One run of the quality study, and what is measured when it ends: python -m experiments.quality_run EXPERIMENT.

Takes the arguments of experiments.run, and writes measured.json into the run's folder beside what that writes.
"""

import json
import os
import sys
from functools import partial
from typing import Any

import jax
from rich.console import Console

from experiments.experiment import Experiment
from experiments.run import FAILURES, MISTAKES, asked, parser, run
from experiments.summary import escaped
from moe.model.precision import FULL
from moe.train.data import open_data
from moe.train.routing_changes import changed_choices
from moe.train.run_folder import write_atomically
from moe.train.state import TrainState
from parallel.blocks import EIGHT_BIT
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
        measured = bytes_of(outcome.state) | {"changed": share_changed(experiment, outcome.state)}
        write_atomically(path / "measured.json", json.dumps(measured, indent=1))
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


def share_changed(experiment: Experiment, state: TrainState) -> float | None:
    """The share of the routers' choices, in a batch of validation text and in the mean over layers, that the trained
    weights make in float32 and not in the experiment's precision.

    None where rows or weights are rounded on their way between devices, since this is computed on one; and for seeds
    but 0, since it takes as long as a part of the training.
    """
    precision = experiment.precision
    if experiment.training.seed or precision.gathered or precision.exchange in EIGHT_BIT:
        return None
    data = open_data(experiment.data, vocab_size=experiment.model.vocab_size, seed=0)
    compare = partial(changed_choices, experiment.model, before=FULL, after=precision)
    params, balance = jax.device_get((state.params, state.balance))
    return float(jax.jit(compare)(params, balance, batch=next(data.validation())).mean())


if __name__ == "__main__":
    sys.exit(main())
