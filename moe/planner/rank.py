"""Which of several layouts is best, and why the others lost."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe.planner.plan import Plan
from moe.planner.predict import Term
from moe.planner.units import amount, seconds

LOSSES: dict[Term, str] = {
    "matmul": "products take",
    "grouped_matmul": "experts take",
    "attention": "attention takes",
    "memory_bound": "what moves memory takes",
    "launches": "starting kernels takes",
    "exposed_inside": "waiting for the own node takes",
    "exposed_across": "waiting for other nodes takes",
    "exposed_host": "waiting for the host takes",
    "pipeline_idle": "idle stages take",
}
"""What one layout spends more time on than another, in words; then comes how much."""


@dataclass(frozen=True)
class Option:
    """A plan with the changes of settings that lead to it. saving: what it does to fit, in words."""

    changes: Mapping[str, Any]
    saving: str
    plan: Plan

    @property
    def order(self) -> tuple[bool, float, str]:
        """Sorts the best to the front: what fits before what does not, then by time, or by the bytes that lack."""
        plan = self.plan
        last = plan.prediction.seconds if plan.fits else float(-plan.spare)
        return (not plan.fits, last, str(sorted(self.changes.items())))


def ranked(options: Iterable[Option]) -> list[Option]:
    """Best first: the same order for the same options, however they came."""
    return sorted(options, key=lambda option: option.order)


def why_lost(option: Option, best: Option) -> str:
    """What `best` has over `option`."""
    if not option.plan.fits:
        return f"lacks {amount(-option.plan.spare)} on each GPU"
    own, other = option.plan.prediction, best.plan.prediction
    slower = own.seconds / other.seconds - 1
    if slower < 0.001:
        return "as fast"
    more = {term: own.terms[term] - other.terms[term] for term in LOSSES}
    term = max(more, key=lambda term: more[term])
    return f"{slower:.1%} slower: {LOSSES[term]} {seconds(more[term])} more"
