"""Tokens a second of the 158M preset's whole train step, beside a dense model of the same active size.

    python -m benchmarks.train_step [--repeats 5]

The three models take turns in one process, so that they share the machine's moods; ratios compare turns with turns.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.rivals.job import draw_tokens
from benchmarks.spread import asked_repeats, machine, spread
from moe.model.config import ModelConfig
from moe.model.count import train_flops_per_token
from moe.model.execution import Execution
from moe.model.precision import FULL, Precision
from moe.model.presets import SPEED_158M
from moe.train.data import Batch
from moe.train.optimizer import OptimizerConfig
from moe.train.state import make_blueprint
from moe.train.step import compile_step, make_train_step, place_batch
from parallel.layout import SINGLE_DEVICE, Layout
from parallel.malloc import use_large_pages

BATCH, LENGTH = 4, 512
DENSE = replace(SPEED_158M, num_experts=0, num_shared_experts=0, d_dense=2 * SPEED_158M.d_expert)
"""The shared and the one chosen expert as one feed-forward layer: the same products for each token, no routing."""

CONTENDERS: dict[str, tuple[ModelConfig, Precision]] = {
    "MoE 158M, bfloat16": (SPEED_158M, Precision()),
    "MoE 158M, float32": (SPEED_158M, FULL),
    "dense of its active size, bfloat16": (DENSE, Precision()),
    "dense of its active size, float32": (DENSE, FULL),
}


def drawn_batch(vocab_size: int, batch: int, length: int) -> Batch:
    """Random tokens, a document to each sequence."""
    tokens_BT, targets_BT = draw_tokens(vocab_size, batch, length)
    positions_BT = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    ones_BT = np.ones((batch, length), np.int32)
    return Batch(tokens_BT, targets_BT, positions_BT, ones_BT, ones_BT.astype(np.float32))


def stepper(
    config: ModelConfig,
    precision: Precision,
    batch: int = BATCH,
    length: int = LENGTH,
    layout: Layout = SINGLE_DEVICE,
) -> tuple[Callable[[], tuple[float, float]], float]:
    """A function that takes one step and returns its seconds and its loss, and the model FLOPs of a token."""
    blueprint = make_blueprint(config, precision, Execution(), OptimizerConfig(), layout, steps=10_000)
    given = place_batch(drawn_batch(config.vocab_size, batch, length), layout)
    state = blueprint.create_state(seed=0)
    step = compile_step(make_train_step(blueprint, seed=0), state, given)

    def take() -> tuple[float, float]:
        nonlocal state
        begin = time.perf_counter()
        state, metrics = step(state, given)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - begin, float(metrics.loss)

    take()
    return take, train_flops_per_token(config, blueprint.specs, length)


def main() -> None:
    repeats = asked_repeats("benchmarks.train_step", __doc__, 5, "turns of each model")
    steppers = {name: stepper(*contender) for name, contender in CONTENDERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(repeats):
        for name, (take, _) in steppers.items():
            seconds[name].append(take()[0])

    table = Table(
        f"{BATCH} x {LENGTH} tokens", "tokens/s", "model GFLOP/s", "of the dense one in the same format", box=None
    )
    for name, (_, flops) in steppers.items():
        rates = BATCH * LENGTH / np.array(seconds[name])
        rival = name.replace("MoE 158M", "dense of its active size")
        ratios = np.array(seconds[rival]) / np.array(seconds[name])
        table.add_row(
            name,
            spread(rates.tolist(), 0),
            f"{np.median(rates) * flops / 1e9:,.0f}",
            spread(ratios.tolist(), 2),
        )
    console = Console(width=120, highlight=False)
    console.print(f"{machine()}, {repeats} turns: median (least to most)")
    console.print(table)


if __name__ == "__main__":
    use_large_pages()
    main()
