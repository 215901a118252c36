"""A run of seconds, for tests: a model of two layers on a corpus of a few lines.

python -m tests.moe.train.small_run RUN_DIR CORPUS_DIR [PATH=VALUE ...]
"""

import sys
from pathlib import Path

from rich.console import Console

from experiments.experiment import Experiment
from experiments.overrides import parse_changes
from experiments.run import run
from moe.model.config import ModelConfig, RouterConfig
from moe.train.data import DataConfig
from moe.train.loop import Outcome, TrainingConfig
from moe.train.optimizer import OptimizerConfig
from parallel.mesh import MeshConfig

LINES = "".join(f"Line {i} says that {i} and {i % 7} make {i + i % 7}, and nothing else.\n" for i in range(400))


def small_experiment(folder: Path) -> Experiment:
    """Trains 12 steps in seconds on data=1, expert=2; recycling makes it draw random numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.txt").write_text(LINES, "utf-8")
    return Experiment(
        name="small",
        model=ModelConfig(
            vocab_size=300,
            d_model=16,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            num_experts=4,
            d_expert=16,
            router=RouterConfig(capacity_factor=1.0, overflow="recycle"),
        ),
        data=DataConfig((str(folder / "corpus.txt"),), sequence_length=16, batch_size=4, cache=str(folder / "cache")),
        training=TrainingConfig(steps=12, evaluate_every=4, checkpoint_every=4),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        mesh=MeshConfig(expert=2),
    )


def small_run(path: Path, folder: Path, *assignments: str, console: Console | None = None) -> Outcome:
    experiment = small_experiment(folder)
    experiment = experiment.vary(parse_changes(experiment, assignments))
    return run(experiment, path, console or Console(highlight=False, width=120))


if __name__ == "__main__":
    outcome = small_run(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
    sys.exit(0 if outcome.finished else 128 + outcome.signal)
