"""Trains an experiment: python -m experiments.run experiments/tiny.py

Exit codes: 0 trained to the end · 1 the run failed · 2 a mistake in the arguments, settings or data ·
143 or 130 stopped by SIGTERM or SIGINT after saving (the same command goes on from there).
"""

import argparse
import json
import math
import runpy
import sys
import traceback
from pathlib import Path

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

from experiments.experiment import Experiment
from experiments.overrides import parse_changes, settings
from moe.model.config import ConfigError
from moe.model.count import count_parameters
from moe.model.parameter import specs_of
from moe.model.tensor_files import WeightsError
from moe.model.transformer import Transformer
from moe.serve.engine import Weights
from moe.serve.language_model import HunyuanMoE
from moe.serve.vocabulary import open_vocabulary
from moe.train.checkpoint import CheckpointError
from moe.train.corpus import DataError
from moe.train.data import Data, open_data
from moe.train.loop import DivergedError, Outcome, train
from moe.train.metrics import Record, read_metrics
from moe.train.pictures import save_pictures
from moe.train.pretrained import open_pretrained
from moe.train.run_folder import RunFolder, RunFolderError, write_atomically
from moe.train.state import Blueprint, TrainState
from parallel.layout import SINGLE_DEVICE, LayoutError
from parallel.mesh import MeshError

MISTAKES = (ConfigError, MeshError, LayoutError, DataError, RunFolderError, WeightsError)
FAILURES = (CheckpointError, DivergedError)
LOSS_STEPS = 20
"""The final training loss is the mean of so many last steps."""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_args(arguments)
    # Where the output is no terminal, rich would break lines at 80 columns.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        as_written = load_experiment(Path(options.experiment))
        assignments = [*options.set, *([f"training.steps={options.steps}"] if options.steps is not None else [])]
        experiment = as_written.vary(parse_changes(as_written, assignments))
        if options.show:
            show(experiment, console)
            return 0
        path = Path(options.run_dir) if options.run_dir else default_folder(experiment, as_written)
        outcome = run(experiment, path, console)
    except MISTAKES as error:
        errors.print(f"[bold red]error:[/] {_escaped(error)}")
        return 2
    except FAILURES as error:
        errors.print(f"[bold red]failed:[/] {_escaped(error)}")
        return 1
    except OSError as error:
        errors.print(f"[bold red]failed:[/] {_escaped(error)}; what was written before is kept")
        return 1
    return 0 if outcome.finished else 128 + outcome.signal


def default_folder(experiment: Experiment, as_written: Experiment) -> Path:
    """runs/NAME for the experiment as its file has it; a variant with other numbers gets a folder of its own."""
    fingerprint = experiment.fingerprint()
    variant = "" if fingerprint == as_written.fingerprint() else f"-{fingerprint[:8]}"
    return Path("runs") / f"{experiment.name}{variant}"


def run(experiment: Experiment, path: Path, console: Console) -> Outcome:
    """Trains `experiment` in the folder `path`, from where an earlier start left off, and sums it up.

    Raises:
        ConfigError, MeshError, LayoutError, DataError, RunFolderError: what was asked cannot be done.
        CheckpointError, DivergedError: the run failed.
    """
    if experiment.init_from is not None:
        open_pretrained(Path(experiment.init_from)).check(experiment.model)
    blueprint = experiment.blueprint()
    with RunFolder.open(
        path, frozen=experiment.frozen(), fingerprint=experiment.fingerprint(), process_index=jax.process_index()
    ) as folder:
        data = open_data(
            experiment.data,
            vocab_size=experiment.model.vocab_size,
            seed=experiment.training.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            report=console.print,
        )
        if jax.process_index() == 0:
            write_atomically(folder.tokenizer, data.tokenizer.to_json())
        announce(experiment, blueprint, data, path, console)
        outcome = train(
            blueprint,
            data,
            experiment.training,
            folder,
            fingerprint=experiment.fingerprint(),
            console=console,
            create_state=lambda: first_state(experiment, blueprint),
        )
        if outcome.finished and jax.process_index() == 0:
            summarize(experiment, blueprint, data, folder, outcome, console)
        return outcome


def first_state(experiment: Experiment, blueprint: Blueprint) -> TrainState:
    """The state of step 0: drawn from the seed, or with the weights of `init_from`."""
    if experiment.init_from is None:
        return blueprint.create_state(experiment.training.seed)
    pretrained = open_pretrained(Path(experiment.init_from))
    params, _ = pretrained.load(blueprint.layout, experiment.precision.parameters)
    return blueprint.state_from(params)


def load_experiment(path: Path) -> Experiment:
    """The `experiment` that a Python file defines.

    Raises:
        ConfigError: no such file, an error in it, or no Experiment of that name.
    """
    if not path.is_file():
        known = ", ".join(sorted(str(file) for file in Path("experiments").glob("*.py") if _defines_one(file)))
        raise ConfigError(f"{path}: no such file; give an experiment file" + (f", such as {known}" if known else ""))
    try:
        found = runpy.run_path(str(path)).get("experiment")
    except ConfigError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = f", line {lines[-1]}" if lines else ""
        raise ConfigError(f"{path}{line}: {type(error).__name__}: {error}") from error
    if not isinstance(found, Experiment):
        raise ConfigError(f"{path}: defines no `experiment = Experiment(...)`; see experiments/tiny.py for one")
    return found


