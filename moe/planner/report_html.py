"""A report as one HTML file that needs nothing else: styles and pictures stand inside."""

from collections.abc import Mapping
from html import escape

from matplotlib.figure import Figure

from moe.planner.pictures import svg
from moe.planner.report import Report, Section, Table

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --faint: #5f6670; --paper: #ffffff; --line: #d9dde3;
  --band: #f4f6f8; --good: #007a4d; --bad: #b3261e; --warn: #8a5a00; --warn-band: #fff6e0 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --faint: #9aa2ad; --paper: #16181c; --line: #33383f;
  --band: #1e2126; --good: #4cc38a; --bad: #ff7a70; --warn: #f0c060; --warn-band: #2b2415 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.35rem; margin: 0 0 .4rem; overflow-wrap: anywhere }
h2 { font-size: 1.05rem; margin: 2.2rem 0 .5rem }
.verdict { font-size: 1.1rem; font-weight: 600; margin: .3rem 0 }
.good { color: var(--good) } .bad { color: var(--bad) }
.warning { color: var(--warn); background: var(--warn-band); padding: .5rem .75rem; border-radius: .4rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; min-width: 24rem }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line) }
th { color: var(--faint); font-weight: 500; font-size: .85rem; white-space: nowrap }
.figure { text-align: right; white-space: nowrap }
td:not(.figure) { overflow-wrap: break-word; min-width: 5rem }
tr:last-child td { border-bottom: none }
.note { color: var(--faint); font-size: .88rem; margin: .35rem 0; max-width: 52rem }
figure { margin: 1rem 0; overflow-x: auto }
figure svg { width: 100%; min-width: 30rem; max-width: 60rem; height: auto; display: block }
"""


def html(report: Report, pictures: Mapping[str, Figure]) -> str:
    """The page. `pictures` are those that the sections name."""
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{STYLE}</style></head>"
    )
    body = [
        f"<h1>{escape(report.title)}</h1>",
        f'<p class="verdict {"good" if report.good else "bad"}">{escape(report.verdict)}</p>',
        *(f'<p class="warning">{escape(warning)}</p>' for warning in report.warnings),
        *(_section(section, pictures) for section in report.sections),
    ]
    return f"{head}<body><main>{''.join(body)}</main></body></html>\n"


def _section(section: Section, pictures: Mapping[str, Figure]) -> str:
    parts = [f"<section><h2>{escape(section.title)}</h2>"]
    if section.picture:
        parts.append(f"<figure>{svg(pictures[section.picture], section.picture)}</figure>")
    if section.table is not None:
        parts.append(_table(section.table))
    parts += [f'<p class="note">{escape(note)}</p>' for note in section.notes]
    return "".join([*parts, "</section>"])


def _table(table: Table) -> str:
    def row(cells: tuple[str, ...], tag: str) -> str:
        marks = ("" if place < table.words else ' class="figure"' for place in range(len(cells)))
        inside = (f"<{tag}{mark}>{escape(cell)}</{tag}>" for mark, cell in zip(marks, cells, strict=True))
        return f"<tr>{''.join(inside)}</tr>"

    body = "".join(row(cells, "td") for cells in table.rows)
    return f'<div class="scroll"><table><thead>{row(table.columns, "th")}</thead><tbody>{body}</tbody></table></div>'
