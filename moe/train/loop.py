"""The training loop: resume, step, tell, evaluate, save, stop."""

import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from moe.model.config import ConfigError, require_positive
from moe.model.count import train_flops_per_token
from moe.train.base import check_base
from moe.train.checkpoint import CheckpointError, CheckpointStore
from moe.train.data import Data
from moe.train.diagnosis import first_wrong
from moe.train.histories import OVERFLOW
from moe.train.metrics import MetricsWriter, Record, record_of
from moe.train.progress import TrainingProgress
from moe.train.run_folder import RunFolder
from moe.train.state import Blueprint, TrainState
from moe.train.step import StepMetrics, compile_step, make_evaluation_step, make_train_step, place_batch
from parallel.together import Agreement


class DivergedError(RuntimeError):
    """The run cannot go on: names the step, what the layers told, and the last good checkpoint."""


@dataclass(frozen=True)
class TrainingConfig:
    """
    steps: of the whole run; the learning rate's schedule ends there.
    seed: of initial values, shuffling and routing.
    microbatches: parts of each batch that are computed one after the other.
    virtual_stages: parts of the layers that each of mesh.stage has; more make stages idle less and send more.
    loss_chunk: positions of each sequence whose logits exist at once.
    evaluate_every, checkpoint_every: steps; both happen after the last step as well.
    keep_checkpoints: newest ones that stay.
    peak_tflops: of one device in the compute format, in TFLOP/s (1e12 per second), for MFU; None leaves MFU out.
    """

    steps: int = 300
    seed: int = 0
    microbatches: int = 1
    virtual_stages: int = 1
    loss_chunk: int = 512
    evaluate_every: int = 100
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        counts = [field.name for field in fields(self) if field.name not in ("seed", "peak_tflops")]
        require_positive(self, *counts, area="training.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"training.seed={self.seed}: give a whole number from 0 to 2^32 - 1")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ConfigError(f"training.peak_tflops={self.peak_tflops}: give TFLOP/s above 0, or None for no MFU")


class Outcome(NamedTuple):
    """finished: whether all steps are taken. step: how many are. signal: that stopped the run, or 0."""

    finished: bool
    step: int
    state: TrainState
    signal: int


def train(
    blueprint: Blueprint,
    data: Data,
    config: TrainingConfig,
    folder: RunFolder,
    *,
    fingerprint: str,
    console: Console,
    create_state: Callable[[], TrainState],
) -> Outcome:
    """Trains from the newest good checkpoint, or from the start, to the last step.

    Args:
        create_state: makes the state of step 0, where there is no checkpoint.

    SIGTERM and SIGINT let the step end, save and return; a second SIGINT interrupts at once. Several processes stop
    after the same step, the one behind that in which the first of them took the signal.

    Raises:
        ConfigError: adapters go on with another base than they began with.
        DivergedError: loss or gradients are no longer finite, or delayed scaling cuts off nearly all of a tensor; it
            names the first tensor that went wrong. No checkpoint holds anything of that step.
        CheckpointError: a checkpoint cannot be written or read.
    """
    store = CheckpointStore(
        folder.checkpoints, fingerprint=fingerprint, keep=config.keep_checkpoints, earlier=folder.earlier
    )
    run = _Run(blueprint, data, config, folder, store, console, create_state)
    try:
        first, state = run.begin()
        if first >= config.steps:
            return Outcome(True, first, state, signal=0)
        if first:
            console.print(f"resuming from the checkpoint of step {first}")
        return run.steps(state, first)
    finally:
        store.close()


class _Run:
    """One start of a run: what its steps share."""

    def __init__(
        self,
        blueprint: Blueprint,
        data: Data,
        config: TrainingConfig,
        folder: RunFolder,
        store: CheckpointStore,
        console: Console,
        create_state: Callable[[], TrainState],
    ) -> None:
        self.blueprint, self.data, self.config, self.folder = blueprint, data, config, folder
        self.store, self.console, self.create_state = store, console, create_state
        self.evaluation_step = make_evaluation_step(blueprint, loss_chunk=config.loss_chunk)
        self.beginning = data.train.get_state()
        self.step: Any = None
        self.clock = time.perf_counter()
        self.flops_per_token = 0.0

    def begin(self) -> tuple[int, TrainState]:
        """How many steps are taken, and the state behind them: of the newest good checkpoint, or of the start. The
        data go on from there."""
        restored = self.store.restore_latest(self.blueprint.abstract_state(), self.console.print)
        self.data.train.set_state(self.beginning if restored is None else restored.data)
        first, state = (0, self.create_state()) if restored is None else (restored.step, restored.state)
        if self.blueprint.lora is not None:
            if restored is not None:
                state = state._replace(frozen=self.create_state().frozen)
            check_base(self.folder.base, self.blueprint, state.frozen, begins=restored is None)
        return first, state

    def steps(self, state: TrainState, first_step: int) -> Outcome:
        """From `first_step` steps taken to the last, or to a signal."""
        config, taken, stop = self.config, first_step, 0
        self.writer = MetricsWriter(self.folder, first_step) if jax.process_index() == 0 else None
        self.progress = TrainingProgress(self.console, first_step, config.steps, config.peak_tflops)
        pending: tuple[int, StepMetrics] | None = None
        agreed = Agreement(self.blueprint.layout)
        with _Signals() as signals, self.progress:
            while taken < config.steps and not stop:
                batch = place_batch(next(self.data.train), self.blueprint.layout)
                self.step = self.step or self._compiled(state, batch)
                state, metrics = self.step(state, batch)
                taken += 1
                # The metrics are read one step late, so that the devices never wait for the host.
                pending = self._tell(pending, (taken, metrics), state)
                stop = agreed(signals.received)
                last = taken == config.steps or stop
                save, evaluate = taken % config.checkpoint_every == 0, taken % config.evaluate_every == 0
                if last or save or evaluate:
                    pending = self._tell(pending, None, state)
                    if taken == config.steps or (evaluate and not stop):
                        self._evaluate(state, taken)
                    if last or save:
                        self.store.save(taken, state, self.data.train.get_state())
                    self.clock = time.perf_counter()
            self.store.wait()
            if stop:
                self.console.print(f"stopped by {signal.Signals(stop).name} and saved after step {taken}")
        if self.writer is not None:
            self.writer.close()
        return Outcome(taken == config.steps, taken, state, stop)

    def _compiled(self, state: TrainState, batch: Any) -> Any:
        begin = time.perf_counter()
        config, blueprint = self.config, self.blueprint
        step = make_train_step(
            blueprint,
            seed=config.seed,
            microbatches=config.microbatches,
            virtual_stages=config.virtual_stages,
            loss_chunk=config.loss_chunk,
        )
        compiled = compile_step(step, state, batch)
        sequence_length = batch.tokens_BT.shape[1]
        self.flops_per_token = train_flops_per_token(
            blueprint.config, blueprint.model_specs, sequence_length, frozen=blueprint.lora is not None
        )
        self.clock = time.perf_counter()
        self.console.print(f"compiled the train step in {self.clock - begin:.0f} s")
        return compiled

    def _tell(
        self, pending: tuple[int, StepMetrics] | None, following: tuple[int, StepMetrics] | None, state: TrainState
    ) -> tuple[int, StepMetrics] | None:
        """Writes down the pending step, which is checked first, and leaves the following one pending. The newest state
        makes room where the run stops."""
        if pending is not None:
            taken, metrics = pending[0], jax.device_get(pending[1])
            if not (math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm) and metrics.growth <= OVERFLOW):
                jax.tree.map(lambda x: x.delete(), state)
                raise self._stopped(taken, metrics)
            now = time.perf_counter()
            seconds, self.clock = now - self.clock, now
            self._write(record_of(taken, metrics, seconds, self.flops_per_token, self._peak_flops()))
        return following

    def _peak_flops(self) -> float | None:
        """Of all devices together, per second."""
        peak, mesh = self.config.peak_tflops, self.blueprint.layout.mesh
        return None if peak is None else peak * 1e12 * (1 if mesh is None else mesh.size)

    def _write(self, record: Record) -> None:
        if self.writer is not None:
            self.writer.write(record)
            self.progress.update(record)

    def _evaluate(self, state: TrainState, taken: int) -> None:
        """Mean cross-entropy over the whole validation part, where there is one."""
        loss = tokens = 0.0
        for batch in self.data.validation():
            batch_loss, batch_tokens = self.evaluation_step(state, place_batch(batch, self.blueprint.layout))
            loss, tokens = loss + float(batch_loss), tokens + float(batch_tokens)
        if tokens:
            self._write({"step": taken, "validation_loss": loss / tokens})

    def _stopped(self, taken: int, metrics: StepMetrics) -> DivergedError:
        self.store.wait()
        steps = self.store.steps()
        cause = self._first_wrong(taken)
        kept = f"the last good checkpoint is {self.store.path(steps[-1])}" if steps else "there is no checkpoint yet"
        told = [f"step {taken}: loss {metrics.loss}, gradient norm {metrics.grad_norm}; training stopped, {kept}"]
        told += [f"  {cause}"]
        if metrics.layers is not None:
            layers = metrics.layers
            told += [
                f"  layer {layer}: largest load {np.max(layers.load_LE[layer]):.3f}, router entropy "
                f"{layers.entropy_L[layer]:.3f} nats, dropped {layers.dropped_L[layer]:.1%}"
                for layer in range(len(layers.load_LE))
            ]
        told.append("try a lower optimizer.learning_rate, a longer warmup, or a smaller optimizer.clip_norm")
        if self.blueprint.precision.delayed:
            told[-1] += ", or precision.scaling='tensor', whose scales are those of the present step"
        return DivergedError("\n".join(told))

    def _first_wrong(self, taken: int) -> str:
        """Which tensor of the step was the first that went wrong: the steps since the last good checkpoint, which give
        the same numbers again, lead to the state before it."""
        try:
            first, state = self.begin()
            self.console.print(f"looking for the tensor that went wrong: repeating steps {first + 1} to {taken}")
            for _ in range(first, taken - 1):
                state, _ = self.step(state, place_batch(next(self.data.train), self.blueprint.layout))
            batch = place_batch(next(self.data.train), self.blueprint.layout)
            config = self.config
            given = {"seed": config.seed, "microbatches": config.microbatches, "loss_chunk": config.loss_chunk}
            found = first_wrong(self.blueprint, state, batch, **given)
        except (CheckpointError, jax.errors.JaxRuntimeError) as error:
            return f"which tensor went wrong could not be found out ({str(error).splitlines()[0]})"
        return found or "all tensors of the step were finite when it was repeated: suspect the hardware"


class _Signals:
    """Holds SIGTERM and SIGINT back while a step runs; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> "_Signals":
        # Python takes signals in its main thread only; elsewhere, as in some notebooks, they keep their meaning.
        in_main = threading.current_thread() is threading.main_thread()
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)} if in_main else {}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
