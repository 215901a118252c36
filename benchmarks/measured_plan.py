"""Plans beside measurements, on the one GPU at hand: what was predicted without it, and what its clock and its memory
say.

    python -m benchmarks.measured_plan [--cases NAMES] [--repeats 20] [--json FILE]

Each case is compiled twice: for the described chip, as `experiments.plan` does, whose time and memory are the plan; and
for the GPU itself, which runs it. Both need `make plan-setup`, whose environment holds JAX for GPUs.
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.spread import machine, spread
from benchmarks.train_step import drawn_batch
from moe.model.config import ModelConfig, RouterConfig
from moe.model.execution import Execution
from moe.model.precision import Precision
from moe.model.presets import HUNYUAN_LARGE, SPEED_158M
from moe.planner.chips import CHIPS, Chip
from moe.planner.job import Job
from moe.planner.lower import training_step
from moe.planner.plan import Plan, make_plan
from moe.train.data import Batch
from moe.train.optimizer import OptimizerConfig
from moe.train.state import Blueprint
from parallel.layout import SINGLE_DEVICE
from parallel.network.cluster import Cluster

SHARE_OF_HUNYUAN = replace(HUNYUAN_LARGE, num_layers=2, num_experts=2, vocab_size=16_064)
"""What one of eight GPUs holds that share out the experts and the table of words, two of 64 layers of it."""
SMALL = ModelConfig(
    vocab_size=32_000,
    d_model=2048,
    num_layers=8,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    num_experts=8,
    d_expert=4096,
    num_shared_experts=0,
    router=RouterConfig(top_k=2),
)
"""1.8B parameters, a quarter of the experts at work."""

BF16_STATES = OptimizerConfig(states="bfloat16")

CASES: dict[str, Job] = {
    "Hunyuan-Large, a share": Job(
        "train", SHARE_OF_HUNYUAN, 4, 4096, execution=Execution(remat="full"), optimizer=BF16_STATES
    ),
    "Hunyuan-Large, a share, fp8 by row": Job(
        "train", SHARE_OF_HUNYUAN, 4, 4096, Precision(matmuls="fp8", scaling="row"), Execution(remat="full"),
        BF16_STATES,
    ),
    "1.8B, nothing recomputed": Job("train", SMALL, 4, 4096, execution=Execution(remat="none")),
    "1.8B, float32": Job(
        "train", SMALL, 2, 2048, Precision(compute="float32", exchange="float32"), Execution(remat="full")
    ),
    "158M": Job("train", SPEED_158M, 4, 512),
    "158M, longer": Job("train", SPEED_158M, 32, 2048),
}  # fmt: skip
"""By name: steps that one GPU of 80 GB can take."""


WARM = 3
"""Steps that are not counted."""


@dataclass(frozen=True)
class Program:
    """A case's step, compiled for the GPU at hand, and the batch on which it is run."""

    step: Any
    blueprint: Blueprint
    batch: Batch

    @property
    def held(self) -> int:
        """Bytes that XLA laid out for it."""
        memory = self.step.memory_analysis()
        kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return int(kept + memory.temp_size_in_bytes)


def compile_here(job: Job) -> Program:
    blueprint, step = training_step(job, SINGLE_DEVICE)
    batch = jax.device_put(drawn_batch(job.model.vocab_size, job.batch_size, job.sequence_length))
    return Program(step.lower(blueprint.abstract_state(), batch).compile(), blueprint, batch)


def time_steps(program: Program, repeats: int, trace: Path | None) -> list[float]:
    """Seconds of each of real steps, after some that are not counted. The batch is the same in all."""
    state = program.blueprint.create_state(seed=0)
    seconds = []

    def take() -> None:
        nonlocal state
        begin = time.perf_counter()
        state, metrics = program.step(state, program.batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - begin)

    for _ in range(WARM + repeats):
        take()
    if trace is not None:
        with jax.profiler.trace(str(trace)):
            take()
        (trace / "program.hlo").write_text(program.step.as_text(), "utf-8")
    return seconds[WARM : WARM + repeats]


def chip_at_hand() -> Chip:
    """The planner's entry for this GPU, by its name's words."""
    kind = jax.devices()[0].device_kind
    found = [chip for chip in CHIPS.values() if chip.name.upper() in kind.upper().replace("-", " ").split()]
    if len(found) != 1:
        raise SystemExit(f"{kind} is none of {', '.join(CHIPS)}: add it to moe/planner/chips.py")
    return found[0]


def row_of(plan: Plan, program: Program, seconds: list[float]) -> dict[str, Any]:
    return {
        "predicted_seconds": plan.prediction.seconds,
        "terms": plan.prediction.terms,
        "uses": plan.prediction.uses,
        "seconds": seconds,
        "mfu": plan.model_flops / statistics.median(seconds) / plan.peak,
        "planned_bytes": plan.memory.allocated,
        "held_bytes": program.held,
    }


def table_of(rows: dict[str, dict[str, Any]]) -> Table:
    table = Table(
        "step", "predicted ms", "measured ms", "measured / predicted", "MFU", "planned GiB", "compiled here",
        box=None,
    )  # fmt: skip
    for name, row in rows.items():
        milliseconds = [1e3 * seconds for seconds in row["seconds"]]
        table.add_row(
            name,
            f"{1e3 * row['predicted_seconds']:.1f}",
            spread(milliseconds, 1),
            f"{statistics.median(row['seconds']) / row['predicted_seconds']:.2f}",
            f"{row['mfu']:.1%}",
            *(f"{row[key] / 2**30:.2f}" for key in ("planned_bytes", "held_bytes")),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help=f"with semicolons, how they begin, of: {'; '.join(CASES)}")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--trace", type=Path, metavar="DIR", help="keep a profiled step of each case, and its HLO")
    given = parser.parse_args()
    chosen = CASES if given.cases is None else _chosen(given.cases.split(";"))
    told = Console(stderr=True, highlight=False, soft_wrap=True)
    chip, rows = chip_at_hand(), {}
    told.print(f"[dim]compiling {len(chosen)} steps for this {chip.device}, and as planned[/]")
    # XLA compiles without Python's lock.
    with ThreadPoolExecutor(len(chosen)) as pool:
        plans = pool.map(lambda job: make_plan(job, chip, Cluster(gpus_per_node=1)), chosen.values())
        compiled = list(zip(chosen, plans, pool.map(compile_here, chosen.values()), strict=True))
    for name, plan, program in compiled:
        folder = None if given.trace is None else given.trace / "".join(c if c.isalnum() else "_" for c in name)
        rows[name] = row_of(plan, program, time_steps(program, given.repeats, folder))
        if given.json is not None:
            given.json.write_text(json.dumps(rows, indent=1), "utf-8")
    console = Console(width=160, highlight=False)
    console.print(f"{machine()}, {given.repeats} steps: median (least to most)")
    console.print(table_of(rows))


def _chosen(beginnings: list[str]) -> dict[str, Job]:
    return {name: job for name, job in CASES.items() if any(name.startswith(text) for text in beginnings)}


if __name__ == "__main__":
    main()