def show(experiment: Experiment, console: Console) -> None:
    """Prints every setting as `--set` takes it, with what may be given, and the size of the model."""
    table = Table("setting", "value", "expected", box=None)
    for path, setting in settings(experiment).items():
        table.add_row(path, _escaped(setting.text), setting.expected)
    console.print(table)
    model = nnx.eval_shape(
        lambda: Transformer(experiment.model, experiment.precision, experiment.execution, rngs=nnx.Rngs(0))
    )
    count = count_parameters(experiment.model, specs_of(model))
    console.print(f"\n{count.total:,} parameters, {count.active:,} of them active for a token")


def announce(experiment: Experiment, blueprint: Blueprint, data: Data, path: Path, console: Console) -> None:
    """Says what is about to be trained, on what."""
    count = count_parameters(experiment.model, blueprint.specs)
    mesh = " x ".join(f"{name} {size}" for name, size in experiment.mesh.sizes.items() if size > 1) or "1 device"
    layout, precision, told = experiment.layout, experiment.precision, data.statistics
    tokens = experiment.data.batch_size * experiment.data.sequence_length
    lines = {
        "experiment": f"{experiment.name}, {experiment.training.steps} steps of {tokens:,} tokens",
        "model": f"{count.total / 1e6:,.1f}M parameters, {count.active / 1e6:,.1f}M active for a token",
        "devices": f"{mesh} ({jax.devices()[0].device_kind})",
        "layout": f"experts over {' x '.join(layout.experts) or 'none'}, ZeRO-{layout.zero}, "
        f"optimizer states on the {layout.optimizer_states}",
        "precision": f"parameters {precision.parameters}, compute {precision.compute}, exchange {precision.exchange}",
        "data": f"{told.documents:,} documents, {told.tokens:,} training tokens, "
        f"unigram entropy {told.unigram_entropy:.3f} nats",
        "run folder": str(path),
    }
    table = Table.grid(padding=(0, 2))
    for name, text in lines.items():
        table.add_row(f"[bold]{name}[/]", _escaped(text))
    console.print(table)


def summarize(
    experiment: Experiment, blueprint: Blueprint, data: Data, folder: RunFolder, outcome: Outcome, console: Console
) -> None:
    """Draws the pictures, writes summary.json, and prints what came out and where it is."""
    records = read_metrics(folder.metrics)
    losses = [record["loss"] for record in records if "loss" in record][-LOSS_STEPS:]
    validation = [record["validation_loss"] for record in records if "validation_loss" in record][-1:]
    entropy = data.statistics.unigram_entropy
    save_pictures(records, folder.pictures, entropy, experiment.name)
    sample = _sample(blueprint, data, folder, outcome)
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
    console.print("[bold]sample[/]", _escaped(sample), "", sep="\n")
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
            f"{layers['wire_bytes'][layer] / 1e6:.1f} MB a step",
        )
    console.print(table, "")


def _sample(blueprint: Blueprint, data: Data, folder: RunFolder, outcome: Outcome) -> str:
    """What the model makes of the beginning of the first held-out document, or of a full stop where there is none."""
    first = next(data.validation(), None)
    prompt = data.tokenizer.decode(first.tokens_BT[0, :16]) if first is not None else "."
    here = jax.local_devices()[0]
    params, balance = jax.device_put((outcome.state.params, outcome.state.balance), here)
    weights = Weights(blueprint.config, blueprint.precision, SINGLE_DEVICE, params, balance)
    vocabulary = open_vocabulary(folder.path, {})
    model = HunyuanMoE(weights, vocabulary, max_length=2048, name=folder.path.name)
    return prompt + model.generate(prompt, max_tokens=100, temperature=0.8)


def _defines_one(file: Path) -> bool:
    return "\nexperiment = " in file.read_text("utf-8")


def _escaped(text: object) -> str:
    """For rich, which would read words in brackets as styles."""
    return str(text).replace("[", "\\[")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.run",
        description="Trains an experiment, or goes on with it: the same command resumes from the last checkpoint.",
        epilog="examples:\n"
        "  python -m experiments.run experiments/tiny.py\n"
        "  python -m experiments.run experiments/tiny.py --steps 50 --set optimizer.learning_rate=1e-3\n"
        "  python -m experiments.run experiments/tiny.py --set mesh.data=1 --set mesh.expert=1 --show\n\n"
        "exit codes: 0 done, 1 the run failed, 2 a mistake in settings or data, 143/130 stopped by SIGTERM/SIGINT "
        "after saving",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", help="a Python file that defines `experiment = Experiment(...)`")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE",
        help="change a setting by its dotted path; may be given several times (--show lists all)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, metavar="N", help="the same as --set training.steps=N")
    parser.add_argument(
        "--run-dir", metavar="DIR",
        help="where the run writes; by default runs/NAME, and a folder of its own for each variant of the numbers",
    )  # fmt: skip
    parser.add_argument(
        "--show", action="store_true", help="print every setting with its value, and the size of the model, and exit"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
