"""Steps of the quality study's model in one of its modes, on the platform at hand: python -m tests.gpu.steps MODE

Writes [[loss, gradient norm] of each step] as the last line.
"""

import json
import sys
from typing import Any

import numpy as np

from benchmarks.train_step import drawn_batch
from experiments.experiment import Experiment
from experiments.quality import MODES, experiment
from moe.train.step import make_train_step

STEPS = 4


def losses(mode: Experiment) -> list[list[float]]:
    B, T = mode.data.batch_size, mode.data.sequence_length
    batch = drawn_batch(mode.model.vocab_size, B, T)
    batch = batch._replace(segments_BT=(1 + (batch.positions_BT > T // 3)).astype(np.int32))
    blueprint = mode.blueprint()
    step: Any = make_train_step(blueprint, seed=0)
    state, found = blueprint.create_state(seed=0), []
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        found.append([float(metrics.loss), float(metrics.grad_norm)])
    return found


if __name__ == "__main__":
    print(json.dumps(losses(experiment.vary(MODES[sys.argv[1]]))))
