"""Pictures of a plan: memory over the program, the step's time by term and by use; and what each lever is worth."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from moe.planner.units import GIB
from moe.planner.work import Memory, Part

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#8c8c8c", "#7f5fc7", "#2f7f7f")
"""Okabe and Ito's, told apart by colour-blind readers, and three more; mid tones, for light and dark pages."""
INK = "#010203"
"""Stands for the page's own colour of text: `svg` puts that in its place."""
LASTING: tuple[Part, ...] = ("parameters", "optimizer_states", "cache", "batch")
"""Parts that lie in memory from the program's beginning to its end."""


def draw_memory(memory: Memory, limit: int, room: int) -> Figure:
    """What is alive along the program, by part as far as it lasts, below the chip's limit (bytes).

    room: bytes of the limit that the program cannot have.
    """
    figure, axes = _axes(3.4)
    place = np.array([each for each, _ in memory.over_program])
    alive = np.array([count for _, count in memory.over_program]) / GIB
    floor = np.zeros_like(alive)
    parts = [(named(part), memory.parts[part] / GIB) for part in LASTING if memory.parts.get(part)]
    for (label, size), colour in zip(parts, COLOURS, strict=False):
        ceiling = np.minimum(floor + size, alive)
        axes.fill_between(place, floor, ceiling, color=colour, step="post", linewidth=0, label=label)
        floor = ceiling
    label = "gradients, activations, temporaries"
    axes.fill_between(place, floor, alive, color=COLOURS[5], step="post", linewidth=0, label=label)
    allocated, whole = memory.allocated / GIB, limit / GIB
    axes.axhline(allocated, color=COLOURS[5], linewidth=1, linestyle=":")
    _note(axes, "allocated", (1, allocated), (-3, 3), "right")
    if allocated > whole / 4:
        axes.axhspan((limit - room) / GIB, whole, color="#8c8c8c", alpha=0.25, linewidth=0)
        axes.axhline(whole, color=INK, linewidth=1)
        _note(axes, "the chip's memory, and room for CUDA, NCCL and gaps", (0, whole), (3, 3), "left")
    highest = 1.09 * max(whole, allocated) if allocated > whole / 4 else 1.15 * allocated
    axes.set(xlim=(0, 1), ylim=(0, highest), ylabel="GiB", xticks=[])
    axes.set_xlabel("the program, from its first instruction to its last")
    _legend(figure, *axes.get_legend_handles_labels())
    return figure


def draw_bar(parts: Mapping[str, float], unit: str) -> Figure:
    """One horizontal bar, stacked of its parts."""
    figure, axes = _axes(1.7)
    left = 0.0
    for (name, size), colour in zip(parts.items(), COLOURS, strict=False):
        axes.barh(0, size, left=left, color=colour, label=name)
        left += size
    axes.set_yticks([])
    axes.set_xlabel(unit)
    _legend(figure, *axes.get_legend_handles_labels())
    return figure


def draw_roofline(points: Mapping[str, tuple[float, float]], peak: float, bandwidth: float) -> Figure:
    """What the uses of a step reach below the chip's roof.

    Args:
        points: FLOP a byte, and FLOP/s reached. peak: FLOP/s. bandwidth: bytes/s.
    """
    figure, axes = _axes(3.6)
    intensities = [x for x, _ in points.values()]
    least, most = min([1.0, *intensities]) / 2, max([4 * peak / bandwidth, *intensities]) * 2
    x = np.geomspace(least, most, 200)
    axes.plot(x, np.minimum(peak, x * bandwidth) / 1e12, color=INK, linewidth=1)
    _note(axes, f"{peak / 1e12:g} TFLOP/s", (most, peak / 1e12), (-3, 3), "right")
    for (name, (intensity, rate)), colour in zip(points.items(), COLOURS, strict=False):
        axes.plot(intensity, rate / 1e12, "o", color=colour, markersize=7, label=name)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte of memory traffic", ylabel="TFLOP/s reached")
    _legend(figure, *axes.get_legend_handles_labels())
    return figure


def draw_factors(bars: Mapping[str, Mapping[str, tuple[float, bool]]], groups: Sequence[str], label: str) -> Figure:
    """A row of horizontal bars for each name, one bar for each group.

    Args:
        bars: a factor, drawn from 1 on a scale of ratios; and whether it can be had: pale bars are for what cannot.
    """
    figure, axes = _axes(1.2 + (0.22 * len(groups) + 0.14) * len(bars))
    thick = 0.86 / max(1, len(groups))
    for place, factors in enumerate(bars.values()):
        for turn, group in enumerate(groups):
            if group in factors:
                factor, real = factors[group]
                height = place + (turn - (len(groups) - 1) / 2) * thick
                colour = COLOURS[turn % len(COLOURS)]
                axes.barh(height, factor - 1, left=1, height=0.9 * thick, color=colour, alpha=1 if real else 0.35)
                note = f" {factor:.2f} x" + ("" if real else ", does not fit")
                axes.annotate(note, (max(factor, 1), height), va="center", fontsize=7, color=INK)
    values = [factor for factors in bars.values() for factor, _ in factors.values()]
    axes.set_xscale("log")
    axes.set_xlim(min([0.8, *(0.95 * value for value in values)]), max([1.5, *(1.6 * value for value in values)]))
    axes.xaxis.set_major_locator(FixedLocator([0.25, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} x"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks(range(len(bars)), list(bars), color=INK)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    _legend(figure, [axes.barh(0, 0, color=COLOURS[i % len(COLOURS)]) for i in range(len(groups))], groups)
    return figure


def draw_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]], marks: Mapping[str, float], x: str, y: str
) -> Figure:
    """One line a name, both scales of ratios. marks: places on the horizontal scale, by what stands there."""
    figure, axes = _axes(3.8)
    for (name, points), colour in zip(lines.items(), COLOURS, strict=False):
        axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, linewidth=1.5, label=name)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    for name, place in marks.items():
        axes.axvline(place, color=INK, linewidth=0.8, linestyle=":")
        axes.annotate(name, (place, 1), (2, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
                      va="top", fontsize=8, color=INK)  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    _legend(figure, *axes.get_legend_handles_labels())
    return figure


def png(figure: Figure, path: Path) -> None:
    """Writes the figure on white."""
    figure.set_facecolor("white")
    FigureCanvasAgg(figure).print_figure(path, dpi=160)


def svg(figure: Figure, name: str) -> str:
    """The figure for a page: an <svg> element whose text has the page's colour.

    name: tells its ids from those of other figures on the page.
    """
    written = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(written, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor").strip()


def named(part: str) -> str:
    return part.replace("_", " ")


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.5, height), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(INK)
    axes.tick_params(colors=INK, labelsize=8)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def _legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    columns = min(4, len(names)) or 1
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=8, labelcolor=INK)


def _note(axes: Axes, text: str, place: tuple[float, float], offset: tuple[float, float], side: str) -> None:
    axes.annotate(text, place, xytext=offset, textcoords="offset points", ha=side, color=INK, fontsize=8)
