"""Hunyuan-Large as its report describes it: 389B parameters, 52B active (arXiv 2411.02265), on 512 GPUs.

What the report gives: the model (table 1), recycle routing and one shared expert (2.1), the learning rate's three
phases and the experts' own rate (2.2.3). What it does not give, and we choose: the mesh, the batch and its length, the
warmup, the capacity factor and the peak rate. Needs 512 devices, your own text and its tokenizer; the tests take one
step of it in shapes only.

    python -m experiments.run experiments/hunyuan_large.py --show
    python -m experiments.launch slurm --nodes 64 --output job.sbatch experiments/hunyuan_large.py
"""

from dataclasses import replace

from experiments.experiment import Experiment
from moe.model.config import RouterConfig
from moe.model.execution import Execution
from moe.model.precision import Precision
from moe.model.presets import HUNYUAN_LARGE
from moe.train.data import DataConfig
from moe.train.loop import TrainingConfig
from moe.train.optimizer import OptimizerConfig
from parallel.mesh import MeshConfig

experiment = Experiment(
    name="hunyuan_large",
    model=replace(HUNYUAN_LARGE, router=RouterConfig(top_k=1, capacity_factor=1.25, overflow="recycle")),
    data=DataConfig(("corpus",), tokenizer="corpus/tokenizer.json", sequence_length=4096, batch_size=1024),
    training=TrainingConfig(steps=100_000, checkpoint_every=1000, evaluate_every=1000, peak_tflops=148.0),
    optimizer=OptimizerConfig(learning_rate=3e-4, schedule="hunyuan", warmup_steps=2000, expert_rate=0.31),
    mesh=MeshConfig(replica=2, data=16, expert=16),
    precision=Precision(),
    execution=Execution(remat="full"),
)
