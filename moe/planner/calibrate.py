"""Shares of peak, fitted on published training speeds; and how far off predictions of others are.

    python -m moe.planner.calibrate

Few numbers, each with a meaning and with what measurements of its own say of it; published speeds move it from there.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moe.planner.efficiency import CALIBRATED, Efficiency
from moe.planner.estimate import estimate_work, idle_share
from moe.planner.predict import Prediction, predict
from moe.planner.published import OTHERS, ROWS, Row
from moe.planner.work import Work


@dataclass(frozen=True)
class Prior:
    """What is known of one of the `Efficiency`'s numbers without a training run. doubt: a standard deviation."""

    field: str
    value: float
    doubt: float
    source: str


PRIORS = (
    Prior(
        "matmul",
        0.75,
        0.05,
        "700 to 795 TFLOP/s for large bfloat16 products on an H100 of 700 W (stas00/ml-engineering: at most 795)",
    ),
    Prior("memory", 0.85, 0.05, "copies on an H100: 2.8 to 3.0 TB/s"),
    Prior("inside", 0.80, 0.05, "nccl-tests on 8 H100s: bus bandwidth of 340 to 370 GB/s"),
    Prior("across", 0.85, 0.05, "nccl-tests over 400 Gb/s: 40 to 46 GB/s a card"),
    Prior("busy", 0.90, 0.10, "idle gaps in profiles of eager PyTorch: up to a fifth"),
)
NOISE = 0.10
"""Standard deviation of a speed's logarithm that no such model explains. Published speeds of one setup differ by so
much: DeepSeek-V3's by 14% between 256 and 1024 GPUs, Mixtral 8x22B's by 7% between two reports."""


def predict_row(row: Row, efficiency: Efficiency, work: Work | None = None) -> Prediction:
    """Of one of its accumulated batches."""
    tokens = row.job.tokens
    kernels = replace(
        efficiency,
        grouped_own=False,
        attention=row.attention,
        attention_scores=1.0,
        busy=efficiency.busy if row.eager else 1.0,
        parallel_links=True,
    )
    return predict(
        work or estimate_work(row.job, 8, row.how),
        row.chip,
        row.cluster,
        tokens=tokens,
        model_flops=tokens * row.flops_per_token,
        idle=idle_share(row.job),
        efficiency=kernels,
    )


def error(row: Row, efficiency: Efficiency, work: Work | None = None) -> float:
    """Of the predicted speed, relative to the published one."""
    return predict_row(row, efficiency, work).tokens_per_second / row.tokens_per_second - 1


def fit(rows: tuple[Row, ...]) -> Efficiency:
    """The numbers of `PRIORS` that are likeliest, given these rows: Gauss-Newton on the logarithms of the speeds."""
    works = [estimate_work(row.job, 8, row.how) for row in rows]
    start = np.array([prior.value for prior in PRIORS])
    doubt = np.array([prior.doubt for prior in PRIORS])

    def misses(values: np.ndarray) -> np.ndarray:
        efficiency = _with(values)
        found = [np.log1p(error(row, efficiency, work)) for row, work in zip(rows, works, strict=True)]
        return np.concatenate([np.array(found) / NOISE, (values - start) / doubt])

    values, step = start, 1e-4
    for _ in range(3):
        now = misses(values)
        slopes = [(misses(values + step * unit) - now) / step for unit in np.eye(len(values))]
        values = values - np.linalg.lstsq(np.stack(slopes, 1), now, rcond=None)[0]
    return _with(values)


def _with(values: np.ndarray) -> Efficiency:
    fields: dict[str, Any] = {prior.field: float(value) for prior, value in zip(PRIORS, values, strict=True)}
    return replace(CALIBRATED, **fields)


def leave_one_out(rows: tuple[Row, ...]) -> dict[str, float]:
    """The error of each row, predicted by what is fitted on the others."""
    return {row.name: error(row, fit(tuple(other for other in rows if other is not row))) for row in rows}


def report(fitted: Efficiency, alone: dict[str, float]) -> str:
    """
    Args:
        alone: of `leave_one_out`.
    """
    lines = [
        f"{prior.field:8} {prior.value:.2f} ± {prior.doubt:.2f} → {getattr(fitted, prior.field):.3f}  {prior.source}"
        for prior in PRIORS
    ]
    lines.append(f"\nTFLOP/s a GPU{'':11}{'published':>10}{'predicted':>10}{'error':>8}{'left out':>10}")
    for row in (*ROWS, *OTHERS):
        off = error(row, fitted)
        out = f"{alone[row.name]:+.1%}" if row.name in alone else "held out"
        lines.append(f"{row.name:24}{row.tflops:10.0f}{row.tflops * (1 + off):10.0f}{off:+8.1%}{out:>10}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(fit(ROWS), leave_one_out(ROWS)))
