"""What serving in fewer bits saves and costs: python -m benchmarks.quantized_serving RUN

Of a model that was trained here, for each way to keep weights, cache and activations: bytes, speed, perplexity on the
run's held-out text, and the share of the routers' choices that changed, against bfloat16. Texts go through the cache,
as served.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.serving import seconds_of
from benchmarks.spread import machine, spread
from moe import HunyuanMoE
from moe.model.folder import copy_tokenizer
from moe.model.hf.convert import export_trained
from moe.serve.engine import Engine, Served
from moe.serve.quantize import report, write
from moe.serve.sampling import Sampling
from moe.train.data import Batch, Data, DataConfig, open_data
from moe.train.objective import summed_loss
from moe.train.pretrained import open_pretrained
from moe.train.routing_changes import changed_share, watched
from moe.train.trained import ArraySource
from parallel.layout import SINGLE_DEVICE

SLOTS, CONTEXT = 4, 128
"""Texts that are decoded at once, and the tokens that each holds before."""


@dataclass(frozen=True)
class Way:
    """Arguments of `HunyuanMoE.from_hf`. calibrated: of int4, by GPTQ on the run's training text."""

    name: str
    weights: Any = None
    activations: Any = None
    cache: Any = None
    calibrated: bool = False


WAYS = (
    Way("bfloat16"),
    Way("weights int8", "int8"),
    Way("weights fp8", "fp8"),
    Way("weights int4", "int4"),
    Way("weights int4, GPTQ", "int4", calibrated=True),
    Way("weights nf4", "nf4"),
    Way("weights and activations int8", "int8", "int8"),
    Way("weights and activations fp8", "fp8", "fp8"),
    Way("cache int8", cache="int8"),
    Way("cache fp8", cache="fp8"),
    Way("weights, activations and cache int8", "int8", "int8", "int8"),
)


@dataclass
class Found:
    """Of one way. weight_bytes: of all parameters. cache_bytes: of a token. loss: nats a token. changed: share of the
    choices, in the mean over layers. decode, prefill: bfloat16's seconds over its own, turn by turn."""

    name: str
    weight_bytes: int
    cache_bytes: int
    loss: float
    changed: float
    decode: list[float]
    prefill: list[float]


def run_data(run: Path) -> Data:
    """The data that a run was trained on, from its folder."""
    told = json.loads((run / "config.json").read_text("utf-8"))["config"]
    settings = told["data"] | {"paths": tuple(told["data"]["paths"]), "batch_size": SLOTS}
    return open_data(DataConfig(**settings), vocab_size=told["model"]["vocab_size"], seed=told["training"]["seed"])


