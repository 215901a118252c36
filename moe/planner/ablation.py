"""What each lever is worth: the plan of the full recipe beside those with one lever turned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from moe.planner.levers import Variant
from moe.planner.pictures import draw_factors
from moe.planner.plan import Plan
from moe.planner.plan_report import ESTIMATED
from moe.planner.report import Report, Section, table
from moe.planner.units import amount, digits, flop, gib, seconds, times

VERSION = 1


@dataclass(frozen=True)
class Row:
    """
    variant: None for the full recipe. plan: None where there is no such program; refusal: why.
    loss: after training each for the same steps, nats a token; None where it was not trained.
    """

    variant: Variant | None
    plan: Plan | None
    refusal: str = ""
    loss: float | None = None

    @property
    def label(self) -> str:
        if self.variant is None:
            return "full recipe"
        return f"{'without' if self.variant.turned == 'off' else 'with'} {self.variant.lever}"


def ablation_report(tables: Mapping[str, Sequence[Row]], name: str) -> Report:
    """
    Args:
        tables: by chip; the first row of each is the full recipe.
        name: of the experiment.
    """
    plans = [row.plan for rows in tables.values() for row in rows if row.plan is not None]
    return Report(
        title=f"{name}: what each lever is worth",
        verdict=_verdict(tables),
        good=True,
        warnings=(ESTIMATED,) if any(plan.origin == "estimated" for plan in plans) else (),
        sections=(
            *(_section(chip, rows) for chip, rows in tables.items()),
            Section(
                "In the picture", notes=("Cost of a token in chip-hours, times the full recipe's.",), picture="levers"
            ),
            Section("What stands in the lever's place", _changes(tables)),
            Section("Assumptions", notes=ASSUMPTIONS),
        ),
    )


ASSUMPTIONS = (
    "One lever is turned at a time, the rest stays: batch, sequence and number of GPUs too. Times are predicted, of a "
    "recipe that does not fit as of one that would.",
    "GQA, CLA and experts change the model. The dense twin has the loss of the mixture by a published law, which "
    "extrapolates here; the other two are set side by side as they are.",
    "Exposed: what the devices wait for. Bytes are counted as exposed by the share of their time that is.",
)


def ablation_values(tables: Mapping[str, Sequence[Row]], name: str) -> dict[str, Any]:
    """As JSON values; bytes, FLOPs and seconds are of one GPU in a step.

    chips: by name, rows of lever ("" for the full recipe), turned "off" or "on", instead, refusal (why there is no
    plan, else ""), loss (null where it was not trained), and where there is a plan: origin, fits, parameters,
    allocated_bytes, spare_bytes, executed_flops, exposed_bytes, exposed_seconds, step_seconds, tokens_per_second, mfu,
    chip_hours_per_1e12_tokens, cost (times the full recipe's).
    """
    return {
        "version": VERSION,
        "experiment": name,
        "chips": {chip: [_values(row, rows[0]) for row in rows] for chip, rows in tables.items()},
        "assumptions": list(ASSUMPTIONS),
    }


def draw_levers(tables: Mapping[str, Sequence[Row]]) -> Figure:
    """One group of bars a lever, one bar a chip: the cost of a token against the full recipe."""
    bars: dict[str, dict[str, tuple[float, bool]]] = {}
    for chip, rows in tables.items():
        for row in rows[1:]:
            cost = _cost(row, rows[0])
            if row.plan is not None and cost is not None:
                bars.setdefault(row.label, {})[chip] = (cost, row.plan.fits)
    return draw_factors(bars, list(tables), "cost of a token, times the full recipe's")


def _verdict(tables: Mapping[str, Sequence[Row]]) -> str:
    """For each chip the lever whose absence costs most, and how many levers the recipe cannot do without."""
    told = []
    for chip, rows in tables.items():
        off = [row for row in rows[1:] if row.variant is not None and row.variant.turned == "off"]
        needed = sum(row.plan is None or not row.plan.fits for row in off)
        costs = {row.variant.lever: cost for row in off if row.variant and (cost := _cost(row, rows[0])) is not None}
        dearest = max(costs, key=lambda lever: costs[lever], default=None)
        most = f"without {dearest} a token costs {times(costs[dearest])}; " if dearest else ""
        told.append(f"{chip}: {most}{needed} of {len(off)} levers are needed for it to fit")
    return " · ".join(told)


def _section(chip: str, rows: Sequence[Row]) -> Section:
    first = rows[0].plan
    title = f"{chip}, {first.devices} GPUs" if first is not None else chip
    columns = [
        "", "memory", "fits", "executed", "exposed bytes", "exposed", "step", "tokens/s", f"{chip}-hours / 1e12 tokens",
        "cost",
    ]  # fmt: skip
    trained = any(row.loss is not None for row in rows)
    losses = ["–" if row.loss is None else f"{row.loss:.3f}" for row in rows]
    cells = [(*_cells(row, rows[0]), *([loss] if trained else [])) for row, loss in zip(rows, losses, strict=True)]
    notes = tuple(f"{row.label}: {row.refusal}" for row in rows if row.refusal)
    return Section(title, table([*columns, *(["loss"] if trained else [])], cells), notes)


def _cells(row: Row, full: Row) -> tuple[str, ...]:
    plan = row.plan
    if plan is None:
        return (row.label, "–", "no such program", *("–",) * 7)
    exposed_bytes, exposed = exposed_of(plan)
    cost = _cost(row, full)
    return (
        row.label,
        gib(plan.memory.allocated),
        "yes" if plan.fits else f"no, {gib(-plan.spare)} over",
        flop(plan.work.flops),
        amount(exposed_bytes),
        seconds(exposed),
        seconds(plan.prediction.seconds),
        digits(plan.prediction.tokens_per_second),
        digits(plan.chip_hours_per_trillion),
        "–" if cost is None else times(cost),
    )


def _changes(tables: Mapping[str, Sequence[Row]]) -> Any:
    seen = {row.label: row.variant for rows in tables.values() for row in rows if row.variant is not None}
    rows = [(label, variant.instead) for label, variant in seen.items()]
    return table(("lever", "instead"), rows, words=2)


def exposed_of(plan: Plan) -> tuple[float, float]:
    """Bytes and seconds of one device's exchanges that its arithmetic does not hide."""
    moved = 0.0
    for each in plan.exchanges:
        whole = each.hidden + each.exposed
        moved += (each.inside + each.across) * (each.exposed / whole if whole else 0.0)
    return moved, sum(each.exposed for each in plan.exchanges)


def _cost(row: Row, full: Row) -> float | None:
    """Of a token, times the full recipe's."""
    if row.plan is None or full.plan is None:
        return None
    return row.plan.chip_hours_per_trillion / full.plan.chip_hours_per_trillion


def _values(row: Row, full: Row) -> dict[str, Any]:
    variant, plan = row.variant, row.plan
    values: dict[str, Any] = {
        "lever": variant.lever if variant else "",
        "turned": variant.turned if variant else "",
        "instead": variant.instead if variant else "",
        "refusal": row.refusal,
        "loss": row.loss,
    }
    if plan is None:
        return values
    exposed_bytes, exposed = exposed_of(plan)
    return values | {
        "origin": plan.origin,
        "fits": plan.fits,
        "parameters": plan.parameters,
        "allocated_bytes": plan.memory.allocated,
        "spare_bytes": plan.spare,
        "executed_flops": plan.work.flops,
        "exposed_bytes": exposed_bytes,
        "exposed_seconds": exposed,
        "step_seconds": plan.prediction.seconds,
        "tokens_per_second": plan.prediction.tokens_per_second,
        "mfu": plan.prediction.mfu,
        "chip_hours_per_1e12_tokens": plan.chip_hours_per_trillion,
        "cost": _cost(row, full),
    }
