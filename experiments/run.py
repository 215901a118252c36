"""Trains an experiment: python -m experiments.run experiments/tiny.py

Exit codes: 0 trained to the end · 1 the run failed · 2 a mistake in the arguments, settings or data · 3 another of
several processes is gone · 143 or 130 stopped by SIGTERM or SIGINT after saving (the same command goes on from there).

Several processes, started by experiments.launch or by hand, run this same command each; process 0 tells and writes.
"""

import argparse
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

from experiments.experiment import WITHOUT_EFFECT, Experiment
from experiments.overrides import parse_changes, settings
from experiments.summary import escaped, summarize, weights_to_sample
from moe.model.config import ConfigError
from moe.model.count import count_parameters
from moe.model.parameter import specs_of
from moe.model.tensor_files import WeightsError
from moe.model.transformer import Transformer
from moe.train.checkpoint import CheckpointError
from moe.train.corpus import DataError
from moe.train.data import Data, open_data
from moe.train.loop import DivergedError, Outcome, train
from moe.train.pretrained import open_pretrained
from moe.train.run_folder import RunFolder, RunFolderError, write_atomically
from moe.train.state import Blueprint, TrainState
from parallel.distributed import LOST, DistributedError, detect, initialize, leave
from parallel.layout import LayoutError
from parallel.malloc import use_large_pages
from parallel.mesh import MeshError
from parallel.program_cache import keep_programs
from parallel.together import require_same, wait_for_all

MISTAKES = (ConfigError, MeshError, LayoutError, DataError, RunFolderError, WeightsError, DistributedError)
FAILURES = (CheckpointError, DivergedError)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = parser().parse_args(arguments)
    # Where the output is no terminal, rich would break lines at 80 columns.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        experiment, path = asked(options)
        if options.show:
            show(experiment, console)
            return 0
        processes = detect(os.environ, coordinator=options.coordinator, count=options.processes, index=options.process)
        console.quiet = processes.index > 0
        if processes.count == 1:
            keep_programs()
        initialize(processes, experiment.mesh.num_devices)
        outcome = run(experiment, path, console, remesh=options.remesh)
    except MISTAKES as error:
        errors.print(f"[bold red]error:[/] {escaped(error)}")
        return 2
    except FAILURES as error:
        errors.print(f"[bold red]failed:[/] {escaped(error)}")
        return 1
    except OSError as error:
        errors.print(f"[bold red]failed:[/] {escaped(error)}; what was written before is kept")
        return 1
    except jax.errors.JaxRuntimeError as error:
        if processes.count == 1 or not _is_loss_of_another(error):
            raise
        told = str(error).splitlines()[0]
        errors.print(
            f"[bold red]failed:[/] process {processes.index} lost contact with another process ({escaped(told)}); "
            "what was written before is kept, and the same command goes on from the last checkpoint"
        )
        return LOST
    return 0 if outcome.finished else 128 + outcome.signal


def asked(options: argparse.Namespace) -> tuple[Experiment, Path]:
    """The experiment that the arguments name, with their changes, and its run folder.

    Raises:
        ConfigError: there is none, or a change does not fit.
    """
    as_written = load_experiment(Path(options.experiment))
    assignments = [*options.set, *([f"training.steps={options.steps}"] if options.steps is not None else [])]
    experiment = as_written.vary(parse_changes(as_written, assignments))
    if options.remesh and not options.run_dir:
        raise ConfigError("--remesh without --run-dir: give the folder of the run that shall go on, such as runs/tiny")
    return experiment, Path(options.run_dir) if options.run_dir else default_folder(experiment, as_written)


def default_folder(experiment: Experiment, as_written: Experiment) -> Path:
    """runs/NAME for the experiment as its file has it; a variant with other numbers gets a folder of its own."""
    fingerprint = experiment.fingerprint()
    variant = "" if fingerprint == as_written.fingerprint() else f"-{fingerprint[:8]}"
    return Path("runs") / f"{experiment.name}{variant}"


