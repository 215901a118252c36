"""Pictures of the quality study: losses over the steps with a band over the seeds, and differences with their noise."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.quality_table import Row
from moe.planner.pictures import COLOURS
from moe.train.pictures import BLUE, GREY, ORANGE, smoothed

DRAWN = 6
"""Modes whose curves a picture has at most; more cannot be told apart."""


def draw_quality(rows: Sequence[Row]) -> Figure:
    """Left, losses over the steps of float32 and of the modes that end farthest from it; right, each mode's
    difference."""
    others = [row for row in rows if row.mode != "float32"]
    figure = Figure(figsize=(12, 1.6 + 0.26 * max(len(others), 10)), layout="constrained")
    left, right = figure.subplots(1, 2)
    farthest = sorted(others, key=lambda row: abs(row.difference), reverse=True)[: DRAWN - 1]
    _curves(left, [row for row in rows if row.mode == "float32"] + farthest)
    _differences(right, others)
    return figure


def draw_curves(rows: Sequence[Row]) -> Figure:
    """Losses over the steps, and below them how far each is from float32's with the same seed."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _curves(above, rows)
    above.set_xlabel("")
    reference = next(row for row in rows if row.mode == "float32")
    for row, colour in zip(rows, COLOURS, strict=False):
        seeds = row.curves.keys() & reference.curves.keys()
        apart = np.array([100 * (row.curves[seed] / reference.curves[seed] - 1) for seed in sorted(seeds)])
        _band(below, apart, colour, row.mode)
    below.axhline(0, color=GREY, linewidth=1)
    below.set(xlabel="step", ylabel="difference to float32 with\nthe same seed, %")
    below.spines[["top", "right"]].set_visible(False)
    return figure


def _curves(axes: Axes, rows: Sequence[Row]) -> None:
    """Of the seeds that all of them have: others have other text."""
    seeds = sorted(set.intersection(*(set(row.curves) for row in rows)))
    for row, colour in zip(rows, COLOURS, strict=False):
        _band(axes, np.array([row.curves[seed] for seed in seeds]), colour, row.mode)
    axes.set(
        xlabel="step", ylabel="training loss (nats per token)", title="mean over the seeds, and from least to most"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _band(axes: Axes, values_RS: np.ndarray, colour: str, label: str) -> None:
    """The mean over runs, smoothed along the steps, in a band from the least run to the most."""
    values_RS = np.array([smoothed(values_S) for values_S in values_RS])
    steps = np.arange(1, values_RS.shape[1] + 1)
    axes.plot(steps, values_RS.mean(0), color=colour, label=label, linewidth=1.2)
    axes.fill_between(steps, values_RS.min(0), values_RS.max(0), color=colour, alpha=0.2, linewidth=0)


def _differences(axes: Axes, rows: Sequence[Row]) -> None:
    """One bar a mode, with the standard deviation over the seeds."""
    places = np.arange(len(rows))
    values = [100 * row.difference for row in rows]
    colours = [BLUE if value <= 0.5 else ORANGE for value in values]
    axes.barh(places, values, xerr=[100 * (row.noise or 0) for row in rows], color=colours, ecolor=GREY, capsize=2)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(places, [row.mode for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="final validation loss against float32, %", title="difference, with the seeds' standard deviation")
    axes.spines[["top", "right"]].set_visible(False)
