"""Pictures of a plan: memory over the program, the step's time by term and by use; and what each lever is worth."""

import io
from collections.abc import Mapping

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

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
    lasting = [(part, memory.parts[part] / GIB) for part in LASTING if memory.parts.get(part)]
    floor = np.zeros_like(alive)
    for (part, size), colour in zip(lasting, COLOURS, strict=False):
        top = np.minimum(floor + size, alive)
        axes.fill_between(place, floor, top, color=colour, step="post", linewidth=0, label=named(part))
        floor = top
    passing = "gradients, activations, temporaries"
    axes.fill_between(place, floor, alive, color=COLOURS[5], step="post", linewidth=0, label=passing)
    axes.axhspan((limit - room) / GIB, limit / GIB, color="#8c8c8c", alpha=0.25, linewidth=0)
    axes.annotate(
        "the chip's memory, and room for CUDA, NCCL and gaps", (0, limit / GIB), xytext=(3, 3),
        textcoords="offset points", color=INK, fontsize=8,
    )  # fmt: skip
    axes.axhline(limit / GIB, color=INK, linewidth=1)
    axes.axhline(memory.allocated / GIB, color=COLOURS[5], linewidth=1, linestyle=":")
    axes.annotate(
        "allocated", (1, memory.allocated / GIB), xytext=(-3, 3), textcoords="offset points", ha="right", color=INK,
        fontsize=8,
    )  # fmt: skip
    axes.set(xlim=(0, 1), ylim=(0, max(limit, memory.allocated) / GIB * 1.09), ylabel="GiB")
    axes.set_xlabel("the program, from its first instruction to its last")
    axes.set_xticks([])
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.09), fontsize=8, labelcolor=INK)
    return figure


def draw_bars(rows: Mapping[str, Mapping[str, float]], unit: str) -> Figure:
    """One horizontal bar a row, stacked of its parts, each part with one colour throughout."""
    names = list(dict.fromkeys(part for parts in rows.values() for part in parts))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    figure, axes = _axes(1.1 + 0.42 * len(rows))
    for height, parts in enumerate(rows.values()):
        left = 0.0
        for name, size in parts.items():
            axes.barh(height, size, left=left, color=colours[name], height=0.62)
            left += size
    axes.set_yticks(range(len(rows)), list(rows), color=INK)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    handles = [axes.barh(0, 0, color=colours[name]) for name in names]
    axes.legend(
        handles, names, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.5 / figure.get_figheight()),
        fontsize=8, labelcolor=INK,
    )  # fmt: skip
    return figure


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
