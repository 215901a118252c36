"""What a comparison found, as tables, as sentences and as a picture."""

import statistics
from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.rivals.comparison import OURS, Comparison
from benchmarks.rivals.pairing import ratios
from benchmarks.spread import spread
from moe.planner.pictures import COLOURS

MIB = 2**20
GREY = "#8c8c8c"


def tables(comparison: Comparison) -> Iterator[Table]:
    """One a part: tokens a second, and how many times as fast as each rival we were."""
    for part in comparison.job.tokens:
        table = Table(
            f"{comparison.job.name}: {part}", "tokens/s", "Leverage is so many times as fast", "peak MiB", "parameters",
            box=None, title_justify="left",
        )  # fmt: skip
        paired = [ratios(entrant.pairs, part) for entrant in comparison.entrants]
        for (name, about, turns), found in zip(comparison.turns(), [None, *paired], strict=False):
            table.add_row(
                name, spread(comparison.rates(part, turns), 1), spread(found, 2) if found else "",
                f"{max(turn.peak for turn in turns) / MIB:,.0f}", f"{about['parameters']:,}",
            )  # fmt: skip
        yield table


def heats_table(comparison: Comparison) -> Table:
    """The settings that were tried, alone: tokens a second by part."""
    tokens = comparison.job.tokens
    table = Table(f"{comparison.job.name}: settings tried", *(f"{part}, tokens/s" for part in tokens), box=None)
    for setting, seconds in comparison.heats.items():
        rates = (f"{tokens[part] / seconds[part]:,.1f}" for part in tokens)
        table.add_row(setting.name(comparison.job.task), *rates)
    return table


def verdicts(comparison: Comparison) -> Iterator[str]:
    """A sentence a part: against the best rival."""
    if not comparison.entrants:
        yield f"{comparison.job.name}: no rival could be measured"
        return
    for part in comparison.job.tokens:
        rival = comparison.best(part)
        ours, theirs = (max(turn.peak for turn in turns) / MIB for turns in zip(*rival.pairs, strict=True))
        yield (
            f"{comparison.job.name}, {part}: {spread(ratios(rival.pairs, part), 2)} x the best rival's tokens/s "
            f"({rival.setting.name(comparison.job.task)}); peak memory {ours / theirs:.2f} x"
        )


def draw_rates(comparisons: Sequence[Comparison]) -> Figure:
    """Tokens a second of us and of each rival, one panel a job and part: medians, with a line from least to most."""
    panels = [(each, part) for each in comparisons if each.entrants for part in each.job.tokens]
    rows = [1 + len(each.entrants) for each, _ in panels]
    figure = Figure(figsize=(8.5, sum(rows) * 0.32 + 0.75 * len(panels)), layout="constrained", facecolor="white")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[count + 1.5 for count in rows])
    for axes, (comparison, part) in zip(grid[:, 0], panels, strict=True):
        names = []
        for place, (name, _, turns) in enumerate(comparison.turns()):
            rates = comparison.rates(part, turns)
            middle = statistics.median(rates)
            axes.barh(place, middle, color=COLOURS[0] if name == OURS else GREY, height=0.72)
            axes.plot((min(rates), max(rates)), (place, place), color="black", linewidth=1.2)
            axes.annotate(f"{middle:,.0f}", (max(rates), place), (4, 0), textcoords="offset points", va="center",
                          fontsize=8)  # fmt: skip
            names.append(name)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{comparison.job.name}: {part}, tokens/s", fontsize=9, loc="left")
    return figure
