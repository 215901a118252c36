"""How far a run is: a live line in a terminal, and now and then a plain one anywhere else."""

import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe.train.metrics import Record

_SECONDS_BETWEEN_LINES = 10.0
_STEPS_IN_MEAN = 20


class TrainingProgress:
    """Shows loss, tokens/s, MFU (of a stated peak) and the time that is left. Use as a context manager."""

    def __init__(self, console: Console, first_step: int, steps: int, peak_tflops: float | None) -> None:
        self._console = console
        self._steps = steps
        self._peak = peak_tflops
        self._recent: deque[Record] = deque(maxlen=_STEPS_IN_MEAN)
        self._validation: float | None = None
        self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, completed=first_step, numbers="")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def update(self, record: Record) -> None:
        """Takes in a record of a step or of a validation."""
        if "validation_loss" in record:
            self._validation = record["validation_loss"]
            self._console.print(f"step {record['step']}: validation loss {self._validation:.3f}")
            return
        self._recent.append(record)
        self._bar.update(self._task, completed=record["step"], numbers=self.numbers())
        now = time.monotonic()
        due = now - self._last_line > _SECONDS_BETWEEN_LINES or record["step"] == self._steps
        if not self._console.is_terminal and due:
            self._last_line = now
            left = (self._steps - record["step"]) * self._mean("tokens") / self._rate()
            self._console.print(f"step {record['step']}/{self._steps}  {self.numbers()}  {left:.0f} s left")

    def numbers(self) -> str:
        """The newest figures, each a mean over the last steps but for the validation loss."""
        parts = [f"loss {self._mean('loss'):.3f}"]
        if self._validation is not None:
            parts.append(f"validation {self._validation:.3f}")
        parts.append(f"{self._rate():,.0f} tokens/s")
        if self._peak is not None:
            parts.append(f"MFU {self._mean('mfu'):.1%} of {self._peak:g} TFLOP/s a device")
        return "  ".join(parts)

    def _mean(self, name: str) -> float:
        return sum(record[name] for record in self._recent) / len(self._recent)

    def _rate(self) -> float:
        seconds = sum(record["tokens"] / max(record["tokens_per_second"], 1e-9) for record in self._recent)
        return max(sum(record["tokens"] for record in self._recent), 1) / seconds if seconds else 1.0
