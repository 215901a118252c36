"""What a report is made of, however it is shown: sections of tables, notes and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """
    columns: headings. rows: cells as they are shown. words: so many columns, from the left, hold words; the others
        hold figures.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1


@dataclass(frozen=True)
class Section:
    """notes: sentences under the table. picture: the name of one that belongs here, "" for none."""

    title: str
    table: Table | None = None
    notes: tuple[str, ...] = ()
    picture: str = ""


@dataclass(frozen=True)
class Report:
    """verdict: one line that says all. good: whether it is good news. warnings: what must not be overlooked."""

    title: str
    verdict: str
    good: bool
    warnings: tuple[str, ...]
    sections: tuple[Section, ...]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> Table:
    return Table(tuple(columns), tuple(tuple(row) for row in rows), words)
