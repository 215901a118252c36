"""The options of a command that serves, for the formats of weights, activations and cache."""

import argparse
from typing import Any, get_args

from moe.ops.quantize import Quantized
from parallel.blocks import EIGHT_BIT


def add_formats(parser: argparse.ArgumentParser) -> None:
    """--weights, --activations and --cache."""
    parser.add_argument(
        "--weights", choices=get_args(Quantized), help="quantize the matrices as they are read; by default as stored"
    )
    parser.add_argument(
        "--activations", choices=EIGHT_BIT,
        help="multiply prompts with the weights in 8 bits; by default these are widened. As --weights",
    )  # fmt: skip
    parser.add_argument(
        "--cache", choices=EIGHT_BIT, help="keep keys and values in 8 bits; by default as they are computed"
    )


def formats_of(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `HunyuanMoE.from_hf` that these options are."""
    return {"weights": options.weights, "activations": options.activations, "cache": options.cache}
