"""The model that speed is compared on: 158M parameters, 28M active, 4 sequences of 512 tokens a step, one device.

    python -m experiments.run experiments/speed_158m.py --steps 20

benchmarks/train_step.py times its step in float32 and bfloat16.
"""

from experiments.experiment import Experiment
from moe.model.presets import SPEED_158M
from moe.train.data import DataConfig
from moe.train.loop import TrainingConfig
from moe.train.optimizer import OptimizerConfig

experiment = Experiment(
    name="speed_158m",
    model=SPEED_158M,
    data=DataConfig(sequence_length=512, batch_size=4),
    training=TrainingConfig(steps=200),
    optimizer=OptimizerConfig(warmup_steps=20),
)
