"""Tokens a second of the 158M preset's whole train step, beside a dense model of the same active size.

    python -m benchmarks.train_step [--repeats 5]

Both take turns, each in a process of its own; ratios compare a turn with the turn beside it.
"""

import statistics
import time
from contextlib import ExitStack
from dataclasses import replace

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.rivals.job import draw_tokens
from benchmarks.rivals.pairing import alternate, ratios
from benchmarks.rivals.party import drive_or_join, party
from benchmarks.rivals.protocol import About, Take
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
MODELS = {"MoE 158M": SPEED_158M, "dense of its active size": DENSE}
FORMATS = {"bfloat16": Precision(), "float32": FULL}
MODULE = "benchmarks.train_step"


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
    *,
    steps: int = 1,
    scan_layers: bool = True,
) -> tuple[Take, float]:
    """A function that takes so many steps, and the model FLOPs of a token."""
    execution = Execution(scan_layers=scan_layers)
    blueprint = make_blueprint(config, precision, execution, OptimizerConfig(), layout, steps=10_000)
    given = place_batch(drawn_batch(config.vocab_size, batch, length), layout)
    state = blueprint.create_state(seed=0)
    step = compile_step(make_train_step(blueprint, seed=0), state, given)

    def take() -> tuple[dict[str, float], float]:
        nonlocal state
        begin = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, given)
        jax.block_until_ready((state, metrics))
        return {"step": time.perf_counter() - begin}, float(metrics.loss)

    take()
    return take, train_flops_per_token(config, blueprint.specs, length)


def begin(name: str, format: str) -> tuple[About, Take]:
    """Makes the model of this name ready to take turns. It is about the model FLOPs of a token."""
    take, flops = stepper(MODELS[name], FORMATS[format])
    return {"flops": flops}, take


def main() -> None:
    repeats = asked_repeats(MODULE, __doc__, 5, "turns of each model")
    console = Console(width=120, highlight=False)
    console.print(f"{machine()}, {repeats} turns: median (least to most)")
    table = Table(f"{BATCH} x {LENGTH} tokens", "tokens/s", "model GFLOP/s", "times as fast as dense", box=None)
    for format in FORMATS:
        with ExitStack() as stack:
            moe, dense = (stack.enter_context(party(MODULE, name, format=format)) for name in MODELS)
            pairs = alternate(moe, dense, repeats)
        turns = [pair.ours for pair in pairs], [pair.rival for pair in pairs]
        beside = spread(ratios(pairs, "step"), 2), ""
        for worker, taken, ratio in zip((moe, dense), turns, beside, strict=True):
            rates = [BATCH * LENGTH / turn.seconds["step"] for turn in taken]
            flops = statistics.median(rates) * worker.about["flops"] / 1e9
            table.add_row(f"{worker.name}, {format}", spread(rates, 0), f"{flops:,.0f}", ratio)
        console.print(f"  {format}: measured")
    console.print(table)


if __name__ == "__main__":
    use_large_pages()
    drive_or_join(main, begin)
