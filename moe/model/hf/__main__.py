"""Checkpoints in and out, and evaluated: python -m moe.model.hf --help

Exit codes: 0 done · 1 a failure of the system, such as a full disk · 2 a mistake in the arguments or the files.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax.numpy as jnp
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from moe.model.config import ConfigError
from moe.model.folder import ModelFolder, is_model_folder
from moe.model.hf.checkpoint import HfCheckpoint
from moe.model.hf.config import FAMILIES
from moe.model.hf.convert import export, export_folder, export_trained, import_checkpoint
from moe.model.hf.evaluate import evaluate
from moe.model.hf.peft import export_adapters
from moe.model.tensor_files import WeightsError
from moe.train.checkpoint import CheckpointError
from moe.train.pretrained import open_pretrained
from moe.train.trained import TrainedModel
from parallel.layout import SINGLE_DEVICE, Layout, LayoutError
from parallel.mesh import MeshError, make_mesh, parse_mesh


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ConfigError, WeightsError, LayoutError, MeshError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CheckpointError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"failed: {error}; nothing is left half-written", file=sys.stderr)
        return 1
    return 0


def layout_of(mesh: str | None) -> Layout:
    """The layout of `--mesh`; without it, one device."""
    return Layout(make_mesh(parse_mesh(mesh))) if mesh else SINGLE_DEVICE


def _import(options: argparse.Namespace) -> None:
    checkpoint = HfCheckpoint(options.checkpoint)
    with _progress() as progress:
        import_checkpoint(checkpoint, options.output, progress, options.adapters)
    print(f"wrote {options.output}: {checkpoint.family}, {len(checkpoint.tensors)} tensors")


def _export(options: argparse.Namespace) -> None:
    with _progress() as progress:
        if is_model_folder(options.model):
            export_folder(ModelFolder(options.model), options.output, progress)
        else:
            trained, model = TrainedModel(options.model), open_pretrained(options.model)
            if model.settings:
                export(model.source, model.config, model.origin, options.output, progress)
            else:
                export_trained(model.source, model.config, options.output, progress)
            trained.copy_tokenizer(options.output)
    print(f"wrote {options.output}")


def _export_adapters(options: argparse.Namespace) -> None:
    trained, model = TrainedModel(options.model), open_pretrained(options.model)
    adapters = trained.adapters()
    family = next(family for family in FAMILIES if family == model.origin.family)
    dtype = jnp.dtype(trained.precision.parameters)
    base = str(trained.init_from)
    export_adapters(adapters, adapters.lora, dtype, model.config, family, base, options.output)
    print(f"wrote {options.output}")


@contextmanager
def _progress() -> Iterator[Callable[[int], None]]:
    """A line of bytes written so far, on standard error where that is a terminal."""
    columns = (TextColumn("{task.description}"), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("written", total=None)
        yield lambda count: bar.advance(task, count)


def _evaluate(options: argparse.Namespace) -> None:
    evaluate(options.checkpoint, options.inputs, options.output, layout_of(options.mesh), options.adapters)
    print(f"wrote {options.output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moe.model.hf", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("import", help="a checkpoint into a model folder of our own, of any size")
    command.add_argument("checkpoint", type=Path, help="a folder with config.json and safetensors files")
    command.add_argument("output", type=Path, help="the model folder to write; it must not exist")
    _add_adapters(command)
    command.set_defaults(run=_import)
    command = commands.add_parser("export", help="a model folder, or a run, its adapters merged, into a checkpoint")
    command.add_argument("model", type=Path, help="a model folder, or a run's folder (its newest whole checkpoint)")
    command.add_argument("output", type=Path, help="the checkpoint folder to write; it must not exist")
    command.set_defaults(run=_export)
    command = commands.add_parser("export-adapters", help="a run's LoRA adapters into a folder of PEFT's format")
    command.add_argument("model", type=Path, help="the folder of a run that trained adapters")
    command.add_argument("output", type=Path, help="the folder to write; it must not exist")
    command.set_defaults(run=_export_adapters)
    command = commands.add_parser(
        "evaluate", help="logits, loss, hidden states, all gradients and a greedy continuation of given tokens"
    )
    command.add_argument("checkpoint", type=Path, help="a folder with config.json and safetensors files")
    command.add_argument("--inputs", type=Path, required=True, help="a safetensors file with input_ids (batch, tokens)")
    command.add_argument("--output", type=Path, required=True, help="the safetensors file to write")
    command.add_argument("--mesh", metavar="AXIS=N,…", help="devices to use, such as data=2,expert=4; by default one")
    _add_adapters(command)
    command.set_defaults(run=_evaluate)
    return parser


def _add_adapters(command: argparse.ArgumentParser) -> None:
    command.add_argument("--adapters", type=Path, metavar="FOLDER", help="LoRA adapters that PEFT wrote, to merge in")


if __name__ == "__main__":
    sys.exit(main())
