"""Runs of several real processes, for tests: the small experiment in a file, under experiments.launch."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from moe.train.metrics import read_metrics
from moe.train.trained import TrainedModel
from parallel.layout import SINGLE_DEVICE

ROOT = Path(__file__).parent.parent.parent
TIMED = ("tokens_per_second", "mfu")
CLOSE = 1e-5
"""Of the scale of what is compared, in float32."""

_FILE = """
from pathlib import Path
from tests.moe.train.small_run import small_experiment
experiment = small_experiment(Path({folder!r})).vary({changes!r})
"""
EXACT = {"precision.compute": "float32", "precision.exchange": "float32", "optimizer.learning_rate": 1e-3}
"""Adam turns the rounding of a gradient near zero into a part of the learning rate."""


def written(folder: Path, changes: dict) -> Path:
    """A file with the small experiment on the corpus in `folder`, changed, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "small.py"
    file.write_text(_FILE.format(folder=str(folder), changes=EXACT | changes), "utf-8")
    return file


class Launched:
    """`experiments.launch local`, under way."""

    def __init__(self, file: Path, run: Path, processes: int, *arguments: str, restarts: int = 0) -> None:
        self.run = run
        command = [
            sys.executable, "-m", "experiments.launch", "local", "--processes", str(processes), "--devices", "2",
            "--restarts", str(restarts), str(file), "--run-dir", str(run), *arguments,
        ]  # fmt: skip
        # Compiling is most of the time of so small a run.
        environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        self.popen = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 300
        while not any(record["step"] >= step for record in read_metrics(self.run / "metrics.jsonl")):
            assert self.popen.poll() is None, self.popen.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self, code: int) -> str:
        """Waits for the end, and returns what was said."""
        told = self.popen.communicate(timeout=600)[0]
        assert self.popen.returncode == code, told
        return told


def process_id(run: Path, index: int) -> int:
    """Of the newest start."""
    log = (run / f"logs/process-{index}.log").read_text("utf-8", "replace")
    return int([line for line in log.splitlines() if line.startswith("--- ")][-1].split()[3])


def losses(run: Path) -> np.ndarray:
    return np.array([record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record])


def untimed(run: Path) -> list:
    return [{k: v for k, v in record.items() if k not in TIMED} for record in read_metrics(run / "metrics.jsonl")]


def params(run: Path) -> dict:
    return TrainedModel(run).restore(SINGLE_DEVICE)[0]


def assert_close(run: Path, other: Path) -> None:
    """Every step's loss and the final parameters, to rounding."""
    np.testing.assert_allclose(losses(run), losses(other), rtol=CLOSE)

    def close(x, y):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=CLOSE * np.abs(y).max())

    jax.tree.map(close, params(run), params(other))


def assert_same(run: Path, other: Path) -> None:
    """Every record and the final parameters, bit by bit."""
    assert untimed(run) == untimed(other)
    jax.tree.map(np.testing.assert_array_equal, params(run), params(other))