@contextmanager
def checkpoints(run: Path, data: Data, batches: int) -> Iterator[tuple[Path, Path, list[str]]]:
    """The run's model in bfloat16, the same in int4 by GPTQ, and what calibration told."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pretrained = open_pretrained(run)
        params, _ = pretrained.load(SINGLE_DEVICE, jnp.bfloat16, None)
        export_trained(ArraySource(params), pretrained.config, folder / "wide", lambda count: None)
        copy_tokenizer(run, folder / "wide")
        rows = np.concatenate([next(data.train).tokens_BT for _ in range(batches)])
        (folder / "text").write_text("\n".join(data.tokenizer.decode(row.tolist()) for row in rows), "utf-8")
        size = {"sequences": len(rows), "length": rows.shape[1]}
        told = write(open_pretrained(folder / "wide"), folder / "gptq", "int4", [folder / "text"], **size)
        yield folder / "wide", folder / "gptq", report(told)


def held_out(data: Data, batches: int) -> list[Batch]:
    """The first held-out rows, each as one text."""
    found = []
    for batch, _ in zip(data.validation(), range(batches), strict=False):
        positions_BT = np.broadcast_to(np.arange(batch.tokens_BT.shape[1], dtype=np.int32), batch.tokens_BT.shape)
        valid_BT = (batch.segments_BT > 0).astype(np.int32)
        found.append(batch._replace(positions_BT=positions_BT, segments_BT=valid_BT))
    return found


@partial(jax.jit, static_argnums=0)
def _judged(served: Served, params: Any, balance: Any, batch: Batch) -> tuple[jax.Array, list[jax.Array]]:
    """The summed loss of a batch, nats, and the experts that each MoE layer chose."""
    model, (B, T) = served.model(params, balance), batch.tokens_BT.shape
    hidden_BTD, chosen = watched(model, batch, served.empty_cache(B, T))
    return summed_loss(model, hidden_BTD, batch, T, served.layout), chosen


def judged(model: HunyuanMoE, batches: list[Batch]) -> tuple[float, list[list[jax.Array]]]:
    """Mean loss over all batches, and the choices in each."""
    results = [_judged(*model.weights, batch) for batch in batches]
    predicted = sum(float(batch.weights_BT.sum()) for batch in batches)
    return sum(float(loss) for loss, _ in results) / predicted, [chosen for _, chosen in results]


def changed(ours: list[list[jax.Array]], theirs: list[list[jax.Array]], num_experts: int) -> float:
    """Mean share of `theirs` that are not among `ours`."""
    pairs = [pair for one, other in zip(theirs, ours, strict=True) for pair in zip(one, other, strict=True)]
    return statistics.fmean(float(changed_share(*pair, num_experts)) for pair in pairs)


class Speed:
    """An engine whose slots are full."""

    def __init__(self, model: HunyuanMoE, steps: int) -> None:
        self.engine, self.steps = Engine(model.weights, slots=SLOTS, max_length=2 * CONTEXT), steps
        self.prefill()
        self.decode()

    def prefill(self) -> float:
        for slot in range(SLOTS):
            self.engine.release(slot)
        requests = [([1 + slot] * CONTEXT, Sampling(max_tokens=CONTEXT)) for slot in range(SLOTS)]
        return seconds_of(lambda: self.engine.admit(requests))

    def decode(self) -> float:
        return seconds_of(lambda: [self.engine.step() for _ in range(self.steps)])


def _opened(way: Way, folder: Path) -> HunyuanMoE:
    formats: Any = {"weights": way.weights, "activations": way.activations, "cache": way.cache}
    return HunyuanMoE.from_hf(folder, compute="bfloat16", **formats)


def measure(run: Path, batches: int, repeats: int, steps: int, tell: Callable[[str], object]) -> list[Found]:
    """All ways, bfloat16 first."""
    data = run_data(run)
    texts = held_out(data, batches)
    found: list[Found] = []
    choices: list[list[jax.Array]] = []
    with checkpoints(run, data, batches) as (wide, gptq, told):
        tell("\n".join(told))
        models = {way.name: _opened(way, gptq if way.calibrated else wide) for way in WAYS}
    for name, model in models.items():
        loss, chosen = judged(model, texts)
        choices = choices or chosen
        share = changed(chosen, choices, model.weights.served.config.num_experts)
        size = sum(x.nbytes for x in jax.tree.leaves(model.weights.params))
        found.append(Found(name, size, 0, loss, share, [], []))
        tell(f"{name}: {size / 1e6:.2f} MB, loss {loss:.5f}, {share:.2%} of choices changed")
    speeds = {name: Speed(model, steps) for name, model in models.items()}
    for each in found:
        each.cache_bytes = speeds[each.name].engine.bytes_per_token
    for _ in range(repeats):
        for what in ("prefill", "decode"):
            turn = {name: getattr(speed, what)() for name, speed in speeds.items()}
            for each in found:
                getattr(each, what).append(turn[WAYS[0].name] / turn[each.name])
    return found


def table_of(found: list[Found]) -> Table:
    table = Table(
        "", "weights MB", "cache B/token", "decode x", "prefill x", "perplexity", "against bfloat16", "routing changed",
        box=None,
    )  # fmt: skip
    for each in found:
        worse = math.exp(each.loss - found[0].loss) - 1
        table.add_row(
            each.name, f"{each.weight_bytes / 1e6:.2f}", str(each.cache_bytes), spread(each.decode, 2),
            spread(each.prefill, 2), f"{math.exp(each.loss):.3f}", f"{worse:+.2%}", f"{each.changed:.2%}",
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantized_serving", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--batches", type=int, default=16, help=f"of {SLOTS} held-out rows (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="tokens of a turn (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args()
    console = Console(width=160, highlight=False)
    console.print(f"{machine()}, {options.repeats} turns: median (least to most)")
    found = measure(options.run, options.batches, options.repeats, options.steps, console.print)
    console.print(table_of(found))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(each) for each in found], indent=1), "utf-8")


if __name__ == "__main__":
    main()
