"""The main job: Hunyuan-Large in small, on the default corpus, over 8 virtual CPU devices (data 2 x expert 4).

    python -m experiments.run experiments/tiny.py

About five minutes on two cores. Every lever of the big model is here in small: a mixture of experts with a shared
expert, grouped-query attention with keys and values shared by pairs of layers, bfloat16, and sharding.
"""

from experiments.experiment import Experiment
from moe.model.precision import Precision
from moe.model.presets import TINY
from moe.train.data import DataConfig
from moe.train.loop import TrainingConfig
from moe.train.optimizer import OptimizerConfig
from parallel.mesh import MeshConfig

experiment = Experiment(
    name="tiny",
    model=TINY,
    data=DataConfig(sequence_length=256, batch_size=16),
    training=TrainingConfig(steps=120, evaluate_every=40, checkpoint_every=40),
    optimizer=OptimizerConfig(learning_rate=2e-3, schedule="hunyuan", warmup_steps=20),
    mesh=MeshConfig(data=2, expert=4),
    precision=Precision(),
)
