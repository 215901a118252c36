"""The quality study's figures: what each mode lost against float32, with its noise, beside the bytes that it takes."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from rich.table import Table

from moe.planner.units import GIB
from moe.train.metrics import read_metrics

HEADINGS = ("mode", "validation loss", "against float32, %", "seeds", "bytes a parameter", "choices changed, %", "MiB")


@dataclass(frozen=True)
class Row:
    """
    losses: final validation loss by seed, nats. differences: to float32 with the same seed, as shares of its loss.
    parameters, optimizer: bytes for each parameter, as stored and of the optimizer's states, from the arrays.
    changed: share of the router's choices that differ from those of the same weights in float32; None where it is not
        measured.
    allocated: bytes of one GPU for the compiled step; why it is not known, or None where nothing was to be compiled.
    curves: the training loss by seed, of every step.
    """

    mode: str
    losses: dict[int, float]
    differences: dict[int, float]
    parameters: float
    optimizer: float
    changed: float | None
    allocated: int | str | None
    curves: dict[int, np.ndarray]

    @property
    def difference(self) -> float:
        return mean(self.differences.values())

    @property
    def noise(self) -> float | None:
        """Standard deviation over the seeds; None of a single one."""
        return stdev(self.differences.values()) if len(self.differences) > 1 else None


def row_of(mode: str, folders: Mapping[int, Path], reference: Mapping[int, Path], allocated: int | str | None) -> Row:
    """A mode's figures from the folders of its runs and of float32's, by seed."""
    losses = {seed: final_loss(folder) for seed, folder in folders.items()}
    wide = {seed: final_loss(reference[seed]) for seed in folders}
    measured = [json.loads((folder / "measured.json").read_text("utf-8")) for folder in folders.values()]
    changed = [each["changed"] for each in measured if each.get("changed") is not None]
    return Row(
        mode,
        losses,
        {seed: loss / wide[seed] - 1 for seed, loss in losses.items()},
        measured[0]["parameters"] / measured[0]["count"],
        measured[0]["optimizer"] / measured[0]["count"],
        mean(changed) if changed else None,
        allocated,
        {seed: _losses(folder) for seed, folder in folders.items()},
    )


def final_loss(folder: Path) -> float:
    """The last validation loss of a run, nats."""
    return json.loads((folder / "summary.json").read_text("utf-8"))["validation_loss"]


def _losses(folder: Path) -> np.ndarray:
    return np.array([record["loss"] for record in read_metrics(folder / "metrics.jsonl") if "loss" in record])


def table(rows: Iterable[Row]) -> Table:
    """For the screen. ± is the standard deviation over the seeds."""
    drawn = Table(title="final validation loss by mode", box=None)
    for place, heading in enumerate(HEADINGS):
        drawn.add_column(heading, justify="right" if place else "left")
    for row in rows:
        drawn.add_row(*_cells(row))
    return drawn


def markdown(rows: Iterable[Row]) -> str:
    """The same for the lab book, and why a step was not compiled, below it."""
    rows = list(rows)
    lines = [HEADINGS, ("---",) * len(HEADINGS), *(_cells(row) for row in rows)]
    reasons = sorted({row.allocated for row in rows if isinstance(row.allocated, str)})
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + [f"\n{reason}" for reason in reasons]) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    noise = "" if row.noise is None else f" ± {100 * row.noise:.2f}"
    allocated = f"{row.allocated / GIB * 1024:.1f}" if isinstance(row.allocated, int) else "–"
    return (
        row.mode,
        f"{mean(row.losses.values()):.4f}",
        "–" if row.mode == "float32" else f"{100 * row.difference:+.2f}{noise}",
        str(len(row.losses)),
        f"{row.parameters:.2f} + {row.optimizer:.2f}",
        "–" if row.changed is None else f"{100 * row.changed:.2f}",
        allocated,
    )
