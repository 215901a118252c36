"""What the doctor says: findings, the verdict on each GPU with its network card, and the verdict on the node."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["problem", "warning", "unknown", "ok"]
SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "unknown", "ok")
"""In the order in which they are told."""
Verdict = Literal["yes", "partly", "no", "unknown"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    topic: what, in a word or two; text: what was found; remedy: what to do, "" where nothing is needed.
    evidence: where it was read.
    """

    severity: Severity
    topic: str
    text: str
    evidence: str
    remedy: str = ""


@dataclass(frozen=True)
class Rail:
    """A GPU with the network card that is its own.

    nic, distance, link: None where there is no card, or it is not known.
    proven: NCCL's log shows it; otherwise it is concluded from the settings.
    """

    gpu: int
    nic: str | None
    distance: str | None
    link: str | None
    verdict: Verdict
    reason: str
    proven: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """The doctor's answer. `gpus` is False where there is no GPU; then there are no rails."""

    gpus: bool
    verdict: Verdict
    sentence: str
    rails: tuple[Rail, ...]
    findings: tuple[Finding, ...]
