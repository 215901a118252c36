"""Steps of the quality study's model in one of its modes, on the platform at hand: python -m tests.gpu.steps MODE

Writes [[loss, gradient norm] of each step] as the last line.
"""

import json
import sys
from typing import Any

import numpy as np

from benchmarks.rivals.job import draw_tokens
from experiments.experiment import Experiment
from experiments.quality import MODES, experiment
from moe.train.data import Batch
from moe.train.step import make_train_step

STEPS = 4


def losses(mode: Experiment) -> list[list[float]]:
    B, T = mode.data.batch_size, mode.data.sequence_length
    tokens_BT, targets_BT = draw_tokens(mode.model.vocab_size, B, T)
    places_BT = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    documents_BT = (1 + (places_BT > T // 3)).astype(np.int32)
    batch = Batch(tokens_BT, targets_BT, places_BT, documents_BT, np.ones((B, T), np.float32))
    blueprint = mode.blueprint()
    step: Any = make_train_step(blueprint, seed=0)
    state, found = blueprint.create_state(seed=0), []
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        found.append([float(metrics.loss), float(metrics.grad_norm)])
    return found


if __name__ == "__main__":
    print(json.dumps(losses(experiment.vary(MODES[sys.argv[1]]))))
