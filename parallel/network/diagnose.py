"""The doctor: a pure function from a recording to findings, a verdict for each rail, and one for the node."""

from collections import Counter
from collections.abc import Sequence

from parallel.network.checks import (
    check_distances,
    check_gpus,
    check_links,
    check_log,
    check_registration,
    check_roce,
)
from parallel.network.facts import Facts, understand
from parallel.network.findings import SEVERITIES, Diagnosis, Finding, Rail, Verdict
from parallel.network.node_checks import check_machine, check_pcie, check_unknown, check_variables
from parallel.network.rails import find_rails
from parallel.network.recording import Recording


def diagnose(recording: Recording) -> Diagnosis:
    """Whether GPUDirect RDMA will be used on the recorded node, and if not, why not and what to do."""
    facts = understand(recording)
    nowhere = _no_gpu(recording, facts)
    if nowhere:
        return Diagnosis(False, "no", f"There is no GPU here: {nowhere}.", (), ())
    rails = find_rails(facts)
    findings = _findings(facts, rails)
    verdict, sentence = _overall(rails)
    return Diagnosis(True, verdict, sentence, rails, findings)


def _findings(facts: Facts, rails: Sequence[Rail]) -> tuple[Finding, ...]:
    found = [
        *check_gpus(facts),
        *check_links(facts),
        *check_roce(facts),
        *check_distances(facts, rails),
        *check_registration(facts),
        *check_variables(facts, rails),
        *check_log(facts, rails),
        *check_pcie(facts),
        *check_machine(facts),
        *check_unknown(facts.unknown),
    ]
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def _no_gpu(recording: Recording, facts: Facts) -> str | None:
    """Why there is no GPU, where that is certain: nvidia-smi says so, or both it and the driver are absent."""
    if facts.gpus == ():
        return "nvidia-smi finds none"
    if {"nvidia-smi-gpus.txt", "driver.txt"} <= recording.missing.keys() and facts.topology is None:
        return "; ".join(recording.missing[name] for name in ("nvidia-smi-gpus.txt", "driver.txt"))
    return None


def _overall(rails: Sequence[Rail]) -> tuple[Verdict, str]:
    if not rails:
        return "unknown", "Cannot tell whether GPUDirect RDMA will be used: the GPUs are not known."
    counts = Counter(rail.verdict for rail in rails)
    if counts["yes"] == len(rails):
        proof = "NCCL's log shows it" if all(rail.proven for rail in rails) else "so the settings say; no log proves it"
        return "yes", f"GPUDirect RDMA will be used for all {len(rails)} GPUs ({proof})."
    reason = _main_reason(rails)
    if counts["unknown"] and not counts["no"] and not counts["partly"]:
        return "unknown", f"Cannot tell whether GPUDirect RDMA will be used: {reason}."
    if counts["no"] == len(rails):
        return "no", f"GPUDirect RDMA will not be used: {reason}."
    used = f"{counts['yes']} of {len(rails)} GPUs"
    return "partly", f"GPUDirect RDMA will be used for {used} only: {reason}."


def _main_reason(rails: Sequence[Rail]) -> str:
    """The reason that most of the rails without it share, and whom it concerns."""
    order = ("no", "partly", "unknown")
    worst = next(verdict for verdict in order if any(rail.verdict == verdict for rail in rails))
    concerned = [rail for rail in rails if rail.verdict == worst]
    reason, count = Counter(rail.reason for rail in concerned).most_common(1)[0]
    if count == len(rails):
        return reason
    names = ", ".join(f"GPU{rail.gpu}" for rail in concerned if rail.reason == reason)
    return f"{names}: {reason}" + ("; others below" if count < len(concerned) else "")
