"""What a finished run says for itself: pictures, summary.json, and a table and a sample of text on the screen."""

import json
import math
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from experiments.experiment import Experiment
from moe.model.execution import plain_execution
from moe.model.merge import merged
from moe.serve.engine import Served, Weights
from moe.serve.language_model import HunyuanMoE
from moe.serve.vocabulary import open_vocabulary
from moe.train.data import Data
from moe.train.loop import Outcome
from moe.train.metrics import Record, read_metrics
from moe.train.pictures import save_pictures
from moe.train.run_folder import RunFolder, write_atomically
from moe.train.state import Blueprint
from parallel.layout import SINGLE_DEVICE
from parallel.together import gather_to_first

LOSS_STEPS = 20
"""The final training loss is the mean of so many last steps."""
LARGEST_SAMPLED = 8e9
"""Bytes of parameters up to which a run ends with a sample of text: one device of process 0 holds them all for it."""


def summarize(
    experiment: Experiment,
    data: Data,
    folder: RunFolder,
    outcome: Outcome,
    weights: Weights | None,
    console: Console,
) -> None:
    """Draws the pictures, writes summary.json, and prints what came out and where it is.

    Args:
        weights: on one device, for a sample of text; None for a summary without one.
    """
    records = read_metrics(folder.metrics)
    losses = [record["loss"] for record in records if "loss" in record][-LOSS_STEPS:]
    validation = [record["validation_loss"] for record in records if "validation_loss" in record][-1:]
    entropy = data.statistics.unigram_entropy
    save_pictures(records, folder.pictures, entropy, experiment.name)
    sample = None if weights is None else _sample(weights, data, folder)
    summary = {
        "steps": outcome.step,
        "training_loss": sum(losses) / len(losses),
        "validation_loss": validation[0] if validation else None,
        "unigram_entropy": entropy,
        "sample": sample,
    }
    write_atomically(folder.summary, json.dumps(summary, indent=1, ensure_ascii=False))

    table = Table("after " + f"{outcome.step} steps", "nats per token", "bits per byte", box=None)
    per_byte = data.statistics.tokens / data.statistics.bytes / math.log(2)
    for name in ("training_loss", "validation_loss", "unigram_entropy"):
        if summary[name] is not None:
            table.add_row(name.replace("_", " "), f"{summary[name]:.3f}", f"{summary[name] * per_byte:.3f}")
    console.print("", table, "")
    _print_routing(records[-1] if "layers" in records[-1] else records[-2], console)
    if sample is None:
        limit = f"{LARGEST_SAMPLED / 1e9:.0f} GB"
        console.print(f"no sample: the parameters are more than {limit}, too many for one device\n")
    else:
        console.print("[bold]sample[/]", escaped(sample), "", sep="\n")
    console.print("the run is finished; for a longer one give --steps, which starts in a folder of its own")
    console.print(f"[bold]metrics[/]      {folder.metrics}   (tensorboard --logdir {folder.tensorboard})")
    console.print(f"[bold]pictures[/]     {folder.pictures}")
    console.print(f"[bold]checkpoints[/]  {folder.checkpoints}")


def _print_routing(record: Record, console: Console) -> None:
    if "layers" not in record:
        return
    layers = record["layers"]
    table = Table(
        "MoE layer", "busiest expert", "idlest expert", "router entropy", "dropped", "sent a device", box=None
    )
    for layer, load in enumerate(layers["load"]):
        table.add_row(
            str(layer),
            f"{max(load) * len(load):.2f} x even",
            f"{min(load) * len(load):.2f} x even",
            f"{layers['entropy'][layer]:.3f} of {math.log(len(load)):.3f} nats",
            f"{layers['dropped'][layer]:.1%}",
            f"{layers['wire_bytes'][layer] / 1e6:.1f} MB a step, "
            f"{layers['across_bytes'][layer] / 1e6:.1f} across nodes",
        )
    console.print(table, "")


def weights_to_sample(blueprint: Blueprint, outcome: Outcome) -> Weights | None:
    """The parameters, gathered in process 0 from the devices of all; None there if they are too many, and elsewhere."""
    state = outcome.state
    params = state.params if blueprint.lora is None else merged(state.params, state.frozen, blueprint.lora)
    kept = (params, state.balance)
    if sum(x.nbytes for x in jax.tree.leaves(kept)) > LARGEST_SAMPLED:
        return None
    gathered: Any = gather_to_first(kept, blueprint.layout)
    if jax.process_index() > 0:
        return None
    params, balance = jax.device_put(gathered, jax.local_devices()[0])
    execution = plain_execution(blueprint.precision)
    return Weights(Served(blueprint.config, blueprint.precision, SINGLE_DEVICE, execution), params, balance)


def _sample(weights: Weights, data: Data, folder: RunFolder) -> str:
    """What the model makes of the beginning of the first held-out document, or of a full stop where there is none."""
    first = next(data.validation(), None)
    prompt = data.tokenizer.decode(first.tokens_BT[0, :16]) if first is not None else "."
    vocabulary = open_vocabulary(folder.path, {})
    model = HunyuanMoE(weights, vocabulary, max_length=2048, name=folder.path.name)
    return prompt + model.generate(prompt, max_tokens=100, temperature=0.8)


def escaped(text: object) -> str:
    """For rich, which would read words in brackets as styles."""
    return str(text).replace("[", "\\[")
