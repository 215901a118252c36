"""What a run pays beside its steps: compiling, reading data, saving.

    python -m benchmarks.overheads [--repeats 3]

Of experiments/tiny.py, on its mesh: seconds to trace, lower and compile the step, with more and more layers; the time
to make a batch ready, as a share of a step's; and what a save adds to the steps during which it is written, as a share
of the 50 steps from one save to the next.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from benchmarks.spread import asked_repeats, machine, spread
from experiments.experiment import Experiment
from experiments.tiny import experiment as tiny
from moe.train.checkpoint import CheckpointStore
from moe.train.data import Data, open_data
from moe.train.state import TrainState
from moe.train.step import compile_step, make_train_step, place_batch
from parallel.malloc import use_large_pages

LAYERS = (tiny.model.num_layers, 16, 64)
BETWEEN_SAVES = 50
WATCHED = 5
"""Steps after a save that may be slower for it."""


def compiled(experiment: Experiment, batch: Any) -> tuple[Any, float]:
    """The step, and the seconds that it took to have it."""
    blueprint = experiment.blueprint()
    begin = time.perf_counter()
    step = compile_step(make_train_step(blueprint, seed=0), blueprint.abstract_state(), batch)
    return step, time.perf_counter() - begin


class Stepper:
    """A run that takes steps in turns, and saves when it is told to."""

    def __init__(self, step: Any, state: TrainState, data: Data, place: Callable[[Any], Any]) -> None:
        self.step, self.state, self.data, self.place = step, state, data, place
        self.ready: list[float] = []

    def take(self, steps: int) -> float:
        """Seconds of so many steps. The seconds of making each batch ready go into `ready`."""
        begin = time.perf_counter()
        for _ in range(steps):
            before = time.perf_counter()
            batch = self.place(next(self.data.train))
            self.ready.append(time.perf_counter() - before)
            self.state, metrics = self.step(self.state, batch)
            jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - begin

    def take_saving(self, store: CheckpointStore, number: int, steps: int) -> float:
        """The same, of steps that begin with a save, until it is written."""
        begin = time.perf_counter()
        store.save(number, self.state, self.data.train.get_state())
        self.take(steps)
        store.wait()
        return time.perf_counter() - begin


def main() -> None:
    repeats = asked_repeats("benchmarks.overheads", __doc__, 3, "saves")
    console = Console(width=120, highlight=False)
    console.print(f"{machine()}: median (least to most)")
    blueprint = tiny.blueprint()
    data = open_data(tiny.data, vocab_size=tiny.model.vocab_size, seed=0, report=console.print)

    def place(batch: Any) -> Any:
        return place_batch(batch, blueprint.layout)

    first = place(next(data.train))
    steps = {}
    for layers in LAYERS:
        job = replace(tiny, model=replace(tiny.model, num_layers=layers))
        steps[layers], seconds = compiled(job, first)
        console.print(f"compiling the step of {layers} layers: {seconds:.1f} s")

    stepper = Stepper(steps[tiny.model.num_layers], blueprint.create_state(seed=0), data, place)
    stepper.take(2)
    stepper.ready.clear()
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder), fingerprint="overheads", keep=1)
        stepper.take_saving(store, 0, 1)
        plain, saving = [], []
        for number in range(1, repeats + 1):
            plain.append(stepper.take(WATCHED))
            saving.append(stepper.take_saving(store, number, WATCHED))
        store.close()
    step = statistics.median(plain) / WATCHED
    ready = [100 * seconds / step for seconds in stepper.ready]
    lost = [100 * (more - less) / (BETWEEN_SAVES * step) for more, less in zip(saving, plain, strict=True)]
    console.print(f"a step takes {step:.2f} s; making its batch ready {spread(ready, 2)} % of that")
    console.print(f"a save every {BETWEEN_SAVES} steps adds {spread(lost, 2)} %")


if __name__ == "__main__":
    use_large_pages()
    jax.config.update("jax_num_cpu_devices", tiny.mesh.num_devices)
    main()
