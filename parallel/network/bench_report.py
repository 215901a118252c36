"""What `bench` prints: how far it is, then the times and the fits."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from parallel.network.links import Links, Measurement

_GOOD_FIT = 0.3
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_sizes(text: str) -> list[int]:
    """ "64K,1M" as bytes; K, M and G are powers of 1024.

    Raises:
        ValueError: a part that is no size, or only one of them.
    """
    sizes = []
    for part in text.split(","):
        digits = part.removesuffix(part[-1:]) if part[-1:] in _UNITS else part
        if not digits.isdecimal() or int(digits) == 0:
            raise ValueError(f"--sizes {text}: {part!r} is no size; give, for example, 64K,1M,16M")
        sizes.append(int(digits) * _UNITS.get(part[-1:], 1))
    if len(set(sizes)) < 2:
        raise ValueError(
            f"--sizes {text}: a latency and a bandwidth need two sizes at least; give, for example, 64K,16M"
        )
    return sorted(set(sizes))


class BenchProgress:
    """How far the measuring is: a live line in a terminal, a plain line for each measurement elsewhere."""

    def __init__(self, total: int, silent: bool) -> None:
        console = Console(stderr=True)
        self._lines = not silent and not console.is_terminal
        self._done, self._total = 0, total
        self._bar = Progress(
            TextColumn("measuring"),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=silent or not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> "BenchProgress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def __call__(self, made: Measurement) -> None:
        self._done += 1
        text = f"{made.collective} over {made.axis}, {size_in_words(made.message_bytes)}"
        self._bar.update(self._task, completed=self._done, description=text)
        if self._lines:
            print(f"measured {self._done}/{self._total}: {text}", file=sys.stderr, flush=True)


def print_measurements(measured: Sequence[Measurement], console: Console) -> None:
    """One row for each collective, axis and size."""
    table = Table("collective", "axis", "devices", "link", "message", "time", "fastest - slowest", "sent", box=None)
    for each in measured:
        table.add_row(
            each.collective,
            each.axis,
            str(each.devices),
            each.link.replace("_", " "),
            size_in_words(each.message_bytes),
            f"{each.seconds * 1e6:,.0f} µs",
            f"{each.fastest * 1e6:,.0f} - {each.slowest * 1e6:,.0f} µs",
            f"{each.sent_bytes / each.seconds / 1e9:.3f} GB/s",
        )
    console.print(table)


def print_links(links: Links, console: Console) -> None:
    """One row for each fit, under a line on what was measured."""
    console.print(
        f"\n{links.device} ({links.platform}), jax {links.jax}, {links.hosts} host{'s' * (links.hosts > 1)}, "
        f"{links.processes} process{'es' * (links.processes > 1)}: time = latency + bytes sent / bandwidth"
    )
    table = Table("collective", "link", "devices", "latency", "bandwidth", "worst error of the fit", box=None)
    for each in links.links:
        table.add_row(
            each.collective,
            each.link.replace("_", " "),
            str(each.devices),
            f"{each.latency * 1e6:,.1f} µs",
            f"{each.bandwidth / 1e9:.3f} GB/s",
            f"{each.worst_error:.0%}",
        )
    console.print(table)
    if any(each.worst_error > _GOOD_FIT for each in links.links):
        console.print(
            f"where the fit is off by more than {_GOOD_FIT:.0%}, time is no line in the bytes: caches (on CPU), other "
            "work on the machine, or a change of algorithm; narrow --sizes to what is to be planned"
        )


def size_in_words(size: int) -> str:
    """Bytes as KiB or MiB, rounded."""
    return f"{size / (1 << 20):,.4g} MiB" if size >= 1 << 20 else f"{size / (1 << 10):,.4g} KiB"
