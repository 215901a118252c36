"""How repeated measurements are asked for and told."""

import argparse
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import jax


def spread(values: Sequence[float], digits: int = 1) -> str:
    """median (least to most)"""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def asked_repeats(program: str, doc: str | None, default: int, of: str) -> int:
    """--repeats of a command line that has nothing else. of: what is repeated."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=(doc or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=default, help=f"{of} (default: %(default)s)")
    repeats = parser.parse_args().repeats
    if repeats < 1:
        parser.error(f"--repeats {repeats}: give 1 or more")
    return repeats


def machine() -> str:
    """What computes, and by which jax."""
    kind = jax.devices()[0].device_kind
    name = f"{os.cpu_count()} x {processor()}" if kind == "cpu" else kind
    return f"{name}, jax {jax.__version__}"


def processor() -> str:
    """The name that Linux has for it."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text("utf-8").splitlines() if about.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