def run(experiment: Experiment, path: Path, console: Console, *, remesh: bool = False) -> Outcome:
    """Trains `experiment` in the folder `path`, from where an earlier start left off, and sums it up.

    Args:
        remesh: whether an earlier start may have had another mesh. The numbers then go on to rounding, not bit by bit.

    Raises:
        ConfigError, MeshError, LayoutError, DataError, RunFolderError: what was asked cannot be done.
        DistributedError: the processes were started with different arguments or data.
        CheckpointError, DivergedError: the run failed.
    """
    if experiment.init_from is not None:
        open_pretrained(Path(experiment.init_from)).check(experiment.model)
    blueprint = experiment.blueprint()
    fingerprint = experiment.fingerprint()
    require_same(experiment=fingerprint)
    mesh = [f"mesh.{axis}" for axis in experiment.mesh.sizes]
    with RunFolder.open(
        path,
        frozen=experiment.frozen(),
        fingerprint=fingerprint,
        process_index=jax.process_index(),
        may_change=(*WITHOUT_EFFECT, *mesh) if remesh else (),
    ) as folder:
        data = _open_data(experiment, blueprint, console)
        require_same(tokenizer=data.tokenizer.to_json(), corpus=str(data.statistics))
        if jax.process_index() == 0:
            write_atomically(folder.tokenizer, data.tokenizer.to_json())
        announce(experiment, blueprint, data, path, console)
        outcome = train(
            blueprint,
            data,
            experiment.training,
            folder,
            fingerprint=fingerprint,
            console=console,
            create_state=lambda: first_state(experiment, blueprint),
        )
        if outcome.finished:
            weights = weights_to_sample(blueprint, outcome)
            if jax.process_index() == 0:
                summarize(experiment, data, folder, outcome, weights, console)
        wait_for_all("the end of the run")
        return outcome


def _open_data(experiment: Experiment, blueprint: Blueprint, console: Console) -> Data:
    """This process's part of the data. Process 0 comes first: what it tokenizes the others find in the cache."""
    if jax.process_index() > 0:
        wait_for_all("the corpus is tokenized")
    index, count = blueprint.layout.batch_share(experiment.data.batch_size)
    data = open_data(
        experiment.data,
        vocab_size=experiment.model.vocab_size,
        seed=experiment.training.seed,
        process_index=index,
        process_count=count,
        report=console.print,
    )
    if jax.process_index() == 0:
        wait_for_all("the corpus is tokenized")
    return data


def first_state(experiment: Experiment, blueprint: Blueprint) -> TrainState:
    """The state of step 0: drawn from the seed, or with the weights of `init_from` and their selection biases."""
    if experiment.init_from is None:
        return blueprint.create_state(experiment.training.seed)
    pretrained = open_pretrained(Path(experiment.init_from))
    precision = experiment.precision
    params, balance = pretrained.load(blueprint.layout, precision.stored_dtype, precision.quantized)
    return blueprint.state_from(params, experiment.training.seed, balance)


def load_experiment(path: Path) -> Experiment:
    """The `experiment` that a Python file defines.

    Raises:
        ConfigError: no such file, an error in it, or no Experiment of that name.
    """
    return experiment_in(definitions(path), path)


def definitions(path: Path) -> dict[str, Any]:
    """What a Python file defines, by name.

    Raises:
        ConfigError: no such file, or an error in it.
    """
    if not path.is_file():
        known = ", ".join(sorted(str(file) for file in Path("experiments").glob("*.py") if _defines_one(file)))
        raise ConfigError(f"{path}: no such file; give an experiment file" + (f", such as {known}" if known else ""))
    try:
        return runpy.run_path(str(path))
    except ConfigError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = f", line {lines[-1]}" if lines else ""
        raise ConfigError(f"{path}{line}: {type(error).__name__}: {error}") from error


def experiment_in(defined: dict[str, Any], path: Path) -> Experiment:
    """
    Raises:
        ConfigError: there is no Experiment of that name.
    """
    found = defined.get("experiment")
    if not isinstance(found, Experiment):
        raise ConfigError(f"{path}: defines no `experiment = Experiment(...)`; see experiments/tiny.py for one")
    return found


