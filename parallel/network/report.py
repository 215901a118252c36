"""The doctor's answer as text and as JSON."""

import dataclasses
import json
from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from parallel.network.findings import Diagnosis, Finding, Rail

_STYLES = {"problem": "bold red", "warning": "yellow", "unknown": "magenta", "ok": "green"}
_VERDICT_STYLES = {"yes": "bold green", "partly": "bold yellow", "no": "bold red", "unknown": "bold magenta"}
REPORT_VERSION = 1


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """The verdict, the rails, then the findings with their remedies, worst first."""
    console.print(Text(diagnosis.sentence, style=_VERDICT_STYLES[diagnosis.verdict] if diagnosis.gpus else "bold"))
    if diagnosis.rails:
        console.print("", _rails(diagnosis.rails))
    if diagnosis.findings:
        console.print()
        for finding in diagnosis.findings:
            _print_finding(finding, console)


def as_json(diagnosis: Diagnosis, exit_code: int) -> str:
    """{"version", "exit_code", "gpus", "verdict", "sentence", "rails": […], "findings": […]}, for programs."""
    content = {"version": REPORT_VERSION, "exit_code": exit_code} | dataclasses.asdict(diagnosis)
    return json.dumps(content, indent=1, ensure_ascii=False)


def _rails(rails: Sequence[Rail]) -> Table:
    table = Table("GPU", "card", "distance", "link", "direct", "why", box=None)
    for rail in rails:
        verdict = Text(rail.verdict, style=_VERDICT_STYLES[rail.verdict])
        table.add_row(
            f"GPU{rail.gpu}", rail.nic or "-", rail.distance or "-", rail.link or "-", verdict, Text(rail.reason)
        )
    return table


def _print_finding(finding: Finding, console: Console) -> None:
    head = Text.assemble(
        (f"{finding.severity:8}", _STYLES[finding.severity]), (finding.topic, "bold"), ": ", finding.text
    )
    console.print(head)
    if finding.remedy:
        console.print(Padding(Text(f"do: {finding.remedy}"), (0, 0, 0, 8)))
    if finding.severity != "ok":
        console.print(Padding(Text(f"read in: {finding.evidence}", style="dim"), (0, 0, 0, 8)))
