"""A model's weights in 8 or 4 bits, as a checkpoint: python -m moe.serve.quantize MODEL OUTPUT --weights int4

Scales come from the largest magnitudes; with --text, int4 weights are calibrated on that text (moe/ops/gptq.py). One
cross-layer group is in memory at a time. The output is served as it is: python -m moe.serve.generate OUTPUT

Exit codes: 0 done · 1 the system failed · 2 a mistake in the arguments or files.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe.model.config import ConfigError
from moe.model.folder import copy_tokenizer
from moe.model.hf.config import hunyuan_settings
from moe.model.hf.names import HfTensor
from moe.model.hf.quantized import FORMATS, in_layer_order, quantized_layers, write_quantized
from moe.model.precision import Format, Precision
from moe.model.tensor_files import WeightsError
from moe.ops.quantize import Quantized, QuantizedWeight
from moe.serve.calibrate import PieceKey, Told, calibrate, rounded
from moe.serve.vocabulary import open_vocabulary
from moe.train.checkpoint import CheckpointError
from moe.train.pretrained import Pretrained, open_pretrained


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        pretrained = open_pretrained(options.model)
        told = write(
            pretrained,
            options.output,
            options.weights,
            options.text,
            sequences=options.sequences,
            length=options.length,
        )
    except (ConfigError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, OSError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    for line in report(told):
        print(line)
    print(f"wrote {options.output}")
    return 0


def write(
    pretrained: Pretrained,
    output: Path,
    format: Quantized,
    texts: list[Path],
    *,
    sequences: int = 128,
    length: int = 512,
) -> list[Told]:
    """Writes the checkpoint `output`.

    Args:
        texts: files to calibrate on, for int4; none to round to the nearest.
        sequences, length: of the calibration, tokens of the first that the files give.

    Returns:
        what calibration tells of each matrix.

    Raises:
        ConfigError: the weights are quantized already, calibration of another format, or too little text.
        WeightsError: `output` is there already, or a tensor cannot be read.
    """
    if pretrained.quantized is not None:
        raise ConfigError(
            f"{pretrained.folder}: holds weights in {pretrained.quantized} already; give the model before its "
            "quantization"
        )
    if texts and format != "int4":
        raise ConfigError(f"--text with --weights {format}: calibration is for int4; leave out --text")
    config, source = pretrained.config, pretrained.source
    settings = pretrained.settings or hunyuan_settings(config, pretrained.dtype.name)
    layers = quantized_layers(config, settings["model_type"], format)
    tensors = in_layer_order(config, settings["model_type"])
    told: list[Told] = []
    calibrated: Iterator[dict[PieceKey, QuantizedWeight]] = iter(())
    if texts:
        tokens_BT = calibration_tokens(pretrained, texts, sequences, length)
        stored: Format = "float32" if pretrained.dtype == np.float32 else "bfloat16"
        precision = Precision(parameters=stored, compute=stored, exchange=stored)
        calibrated = calibrate(source, config.dropless, tokens_BT, precision, told.append)
    ready: dict[PieceKey, QuantizedWeight] = {}

    def content(tensor: HfTensor) -> Any:
        nonlocal ready
        piece = tensor.piece
        if tensor.name not in layers:
            return source.read(piece)
        if not texts:
            return rounded(source.read(piece), piece.axes, format)
        if (piece.path, piece.index) not in ready:
            ready = next(calibrated)
        return ready[piece.path, piece.index]

    dtypes = {tensor.name: source.dtype(tensor.piece) for tensor in tensors}
    write_quantized(output, config, settings, format, dtypes, map(content, tensors))
    copy_tokenizer(pretrained.folder, output)
    return told


def calibration_tokens(pretrained: Pretrained, texts: list[Path], sequences: int, length: int) -> np.ndarray:
    """i32 [B, T]: the first of the files' tokens.

    Raises:
        ConfigError: they do not fill one sequence.
    """
    vocabulary = open_vocabulary(pretrained.folder, pretrained.settings)
    tokens: list[int] = []
    for path in texts:
        tokens += vocabulary.encode(path.read_text("utf-8"))
        if len(tokens) >= sequences * length:
            break
    whole = min(sequences, len(tokens) // length)
    if not whole:
        raise ConfigError(f"--text: {len(tokens)} tokens do not fill a sequence of {length}; give more, or a --length")
    return np.array(tokens[: whole * length], np.int32).reshape(whole, length)


def report(told: list[Told]) -> list[str]:
    """What calibration was worth, and the matrices that it left out."""
    if not told:
        return []
    ratios = [each.ratio for each in told if each.ratio is not None]
    lines = [f"{len(ratios)} of {len(told)} matrices calibrated"]
    if ratios:
        middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
        lines.append(
            f"squared error of their outputs over that of rounding to the nearest: median {middle:.2f} "
            f"({least:.2f} to {most:.2f})"
        )
    lines += [f"rounded to the nearest: {each.name}, {each.tokens} tokens" for each in told if each.ratio is None]
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moe.serve.quantize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a checkpoint, a model folder, or the folder of a run")
    parser.add_argument("output", type=Path, help="the checkpoint folder to write; it must not exist")
    parser.add_argument("--weights", choices=tuple(FORMATS), default="int4", help="(default: %(default)s)")
    parser.add_argument(
        "--text", type=Path, action="append", default=[], metavar="FILE", help="calibrate int4 on it; may be repeated"
    )
    parser.add_argument(
        "--sequences", type=int, default=128, help="of the text, to calibrate on (default: %(default)s)"
    )
    parser.add_argument("--length", type=int, default=512, help="tokens of each (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