def show(experiment: Experiment, console: Console) -> None:
    """Prints every setting as `--set` takes it, with what may be given, and the size of the model."""
    table = Table("setting", "value", "expected", box=None)
    for path, setting in settings(experiment).items():
        table.add_row(path, escaped(setting.text), setting.expected)
    console.print(table)
    model = nnx.eval_shape(
        lambda: Transformer(experiment.model, experiment.precision, experiment.execution, rngs=nnx.Rngs(0))
    )
    count = count_parameters(experiment.model, specs_of(model))
    console.print(f"\n{count.total:,} parameters, {count.active:,} of them active for a token")


def announce(experiment: Experiment, blueprint: Blueprint, data: Data, path: Path, console: Console) -> None:
    """Says what is about to be trained, on what."""
    count = count_parameters(experiment.model, blueprint.model_specs)
    mesh = " x ".join(f"{name} {size}" for name, size in experiment.mesh.sizes.items() if size > 1) or "1 device"
    layout, precision, told = experiment.layout, experiment.precision, data.statistics
    tokens = experiment.data.batch_size * experiment.data.sequence_length
    lines = {
        "experiment": f"{experiment.name}, {experiment.training.steps} steps of {tokens:,} tokens",
        "model": f"{count.total / 1e6:,.1f}M parameters, {count.active / 1e6:,.1f}M active for a token",
        "devices": f"{mesh} ({jax.devices()[0].device_kind})",
        "layout": f"experts over {' x '.join(layout.experts) or 'none'}, ZeRO-{layout.zero}, "
        f"optimizer states on the {layout.optimizer_states}, gradients on the {layout.gradients}",
        "precision": f"parameters {precision.parameters}, compute {precision.compute}, exchange {precision.exchange}"
        + (f", gathered in {precision.gathered}" if precision.gathered else "")
        + (f", products {precision.matmuls} scaled by {precision.scaling}" if precision.matmuls else ""),
        "data": f"{told.documents:,} documents, {told.tokens:,} training tokens, "
        f"unigram entropy {told.unigram_entropy:.3f} nats",
        "run folder": str(path),
    }
    table = Table.grid(padding=(0, 2))
    for name, text in lines.items():
        table.add_row(f"[bold]{name}[/]", escaped(text))
    console.print(table)


def _is_loss_of_another(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether an exchange failed for want of another process. JAX has no error of its own for that: those who carry
    it out name themselves."""
    return any(name in str(error) for name in ("Gloo", "gloo", "NCCL", "coordination service"))


def _defines_one(file: Path) -> bool:
    return "\nexperiment = " in file.read_text("utf-8")


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog="python -m experiments.run",
        description="Trains an experiment, or goes on with it: the same command resumes from the last checkpoint.",
        epilog="examples:\n"
        "  python -m experiments.run experiments/tiny.py\n"
        "  python -m experiments.run experiments/tiny.py --steps 50 --set optimizer.learning_rate=1e-3\n"
        "  python -m experiments.run experiments/tiny.py --set mesh.data=1 --set mesh.expert=1 --show\n\n"
        "exit codes: 0 done, 1 the run failed, 2 a mistake in settings or data, 3 another process is gone, 143/130 "
        "stopped by SIGTERM/SIGINT after saving\n"
        "several processes: python -m experiments.launch --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("experiment", help="a Python file that defines `experiment = Experiment(...)`")
    command.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE",
        help="change a setting by its dotted path; may be given several times (--show lists all)",
    )  # fmt: skip
    command.add_argument("--steps", type=int, metavar="N", help="the same as --set training.steps=N")
    command.add_argument(
        "--run-dir", metavar="DIR",
        help="where the run writes; by default runs/NAME, and a folder of its own for each variant of the numbers",
    )  # fmt: skip
    command.add_argument(
        "--show", action="store_true", help="print every setting with its value, and the size of the model, and exit"
    )
    command.add_argument(
        "--remesh", action="store_true",
        help="go on with the run in --run-dir on another mesh than it had; the same numbers but for rounding",
    )  # fmt: skip
    command.add_argument("--coordinator", metavar="HOST:PORT", help="of several processes: where process 0 listens")
    command.add_argument("--processes", type=int, metavar="N", help="of several processes: how many there are")
    command.add_argument("--process", type=int, metavar="I", help="of several processes: which one this is, from 0")
    return command


if __name__ == "__main__":
    use_large_pages()
    leave(main)
