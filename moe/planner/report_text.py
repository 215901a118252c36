"""A report on the screen."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from moe.planner.report import Report, Table


def print_report(report: Report, console: Console) -> None:
    """Tables one below the other; pictures are left to the HTML."""
    console.print(f"[bold]{escape(report.title)}[/]")
    console.print(f"[bold {'green' if report.good else 'red'}]{escape(report.verdict)}[/]")
    for warning in report.warnings:
        console.print(f"[yellow]{escape(warning)}[/]")
    for section in report.sections:
        console.print(f"\n[bold]{escape(section.title)}[/]")
        if section.table is not None:
            console.print(_grid(section.table))
        for note in section.notes:
            console.print(f"[dim]{escape(note)}[/]")


def _grid(table: Table) -> Grid:
    grid = Grid(box=None, pad_edge=False)
    for place, column in enumerate(table.columns):
        grid.add_column(escape(column), justify="left" if place < table.words else "right", overflow="fold")
    for row in table.rows:
        grid.add_row(*map(escape, row))
    return grid
